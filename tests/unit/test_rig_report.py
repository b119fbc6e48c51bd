"""Checks that end in every way there is, and how the report tells it."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import Any

import pytest

from agent.core.errors import LinkError
from hil.rig.check import Check, Failed, Figure, Findings, Outcome, Skip, Verdict, check, require
from hil.rig.main import main
from hil.rig.protocols import RigError
from hil.rig.report import Printer, Report, head, summary
from hil.rig.runner import chosen, run, skipped
from hil.rig.suite import SUITE


def ending(name: str, error: Exception | None, **figure: Any) -> Check:
    async def body(rig: Any, findings: Findings) -> None:
        findings.lines.append("bit_errors=0.0001 direction=both seed=7")
        if figure:
            findings.figure("speed", **figure)
        if error is not None:
            raise error

    return check("group", name, "It goes well.", needs_board=False)(body)


ENDINGS = (
    (ending("well", None, value=96, unit="%", least=95), Verdict.PASSED),
    (ending("too slow", None, value=94, unit="%", least=95), Verdict.FAILED),
    (ending("failed", Failed("it was \x00 green")), Verdict.FAILED),
    (ending("lost", LinkError("unplugged")), Verdict.FAILED),
    (ending("late", TimeoutError("no answer")), Verdict.FAILED),
    (ending("not here", Skip("no engine")), Verdict.SKIPPED),
    (ending("rig", RigError("no relay")), Verdict.ERROR),
    (ending("defect", KeyError("x")), Verdict.ERROR),
)


@pytest.fixture
def report() -> Report:
    rig: Any = SimpleNamespace(soak_s=0.0, driver=SimpleNamespace(console=None))
    report = Report("desk", "a board", 7, 0.0)
    report.outcomes = asyncio.run(run(rig, [check for check, _ in ENDINGS]))
    return report


def test_each_ending_has_its_verdict(report: Report) -> None:
    assert [outcome.verdict for outcome in report.outcomes] == [verdict for _, verdict in ENDINGS]
    assert report.outcomes[1].reason == "speed 94 %, expected at least 95"
    assert not report.ok


def test_text_says_what_was_expected_found_and_how_to_repeat_it(report: Report) -> None:
    lines: list[str] = []
    head(report, len(report.outcomes), lines.append)
    printer = Printer(report, lines.append)
    for outcome in report.outcomes:
        printer.show(outcome)
    summary(report, 39, lines.append)
    text = "\n".join(lines)
    assert "expected: It goes well." in text and "[at least 95]" in text
    assert "FOUND: speed 94 %, expected at least 95" in text
    assert "again: script/hil --board desk --seed 7 --only 'group/too slow'" in text
    assert "not checked (1): no engine" in text and "line: bit_errors=0.0001 direction=both seed=7" in text
    assert text.endswith("It does not hold up.") and max(map(len, lines)) <= 120


def test_json_and_junit_hold_the_same(report: Report) -> None:
    document = json.loads(json.dumps(report.to_dict()))
    assert document["counts"] == {"passed": 1, "failed": 4, "skipped": 1, "error": 2} and document["ok"] is False
    assert document["checks"][0]["figures"] == [{"name": "speed", "value": 96.0, "unit": "%", "least": 95}]
    suite = ET.fromstring(report.to_junit().split("\n", 1)[1]).find("testsuite")
    assert suite is not None
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["8", "4", "2", "1"]
    assert len(suite.findall("testcase/failure")) == 4 and len(suite.findall("testcase/error")) == 2


def test_a_run_without_faults_is_well() -> None:
    report = Report("desk", "", 1, 0.0, skipped([ENDINGS[0][0]], "no such port"))
    lines: list[str] = []
    summary(report, 39, lines.append)
    assert report.ok and "not checked (1): no such port" in lines[-1]


def test_a_part_of_the_checks_says_what_part() -> None:
    outcome = Outcome(ENDINGS[0][0], Verdict.PASSED, 0.1)
    for of, verdict in ((39, "1 of 39 checks: what was checked holds up."), (1, "The board, its line and the gateway")):
        lines: list[str] = []
        summary(Report("desk", "", 1, 0.0, [outcome]), of, lines.append)
        assert lines[-1].startswith(verdict)


def test_figures_have_limits_of_either_kind() -> None:
    assert Figure("a", 1.0, least=1).met and not Figure("a", 0.9, least=1).met
    assert Figure("a", 1.0, most=1).met and not Figure("a", 1.1, most=1).met
    with pytest.raises(Failed, match="so"):
        require(0, "so")


def test_checks_are_chosen_by_group_name_and_pattern() -> None:
    assert chosen(SUITE, []) == list(SUITE)
    assert {check.group for check in chosen(SUITE, ["push"])} == {"push"}
    assert [check.name for check in chosen(SUITE, ["faults/bit errors"])] == ["bit errors"]
    assert len(chosen(SUITE, ["handshake/r*"])) == 2
    assert len({check.key for check in SUITE}) == len(SUITE)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--board", "toaster"], "no board 'toaster'"),
        (["--board", "virtual", "--only", "nothing"], "no check matches nothing"),
        (["--board", "virtual", "--json", "/nowhere/at/all.json"], "folder does not exist"),
        (["--board", "virtual", "--config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_the_list_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--board", "virtual", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(check.key in said for check in SUITE)
