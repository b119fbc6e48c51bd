"""`infer` and `status` against a door that says what the test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import cli

ANSWER: dict[str, Any] = {
    "model": "digits",
    "label": "3",
    "confidence": 0.9,
    "tier": "edge_gpu",
    "target": "edge_gpu",
    "variant": "v",
    "model_sha256": "0" * 64,
    "provider": "litert",
    "timing_ms": {"queue": 0.0, "link": 0.0, "compute": 0.1, "total": 0.2},
    "deadline_met": True,
    "cost_usd": 0.0,
    "cached": False,
    "stale": False,
    "same_input": True,
    "escalation": "",
    "age_s": 0.0,
    "reasons": ["edge_gpu: score 110"],
}
EARLIER = ANSWER | {"cached": True, "stale": True, "same_input": False, "confidence": None, "age_s": 12.0}
REFUSAL: dict[str, Any] = {
    "request_id": "r",
    "error": {"code": "unavailable", "message": "no target can answer", "retry_after_s": 1.5},
    "reasons": ["edge_mcu: unplugged", "cache: no earlier answer"],
}
STATUS: dict[str, Any] = {
    "gateway": "gw",
    "ready": True,
    "reason": "",
    "uptime_s": 3.0,
    "version": "1",
    "targets": [
        {
            "name": "edge_mcu",
            "available": False,
            "reason": "no ports are configured",
            "service_ms": None,
            "in_flight": 0,
            "max_concurrent": 1,
        }
    ],
    "components": [
        {"name": "http door", "state": "up", "reason": ""},
        {"name": "mqtt door", "state": "down", "reason": "connection refused"},
        {"name": "load", "state": "starting", "reason": ""},
        {"name": "edge_mcu", "state": "down", "reason": "no ports are configured"},
    ],
    "counters": {"answered": 5, "refused": 1, "cached": 2, "stale": 0, "malformed": 7, "cost_usd": 0.0},
}


class Door:
    def __init__(self) -> None:
        self.reply: tuple[int, Any] = (200, ANSWER)
        self.asked: dict[str, Any] = {}
        self.path = ""
        door = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                door.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.do_GET()

            def do_GET(self) -> None:
                door.path = self.path
                code, document = door.reply
                body = json.dumps(document).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    thread = threading.Thread(target=door.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield door
    door.server.shutdown()
    thread.join()
    door.server.server_close()


@pytest.fixture
def sample(tmp_path: Path) -> str:
    path = tmp_path / "sample.json"
    path.write_text("[1, 2]")
    return str(path)


def test_a_refusal_is_a_readable_line_and_its_reasons(
    door: Door, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", "digits", sample, "--url", door.url]
    door.reply = (503, REFUSAL)
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "edge-agent: unavailable: no target can answer; again in 1.5 s",
        "  why      edge_mcu: unplugged",
        "  why      cache: no earlier answer",
    ]
    assert cli.main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == REFUSAL
    for message in ("must be 0 to 9", "priority: must be 0 to 9"):
        error = {"code": "invalid_request", "field": "priority", "message": message}
        door.reply = (400, {"error": error, "reasons": []})
        assert cli.main(command) == 1
        assert capsys.readouterr().err == "edge-agent: invalid_request: priority: must be 0 to 9\n"
    assert cli.main(["status", "--url", door.url]) == 1
    assert capsys.readouterr().err == "edge-agent: invalid_request: priority: must be 0 to 9\n"


def test_an_earlier_answer_says_so_and_fails_where_it_must_be_fresh(
    door: Door, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", "digits", sample, "--url", door.url]
    assert cli.main([*command, "--fresh"]) == 0
    assert capsys.readouterr().out.startswith("3  (90.0% sure)\n")
    door.reply = (200, EARLIER)
    for options, code in (([], 0), (["--no-cache"], 0), (["--fresh"], 3)):
        assert cli.main([*command, *options]) == code
        shown = capsys.readouterr().out
        assert shown.startswith("3  (confidence unknown: answer to an earlier input, 12 s old) STALE\n")
    assert cli.main([*command, "--fresh", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == EARLIER
    door.reply = (200, ANSWER | {"escalation": "held"})
    assert cli.main([*command, "--accuracy", "adaptive"]) == 0
    assert "; no more accurate model answered)" in capsys.readouterr().out
    door.reply = (200, EARLIER | {"same_input": True, "confidence": 0.5})
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("3  (50.0% sure, 12 s old) STALE\n")


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz"])
def test_a_row_of_a_numpy_file(door: Door, tmp_path: Path, name: str) -> None:
    rows, path = np.arange(6, dtype=np.int8).reshape(3, 2), tmp_path / name
    if name.endswith("z"):
        np.savez(path, inputs=rows, labels=np.zeros(3))
    else:
        np.save(path, rows)
    assert cli.main(["infer", "digits", str(path), "--index", "1", "--url", door.url]) == 0
    assert door.asked == {"inputs": [2, 3], "model": "digits"}


@pytest.mark.parametrize(
    ("name", "content", "options", "text"),
    [
        ("a.json", b'{"a": [1, 2,\n 3', [], "is not JSON: line 2, column 3"),
        ("a.bin", b"ab\xff", [], "is not JSON: byte 2 is not UTF-8"),
        ("a.json", b"[" * 100_000, [], "nested too deeply"),
        ("a.json", b"[1]", ["--index", "0"], "--index is for .npy and .npz files"),
        ("a.npy", b"", [], "is not a NumPy file"),
        ("a.npz", b"PK\x03\x04..", [], "is not a NumPy file"),
    ],
)
def test_files_of_no_use_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, options: list[str], text: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert cli.main(["infer", "digits", str(path), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"edge-agent: {path}: ")
    assert text in err


def test_an_archive_without_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    assert cli.main(["infer", "digits", str(tmp_path / "a.npz")]) == 2
    assert "has no array `inputs`; it has: x" in capsys.readouterr().err


def test_status_names_what_is_not_up_and_counts_what_was_malformed(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    door.reply = (200, STATUS)
    assert cli.main(["status", "--url", door.url]) == 0
    shown = capsys.readouterr().out
    assert "  DOWN mqtt door: connection refused\n" in shown
    assert "  STARTING load\n" in shown
    assert "http door" not in shown
    assert shown.count("edge_mcu") == 1
    assert "0 stale, 7 turned away, 0 USD" in shown


def test_the_status_says_what_budgets_leave(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    day = {"lane": None, "unit": "usd", "window": "day", "limit": 5.0, "left": 3.25, "left_now": 0.5, "used": 1.75}
    spent = {"lane": "cloud:eu", "unit": "bytes", "window": "hour", "limit": 20_000_000, "left": 0, "left_now": 0}
    door.reply = (200, STATUS | {"budgets": [day, spent]})
    assert cli.main(["status", "--url", door.url]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "  budget 3.25 of 5 USD per day left, 0.5 USD at once" in out
    assert "  DONE   0 of 20000000 bytes per hour of cloud:eu left" in out


@pytest.mark.parametrize("document", [[1], {"status": "ok"}, STATUS])
@pytest.mark.parametrize("words", [["infer", "digits", "{input}"], ["explain", "r"]])
def test_another_program_at_the_address_is_told(door: Door, tmp_path: Path, document: Any, words: list[str]) -> None:
    (tmp_path / "a.json").write_text("[1]")
    door.reply = (200, document)
    with pytest.raises(SystemExit, match="is no edge-agent of this version"):
        cli.main([word.format(input=tmp_path / "a.json") for word in [*words, "--url", door.url]])


def test_an_address_may_end_with_a_slash(door: Door) -> None:
    door.reply = (200, STATUS)
    assert cli.main(["status", "--url", f"{door.url}/"]) == 0
    assert door.path == "/status"
