"""The ledger of `script/powerloss`: what it must not take for a kill, and what becomes of it when it is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hil.powerloss import main as powerloss


def test_a_child_that_ends_by_itself_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the child is broken")

    monkeypatch.setattr(powerloss, "run", broken)
    ledger = powerloss.Ledger(acknowledged={1}, delivered={1: [1]})
    assert ledger.balances
    powerloss._life(tmp_path, ledger, iter(range(1, 9)), lambda step: None, 0.01)
    assert not ledger.balances
    assert "ended without a kill: child 0: code 1" in ledger.summary()


def test_where_nothing_was_acknowledged_nothing_balances() -> None:
    assert not powerloss.Ledger(kills=200).balances


def test_an_interrupt_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(powerloss, "powerloss", interrupted)
    assert powerloss.main(["--folder", str(tmp_path)]) == 130
    assert capsys.readouterr().out == "script/powerloss: interrupted\n"
    assert list(tmp_path.iterdir()) == []
