"""What a user reads when a file, a folder or a daemon is not there: no number, and exit code 2 for misuse."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent import cli


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as gone:
        if isinstance(gone.code, int):
            code = gone.code
        else:
            return 1, str(gone.code)
    return code, capsys.readouterr().err


def test_a_trace_that_is_not_there_or_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "nosuch.jsonl"
    assert said(capsys, "replay", missing) == (2, f"edge-agent replay: {missing}: no such file\n")
    assert said(capsys, "replay", tmp_path) == (2, f"edge-agent replay: {tmp_path}: is a folder\n")
    for content, why in (
        (b"# Title\n", "line 1: is not JSON, or cut off, at column 1"),
        (b"\xff\x80\xff\n", "line 1: is not text"),
        (b'{"kind": "header", "sch', "line 1: is not JSON, or cut off, at column 20"),
        (b"{}\n", "line 1: has no `kind`, as every line of a trace has"),
        (b'{"kind": "header", "schema": 1}', "line 1: its header has no `models`"),
        (b'{"kind": []}', "line 1: has no `kind`, as every line of a trace has"),
        (b"", "it has no header"),
    ):
        other = tmp_path / "other"
        other.write_bytes(content)
        assert said(capsys, "replay", other) == (2, f"edge-agent replay: {other}: is no trace: {why}\n")
    (tmp_path / "cut.gz").write_bytes(b"no gzip")
    code, text = said(capsys, "replay", tmp_path / "cut.gz")
    assert code == 2 and "is no trace: not whole as a gzip file" in text


def test_a_model_file_needs_its_suffix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("no model")
    code, text = said(capsys, "mcu", "push", path, "--port", "/dev/nosuch")
    assert (code, text) == (2, f"edge-agent mcu: {path}: a model's file must end in .tflite\n")


def test_a_daemon_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert said(capsys, "status", "--url", url) == (1, f"edge-agent: nobody answers at {url}: is the daemon running?")
    assert said(capsys, "status", "--url", "nonsense") == (
        2,
        "edge-agent: --url: must begin with http:// or https://, found nonsense\n",
    )
    token = tmp_path / "token"
    assert said(capsys, "status", "--token-file", token) == (2, f"edge-agent: --token-file: {token}: no such file\n")
    assert said(capsys, "status", "--url", "https://127.0.0.1:1", "--ca-file", token) == (
        2,
        f"edge-agent: --ca-file: {token}: no such file\n",
    )
