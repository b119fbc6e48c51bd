"""The trace: what a line says, files that are rotated, disks that are full, and that nothing waits for it."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_request
from test_metrics import answer

from agent.core.clock import ManualClock
from agent.core.errors import Unavailable
from agent.core.types import InferenceRequest
from agent.registry.catalog import Catalog
from agent.telemetry import trace
from agent.telemetry.story import Stories
from agent.telemetry.trace import TraceFile, trace_header

ROOT = Path(__file__).resolve().parents[2]
DECISION = {"policy": "p", "ranked": [], "weights": {}, "candidates": [], "reasons": ["for a person"]}


class Decided:
    def to_dict(self) -> dict[str, Any]:
        return dict(DECISION)


class Told:
    """Puts requests that ended into a trace."""

    def __init__(self, path: Path, clock: ManualClock, **options: Any) -> None:
        self.path = path
        self.clock = clock
        self.file = TraceFile(path, {"gateway": "gw"}, started=clock.monotonic(), **options)
        self.stories = Stories(0, clock, self.file)

    def end(self, outcome: Any = None, **changes: Any) -> InferenceRequest:
        request = make_request(self.clock, **changes)
        self.stories.begin(request)
        self.stories.routed(request, Decided(), [])
        self.stories.ended(request, answer(request_id=request.id) if outcome is None else outcome)
        return request

    def lines(self, suffix: str = "") -> list[dict[str, Any]]:
        path = self.path.with_name(self.path.name + suffix)
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def told(tmp_path: Path, clock: ManualClock) -> Told:
    return Told(tmp_path / "traces" / "t.jsonl", clock)


def test_a_line_says_what_was_asked_decided_and_answered(told: Told, clock: ManualClock) -> None:
    told.file.start()
    clock.advance(2.5)
    told.end(metadata={"truth": "3"}, priority=9)
    told.file.close()
    header, line = told.lines()
    assert (header["kind"], header["schema"], header["gateway"], header["payload"]) == ("header", 1, "gw", False)
    assert (line["kind"], line["schema"], line["t_s"], line["at"]) == ("request", 1, 2.5, clock.wall())
    assert (line["request"]["priority"], line["request"]["truth"]) == (9, "3")
    assert line["request"]["input"] | {"bytes": 16, "minimum": -1.0, "maximum": 2.0} == line["request"]["input"]
    assert "inputs" not in line["request"]
    assert line["stages"][0]["decision"] == {key: value for key, value in DECISION.items() if key != "reasons"}
    assert (line["outcome"]["status"], line["outcome"]["correct"]) == ("computed", True)


@pytest.mark.parametrize(("truth", "correct"), [(None, None), ("3", True), ("4", False)])
def test_whether_it_was_right_is_only_known_if_somebody_said(told: Told, truth: str | None, correct: object) -> None:
    told.file.start()
    told.end(metadata={} if truth is None else {"truth": truth})
    told.end(Unavailable("no"), metadata={"truth": "3"})
    told.file.close()
    _, answered, refused = told.lines()
    assert answered["outcome"]["correct"] is correct
    assert (refused["outcome"]["correct"], refused["outcome"]["status"]) == (None, "refused")


def test_equal_inputs_have_equal_digests_and_others_have_not(told: Told) -> None:
    told.file.start()
    for values in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]):
        told.end(inputs={"window": np.array([values], np.float32)})
    told.file.close()
    first, second, third = (line["request"]["input"]["digest"] for line in told.lines()[1:])
    assert first == second != third


def test_the_payload_is_written_only_if_asked_for(tmp_path: Path, clock: ManualClock) -> None:
    told = Told(tmp_path / "t.jsonl", clock, payload=True)
    told.file.start()
    told.end()
    told.file.close()
    header, line = told.lines()
    assert header["payload"] is True
    assert line["request"]["inputs"] == {"window": [[0.5, -1.0, 2.0, 0.0]]}


def test_the_page_names_every_key(told: Told, catalog: Catalog) -> None:
    told.file._header |= trace_header(catalog, [])
    told.file.start()
    told.end()
    told.file.close()
    page = (ROOT / "docs" / "traces.md").read_text()
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", page))))
    header, line = told.lines()
    for part in (header, line, line["request"], line["request"]["input"], line["stages"][0], line["outcome"]):
        assert set(part) <= documented


def test_files_are_rotated_and_the_oldest_goes(tmp_path: Path, clock: ManualClock) -> None:
    told = Told(tmp_path / "t.jsonl", clock, max_bytes=4096, files=3)
    told.file.start()
    for number in range(40):
        told.end(id=f"r{number}")
    told.file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "t.jsonl.1", "t.jsonl.2"]
    kept: list[str] = []
    for suffix in (".2", ".1", ""):
        assert told.path.with_name(f"t.jsonl{suffix}").stat().st_size <= 4096
        header, *lines = told.lines(suffix)
        assert header["kind"] == "header"
        kept += [line["request"]["id"] for line in lines]
    assert kept == [f"r{number}" for number in range(40 - len(kept), 40)]
    assert told.file.written == 40


def test_a_daemon_that_starts_again_goes_on_behind_a_line_that_was_cut_off(told: Told, clock: ManualClock) -> None:
    told.path.parent.mkdir()
    told.path.write_text('{"kind":"request","sch')
    told.file.start()
    told.end()
    told.file.close()
    cut_off, header, line = told.path.read_text().splitlines()
    assert cut_off == '{"kind":"request","sch'
    assert (json.loads(header)["kind"], json.loads(line)["kind"]) == ("header", "request")


def test_a_full_disk_is_told_and_costs_lines_only(clock: ManualClock) -> None:
    told = Told(Path("/dev/full"), clock)
    told.file.start()
    told.end()
    told.file.close()
    status = told.file.status()
    assert status["error"] == "No space left on device"
    assert (status["written"], status["unwritten"], status["dropped"]) == (0, 1, 0)


def test_a_file_that_can_be_written_again_is(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "RETRY_S", 0.0)
    told.path.parent.parent.joinpath("traces").write_text("a file where the folder has to be")
    told.end()
    told.file._add(told.file._queue.get())  # type: ignore[arg-type]
    told.file._flush()
    assert "File exists" in told.file.problem
    told.path.parent.unlink()
    told.file.start()
    told.end()
    told.file.close()
    assert told.file.problem == ""
    assert [line["kind"] for line in told.lines()] == ["header", "request"]
    assert told.file.status()["unwritten"] == 1


def test_nothing_waits_for_a_disk_that_hangs(told: Told) -> None:
    for _ in range(trace.MAX_QUEUED + 10):
        told.end()
    assert (told.file.dropped, told.file.status()["queued"]) == (10, trace.MAX_QUEUED)


def test_large_inputs_do_not_fill_the_memory(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_QUEUED_BYTES", 40)
    for _ in range(4):
        told.end()  # 16 bytes each
    assert told.file.dropped == 2
    told.file.start()
    told.file.close()
    told.end()
    assert told.file.dropped == 2, "what was written makes room"


def test_a_line_that_cannot_be_made_does_not_end_the_trace(told: Told) -> None:
    class Broken:
        def to_dict(self) -> dict[str, Any]:
            raise ValueError("broken")

    told.file.start()
    request = make_request(told.clock)
    told.stories.begin(request)
    told.stories.routed(request, Broken(), [])
    told.stories.ended(request, answer())
    told.end(id="after")
    told.file.close()
    assert [line.get("request", {}).get("id") for line in told.lines()] == [None, "after"]
    assert told.file.status()["unwritten"] == 1
    assert not any(thread.name == "trace-writer" for thread in threading.enumerate())


def test_the_header_knows_the_models(catalog: Catalog) -> None:
    models = trace_header(catalog, [])["models"]
    assert set(models["toy"]) == {"small", "medium", "large"}
    assert models["toy"]["small"]["targets"] == ["edge_mcu"]
