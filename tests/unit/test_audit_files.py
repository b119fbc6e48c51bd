"""The files of the audit trail: rotation, restarts, power cuts, and disks that are full or fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent.security.audit_file import AuditFiles, audit_files, read_lines
from agent.security.chain import check


def opened(folder: Path, max_bytes: int = 4096, keep: int = 16) -> AuditFiles:
    files = AuditFiles(folder, max_bytes, keep)
    files.open()
    return files


def verified(folder: Path) -> Any:
    return check((path.name, read_lines(path)) for path in audit_files(folder))


def test_rotation_goes_on_with_the_chain_and_keeps_so_many_files(tmp_path: Path) -> None:
    files = opened(tmp_path, 1000, 3)
    for number in range(50):
        files.append([{"n": number}])
    files.close()
    kept = audit_files(tmp_path)
    assert len(kept) == 3
    assert all(path.stat().st_size <= 1000 for path in kept)
    report = verified(tmp_path)
    assert (report.broken, report.head.seq) == (None, 50)
    assert kept[0].name == f"audit-{report.first:012}.jsonl"
    assert files.deleted > 0
    assert [path.stat().st_mode & 0o777 for path in kept] == [0o600] * 3


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(5):
        files = opened(tmp_path, 300)
        files.append([{"n": number}])
        files.close()
    assert (verified(tmp_path).broken, verified(tmp_path).lines) == (None, 5)


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_line_torn_by_a_power_cut_is_cut_off(tmp_path: Path, cut: int) -> None:
    files = opened(tmp_path)
    files.append([{"n": 1}])
    files.append([{"n": 2}])
    files.close()
    path = audit_files(tmp_path)[-1]
    os.truncate(path, path.stat().st_size - cut)
    files = AuditFiles(tmp_path, 4096, 16)
    assert files.open() > 0
    files.append([{"n": 3}])
    files.close()
    report = verified(tmp_path)
    assert (report.broken, report.lines) == (None, 2)


@pytest.mark.parametrize("lines", [0, 3])
def test_a_torn_line_may_be_all_that_a_new_file_has(tmp_path: Path, lines: int) -> None:
    files = opened(tmp_path)
    if lines:
        files.append([{"n": number} for number in range(lines)])
    files.close()
    (tmp_path / f"audit-{lines + 1:012}.jsonl").write_bytes(b'{"seq":')
    files = AuditFiles(tmp_path, 4096, 16)
    assert files.open() == 7
    files.append([{"n": 9}])
    files.close()
    assert (verified(tmp_path).broken, verified(tmp_path).lines) == (None, lines + 1)


def test_two_daemons_do_not_write_to_one_trail(tmp_path: Path) -> None:
    files = opened(tmp_path)
    with pytest.raises(OSError, match="another daemon"):
        AuditFiles(tmp_path, 4096, 16).open()
    files.close()


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """/dev/full takes nothing, as a full disk does not."""
    files = opened(tmp_path)
    files.append([{"n": 1}])
    os.dup2(os.open("/dev/full", os.O_WRONLY), files._fd)
    with pytest.raises(OSError, match="No space"):
        files.append([{"n": 2}])
    assert files.head.seq == 1


class FullDisk:
    """Takes a part, then nothing more."""

    def __init__(self, room: int) -> None:
        self._room, self._write = room, os.write

    def __call__(self, fd: int, data: Any) -> int:
        if not self._room:
            raise OSError(28, "No space left on device")
        room, self._room = self._room, 0
        return self._write(fd, bytes(data)[:room])


def test_a_batch_written_in_part_is_cut_off_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path)
    files.append([{"n": 1}])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(20))
        with pytest.raises(OSError, match="No space"):
            files.append([{"n": 2}])
    files.append([{"n": 3}])
    files.close()
    assert (verified(tmp_path).broken, verified(tmp_path).lines) == (None, 2)


def test_it_goes_on_when_there_is_room_again_for_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, entry = opened(tmp_path, max_bytes=2000), {"what": "x" * 200}
    files.append([entry])
    begin = os.open

    def no_room(path: Any, *given: Any, **named: Any) -> int:
        if "audit-" in str(path):
            raise OSError(28, "No space left on device")
        return begin(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(10))
        with pytest.raises(OSError, match="No space"):
            files.append([entry])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_room)
        with pytest.raises(OSError, match="No space"):
            files.append([entry] * 6)
    files.append([entry])
    files.close()
    assert (verified(tmp_path).broken, verified(tmp_path).lines) == (None, 2)


def test_a_file_that_cannot_be_read_costs_no_descriptor_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opened(tmp_path)
    files.append([{"n": 1}])
    files.close()

    def bad(*given: Any) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", bad)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with pytest.raises(OSError, match="Input/output"):
                files.open()
        assert len(os.listdir("/proc/self/fd")) < before + 4
    files.open()
    files.append([{"n": 2}])
    files.close()
    assert verified(tmp_path).lines == 2
