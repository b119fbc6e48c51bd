"""A thread whose work raises goes on."""

from __future__ import annotations

import threading

import pytest

from agent.core.lasting import lasting_thread

SOON_S = 20.0


def test_it_goes_on_after_a_failure_and_ends_when_its_work_does(caplog: pytest.LogCaptureFixture) -> None:
    lives: list[int] = []

    def work() -> None:
        lives.append(len(lives))
        if len(lives) < 3:
            raise OSError(22, "Invalid argument")

    thread = lasting_thread("a store", work, again_s=0.0)
    thread.join(SOON_S)
    assert not thread.is_alive() and lives == [0, 1, 2]
    failures = [record for record in caplog.records if record.message == "thread failed"]
    assert [vars(record)["component"] for record in failures] == ["a store"] * 2
    assert failures[0].exc_info is not None


def test_it_does_not_keep_the_process() -> None:
    release = threading.Event()
    thread = lasting_thread("idle", lambda: (release.wait(), None)[1])
    assert thread.daemon
    release.set()
    thread.join(SOON_S)
    assert not thread.is_alive()
