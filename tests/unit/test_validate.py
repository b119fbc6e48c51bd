"""How the simulator is held against the daemon: the arithmetic, not the measurement."""

import pytest

from hil.sim import validate
from hil.sim.load import STANDARD, Ask
from hil.sim.validate import Pair

METER, ARCHIVE = STANDARD[0], STANDARD[-1]


def side(*answers: tuple[float, str]) -> list[tuple[Ask, float, str]]:
    return [(Ask(number, float(number), METER, 0, 0), took, tier) for number, (took, tier) in enumerate(answers)]


def test_means_and_quantiles_of_both_sides() -> None:
    predicted = side((1.0, "edge_gpu"), (2.0, "edge_gpu"), (3.0, "cloud_gpu"))
    measured = side((2.0, "edge_gpu"), (2.0, "edge_mcu"), (5.0, "edge_gpu"))
    found = {pair.what: (pair.predicted, pair.measured) for pair in validate.compared(predicted, measured)}
    assert found == {
        "all, mean ms": (2.0, 3.0),
        "all, p95 ms": (3.0, 5.0),
        "realtime, mean ms": (2.0, 3.0),
        "realtime, p95 ms": (3.0, 5.0),
        "answered by the edge, %": (pytest.approx(200 / 3), 100.0),
    }


def run(mean: tuple[float, float], p95: tuple[float, float]) -> list[Pair]:
    return [Pair("all, mean ms", *mean), Pair("all, p95 ms", *p95)]


def test_the_median_of_the_errors_is_judged() -> None:
    runs = [run((9.5, 10.0), (50.0, 50.0)), run((100.0, 1.0), (1.0, 100.0)), run((9.4, 10.0), (49.0, 50.0))]
    verdicts = validate.judged(runs)
    assert [one.met for one in verdicts] == [True, True, True]
    assert verdicts[0].figure == pytest.approx(6.0)


def test_runs_that_were_all_wrong_do_not_make_up_for_each_other() -> None:
    runs = [run(sides, sides) for sides in ((1.0, 2.0), (2.0, 4.0), (4.0, 1.0))]
    assert [one.met for one in validate.judged(runs)] == [False, False, False]


def test_an_error_over_the_limit_is_a_miss() -> None:
    verdicts = validate.judged([run((8.0, 10.0), (50.0, 50.0))])
    assert [one.met for one in verdicts] == [False, True, True]
    verdicts = validate.judged([run((8.0, 10.0), (60.0, 50.0))])
    assert [one.met for one in verdicts] == [False, False, False]


def test_the_load_pauses_while_the_other_daemon_is_measured() -> None:
    moments = [0.0, 1.0, validate.TURN_S - 0.01, validate.TURN_S, 2.5 * validate.TURN_S]
    assert [validate.in_turns(at_s) for at_s in moments] == [
        0.0,
        1.0,
        validate.TURN_S - 0.01,
        2 * validate.TURN_S,
        4.5 * validate.TURN_S,
    ]
