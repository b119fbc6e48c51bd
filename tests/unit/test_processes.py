"""Real processes for tests and demonstrations: what becomes of one that does not get ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.processes import Stage, StartError


def test_a_daemon_that_does_not_get_ready_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import signal\nprint('hangs', flush=True)\nsignal.pause()\n")
    with Stage(tmp_path / "stage") as stage:
        with pytest.raises(StartError, match="no READY=1"):
            stage.daemon({}, module="hangs", environ={"PYTHONPATH": str(tmp_path)}, limit_s=0.2)
        (process,) = stage._processes
        assert not process.alive()


def test_a_stage_that_is_over_starts_nothing_any_more(tmp_path: Path) -> None:
    """A thread that brings something back while everything is being stopped would leave it behind."""
    with Stage(tmp_path / "stage") as stage:
        pass
    with pytest.raises(StartError, match="everything was stopped"):
        stage.start("late", ["sleep", "60"])
    assert stage._processes == []
