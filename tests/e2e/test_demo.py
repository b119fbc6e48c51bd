"""The demonstration keeps its promises: the README's first command, short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_all_tiers_answer_every_outage_is_survived_and_nothing_is_lost(tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "demo", "--seconds", "20", "--json", str(report), "--http-port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(report.read_text())
    assert summary["requests"] > 500
    assert summary["lost"] == summary["unlabelled_stale"] == summary["answered_twice"] == 0
    assert all(count > 0 for count in summary["tiers"].values()), summary["tiers"]
    assert summary["answered"] + summary["refused"] == summary["requests"]
    for tier, families in summary["accuracy"].items():
        for family, figure in families.items():
            assert figure.get("agrees", True), (tier, family, figure)
    cascade = summary["cascade"]
    assert cascade["fresh"] > 30
    assert cascade["accuracy"] > 0.9
    cut, hung, away = summary["outages"]
    for outage in (cut, hung, away):
        assert outage["lost"] == 0
        assert outage["healed_after_s"] is not None, outage
    assert "edge_gpu" in cut["answered_by"]
    assert hung["answered_by"].get("edge_gpu", 0) <= 5, "at most what was being answered when it was stopped"
    assert "edge_mcu" in hung["answered_by"]
    assert away["answered_by"]["fallback"] > 0.9 * away["requests"]
    assert set(summary["latency_ms"]) == {"realtime", "near", "interactive", "batch"}
