"""The page of the proof says what its JSON says, and what must hold is judged as it is said to be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hil.sim import judge, page, validate
from hil.sim.figures import Figures
from hil.sim.hindsight import ORACLE
from hil.sim.strategies import BASELINES, OURS
from hil.sim.workloads import CALM, DISTURBED, RECORDED

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = Figures(1000, 0, 0.99, 0.98, 0.99, 0.0, 0.9, 5.0, 2.0, 9.0, 20.0, 0.1, 1000, 0.97, 0.01)
CLOUD = replace(FIGURES, p50_ms=45.0, mean_ms=48.0, p95_ms=70.0, cost_usd=0.4, edge=0.0, accuracy=0.995)
NEAR = replace(FIGURES, p95_ms=60.0)


def test_the_figures_of_the_page_are_those_of_its_json() -> None:
    document = json.loads((DOCS / "routing-proof.json").read_text())
    assert page.render(document) in (DOCS / "routing-proof.md").read_text()


def test_the_figures_of_the_simulators_page_are_those_of_its_json() -> None:
    document = json.loads((DOCS / "simulator-check.json").read_text())
    assert validate.render(document) in (DOCS / "simulator.md").read_text()


def test_every_strategy_was_played_on_every_workload() -> None:
    document = json.loads((DOCS / "routing-proof.json").read_text())
    assert list(document["workloads"]) == [*CALM, DISTURBED, RECORDED]
    names = {strategy.name for strategy in (*BASELINES, OURS, ORACLE)}
    requests = set()
    for workload in document["workloads"].values():
        assert set(workload["strategies"]) == names
        asked = {row["requests"] for row in workload["strategies"].values()}
        assert len(asked) == 1
        requests |= asked
    assert min(requests) > 1000


def test_pictures_of_the_page_are_there() -> None:
    text = (DOCS / "routing-proof.md").read_text()
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures
    assert [name for name in pictures if not (DOCS / name).exists()] == []


def test_writing_a_page_keeps_what_is_around_the_figures(tmp_path: Path) -> None:
    document = json.loads((DOCS / "routing-proof.json").read_text())
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.write(path, document)
        text = path.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert page.render(document) in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        page.write(path, document)


def test_good_figures_pass() -> None:
    assert [one.what for one in judge.routing(FIGURES, NEAR, CLOUD) if not one.met] == []


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"close": 0.95}, "routing accuracy"),
        ({"fallback": 0.05}, "fallback rate"),
        ({"cost_usd": 10.0}, "cost of an inference"),
        ({"edge": 0.70}, "edge utilisation"),
        ({"cost_usd": 0.13}, "cloud cost"),
        ({"p50_ms": 9.1}, "median latency"),
        ({"accuracy": 0.984}, "accuracy behind"),
    ],
)
def test_a_figure_that_is_not_good_enough_is_a_miss(changes: dict[str, float], missed: str) -> None:
    verdicts = judge.routing(replace(FIGURES, **changes), NEAR, CLOUD)  # type: ignore[arg-type]
    assert any(one.what.startswith(missed) for one in verdicts if not one.met)


def test_a_slow_near_class_is_a_miss() -> None:
    verdicts = judge.routing(FIGURES, replace(NEAR, p95_ms=100.0), CLOUD)
    assert [one.what for one in verdicts if not one.met] == ["p95 of the near class"]
    assert judge.missed({"a": verdicts, "b": verdicts}) == 2
    assert any("MISS" in line for line in judge.lines("a", verdicts))


def test_several_seeds_are_judged_by_their_mean() -> None:
    seeds = [judge.routing(replace(FIGURES, close=close), NEAR, CLOUD) for close in (0.93, 0.98, 0.97)]
    (first, *_) = judge.over_seeds(seeds)
    assert (first.met, first.seeds) == (True, (0.93, 0.98, 0.97))
    assert first.text == "96.00% (93.00% to 98.00% over 3 seeds), must be above 95%"
    (low, *_) = judge.over_seeds([seeds[0], seeds[0], seeds[1]])
    assert not low.met
