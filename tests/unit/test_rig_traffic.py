"""The rig's calls: an answer that was meant for another one must not pass for right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.rig import main as rig
from hil.rig.traffic import TOLERANCE, Samples, off_by


@pytest.mark.parametrize("family", ["digits", "motion"])
def test_no_answer_is_right_of_two_samples(family: str) -> None:
    expected = Samples.of(load_catalog(catalog_path(None)), family).expected
    assert len(expected) > 4
    near = [(a, b) for a in range(len(expected)) for b in range(a) if off_by(expected[a], expected[b]) <= 2 * TOLERANCE]
    assert near == []


def test_an_interrupted_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(rig, "_conduct", interrupted)
    assert rig.main(["--board", "virtual"]) == rig.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().out == "script/hil: interrupted\n"


def test_an_interrupted_chaos_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hil.chaos import main as chaos

    async def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chaos, "_run", interrupted)
    monkeypatch.setattr(chaos.tempfile, "tempdir", str(tmp_path))
    assert chaos.main([]) == 130
    assert list(tmp_path.iterdir()) == []
