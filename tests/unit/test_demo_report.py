"""The demonstration's figures: what is lost, stale or late must show."""

from __future__ import annotations

from typing import Any

from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.demo.ledger import Asked, Ledger
from hil.demo.report import summarise, text
from hil.demo.script import Outage

CATALOG: Catalog = load_catalog(catalog_path(None))
OUTAGES = [Outage("cloud link cut", 10.0, 20.0, 20.0, ("cloud_gpu",))]


def asked(at: float, tier: str = "edge_mcu", label: str = "3", took_s: float = 0.004, **answer: Any) -> Asked:
    whole = {
        "tier": tier,
        "label": label,
        "stale": tier == "fallback",
        "cached": tier == "fallback",
        "deadline_met": True,
        "cost_usd": 0.001 if tier.startswith("cloud") else 0.0,
        "reasons": ["because"],
    }
    return Asked("meter", "digits", "realtime", "3", at, whole | answer, at + took_s, 1)


def test_everything_is_counted_once() -> None:
    rows = [
        asked(1.0),
        asked(2.0, label="4"),
        asked(3.0, "cloud_gpu"),
        asked(12.0, "fallback"),
        Asked("meter", "digits", "realtime", "3", 13.0),
        Asked("meter", "digits", "realtime", "3", 14.0, {"error": {"code": "unavailable"}}, 14.1, 1),
        asked(21.5, "cloud_gpu"),
    ]
    summary = summarise(rows, OUTAGES, CATALOG, started_s=0.0)
    assert (summary["requests"], summary["answered"], summary["refused"], summary["lost"]) == (7, 5, 1, 1)
    assert summary["tiers"] == {"edge_mcu": 2, "edge_gpu": 0, "cloud_gpu": 2, "cloud_serverless": 0, "fallback": 1}
    assert summary["accuracy"]["edge_mcu"]["digits"]["value"] == 0.5
    assert summary["cost_usd"] == 0.002
    outage = summary["outages"][0]
    assert (outage["requests"], outage["lost"], outage["refused"]) == (3, 1, 1)
    assert outage["answered_by"] == {"fallback": 1}
    assert outage["healed_after_s"] == 1.5


def test_a_stale_answer_that_does_not_say_so_is_found() -> None:
    summary = summarise([asked(12.0, "fallback", stale=False)], OUTAGES, CATALOG, 0.0)
    assert (summary["stale"], summary["unlabelled_stale"]) == (1, 1)


def test_an_accuracy_that_cannot_be_chance_is_named() -> None:
    wrong = summarise([asked(1.0, label="4") for _ in range(200)], OUTAGES, CATALOG, 0.0)
    right = summarise([asked(1.0, label="3" if n % 25 else "4") for n in range(200)], OUTAGES, CATALOG, 0.0)
    assert wrong["accuracy"]["edge_mcu"]["digits"]["agrees"] is False
    assert right["accuracy"]["edge_mcu"]["digits"]["agrees"] is True
    lines: list[str] = []
    text(wrong, lines.append)
    assert any("DIFFERS" in line for line in lines)


def test_an_outage_that_does_not_heal_says_so() -> None:
    summary = summarise([asked(12.0, "edge_gpu")], OUTAGES, CATALOG, 0.0)
    assert summary["outages"][0]["healed_after_s"] is None


def test_answers_nobody_waits_for_are_counted() -> None:
    ledger = Ledger()
    ledger.received("nobody-asked", {"label": "3"}, 1.0)
    ledger.sent("a", asked(1.0))
    assert ledger.unexpected == 1
    assert ledger.open() == 0
