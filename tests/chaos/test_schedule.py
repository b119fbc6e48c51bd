"""The schedule of faults is a function of its seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from hil.chaos.schedule import CALM_S, KINDS, schedule


def test_equal_seeds_equal_faults() -> None:
    assert schedule(7, 600) == schedule(7, 600)
    assert schedule(7, 600) != schedule(8, 600)


@pytest.mark.parametrize("seed", range(20))
def test_ten_minutes_have_every_kind_and_no_part_twice_at_once(seed: int) -> None:
    faults = schedule(seed, 600)
    assert min(Counter(fault.kind for fault in faults)[name] for name in KINDS) >= 2
    by_part = defaultdict(list)
    for fault in faults:
        by_part[KINDS[fault.kind].part].append(fault)
    for part in by_part.values():
        assert all(before.ends_s < after.at_s for before, after in pairwise(part))
    assert all(fault.at_s >= CALM_S and fault.ends_s <= 600 for fault in faults)
    least = {name: kind.lasts for name, kind in KINDS.items()}
    assert all(least[fault.kind][0] <= fault.lasts_s <= least[fault.kind][1] for fault in faults)


def test_only_some_kinds() -> None:
    assert {fault.kind for fault in schedule(1, 60, ("cloud reset", "board reset"))} == {"cloud reset", "board reset"}
