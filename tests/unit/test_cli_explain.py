"""`edge-agent explain`: what a person reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_cli_client import Door, door

from agent import cli

__all__ = ["door"]

ESTIMATE = {
    "p50_ms": 5.0,
    "p95_ms": 9.25,
    "measured": True,
    "success": 0.99,
    "accuracy": 0.956,
    "cost_usd": 0.0,
    "bytes": 0,
}
CANDIDATE: dict[str, Any] = {
    "target": "edge_mcu",
    "tier": "edge_mcu",
    "variant": "mcu-int8",
    "estimate": ESTIMATE,
    "in_flight": 0,
    "limit": 4,
    "excluded": None,
    "text": "",
    "at_risk": True,
    "utility": 0.925,
    "terms": {"accuracy": 0.956, "miss": -0.031, "load": 0.0},
}
CLOUD = CANDIDATE | {
    "target": "cloud:eu",
    "variant": "",
    "estimate": ESTIMATE | {"measured": False, "cost_usd": 0.001},
    "excluded": "no_variant",
    "text": "has no variant of this model",
    "at_risk": False,
    "utility": None,
    "terms": {},
}
EXPLANATION: dict[str, Any] = {
    "request_id": "r1",
    "at": 1.0,
    "request": {
        "model": "digits",
        "variant": None,
        "producer": "meter",
        "latency_class": "near",
        "deadline_ms": 100.0,
        "priority": 5,
        "accuracy": "adaptive",
        "allowed_regions": ["eu"],
        "notes": ["inputs.image: 0 to 99; the model was trained on 0 to 16"],
    },
    "stages": [
        {
            "stage": "route",
            "at_ms": 0.4,
            "decision": {
                "policy": "utility",
                "weights": {"accuracy": 1.0, "miss": 0.5},
                "ranked": [{"target": "edge_mcu", "variant": "mcu-int8"}],
                "candidates": [CLOUD, CANDIDATE],
            },
            "attempts": [
                {"target": "edge_mcu", "variant": "mcu-int8", "outcome": "timeout", "elapsed_ms": 50.0, "error": "late"}
            ],
        }
    ],
    "outcome": {
        "status": "refused",
        "code": "unavailable",
        "message": "no target could answer",
        "total_ms": 51.5,
        "cost_usd": 0.0,
    },
    "reasons": ["cloud:eu: not asked: has no variant of this model"],
}
ANSWERED = {
    "status": "stale",
    "label": "7",
    "confidence": 0.93,
    "tier": "edge_mcu",
    "target": "cache",
    "variant": "mcu-int8",
    "deadline_met": False,
    "age_s": 12.5,
    "escalation": "held",
    "total_ms": 1.5,
    "cost_usd": 0.001,
}


def test_a_decision_is_a_table(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.reply = (200, EXPLANATION)
    assert cli.main(["explain", "r1", "--url", door.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "r1: digits of meter, near, 100 ms, priority 5, accuracy adaptive, regions eu",
        "  note: inputs.image: 0 to 99; the model was trained on 0 to 16",
        "",
        "route, 0.4 ms after receipt, policy utility",
        "  weights: accuracy 1, miss 0.5",
        "     target    variant   p50 ms  p95 ms  success  accuracy    USD  bytes  utility  terms",
        "  1  edge_mcu  mcu-int8    5.00    9.25    99.0%     0.956      0      0    0.925  "
        "accuracy +0.956 miss -0.031 (at risk)",
        "  -  cloud:eu  (none)     ~5.00   ~9.25    99.0%     0.956  0.001      0        -  "
        "no_variant: has no variant of this model",
        "  asked  edge_mcu/mcu-int8: timeout after 50 ms: late",
        "",
        "refused: unavailable: no target could answer (after 51.5 ms, 0 USD)",
        "  why    cloud:eu: not asked: has no variant of this model",
    ]


def test_an_answer_from_the_cache_says_that_routing_was_not_asked(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    door.reply = (200, EXPLANATION | {"stages": [], "outcome": ANSWERED, "reasons": []})
    assert cli.main(["explain", "r1", "--url", door.url]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  routing was not asked",
        "",
        "stale: 7, 93.0% sure by edge_mcu (cache), variant mcu-int8, 12.5 s old, held (after 1.5 ms, 0.001 USD, LATE)",
    ]


def test_all_of_it_as_json(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.reply = (200, EXPLANATION)
    assert cli.main(["explain", "r1", "--json", "--url", door.url]) == 0
    assert json.loads(capsys.readouterr().out) == EXPLANATION


def test_a_request_that_is_not_remembered_is_a_line(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.reply = (
        404,
        {"error": {"code": "not_remembered", "message": "request_id: 'x' is not", "field": "request_id"}},
    )
    assert cli.main(["explain", "a b/c", "--url", door.url]) == 1
    assert capsys.readouterr().err == "edge-agent: not_remembered: request_id: 'x' is not\n"
