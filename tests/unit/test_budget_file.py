"""The budget's file: on disk before it is used, refused when damaged, silent about nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.routing.budget import Budget, Terms
from agent.routing.meter import Allowance, nano_usd
from agent.store.budget_file import BudgetFile
from tests.brokers import until

LANE = "cloud:eu"
LIMITS = [Allowance("", "usd", "day", nano_usd(1.0)), Allowance("", "requests", "hour", 1000)]
COST_USD = 0.001
ROOT = Path(__file__).resolve().parents[2]


class House:
    """A budget and its file, as the daemon puts them together."""

    def __init__(self, folder: Path, boot: str = "boot-1") -> None:
        (folder / "boot_id").write_text(f"{boot}\n")
        self.file = BudgetFile(folder / "state" / "budgets.json", folder / "boot_id")
        self.budget = Budget(LIMITS, {LANE: COST_USD}, Terms(burst=1), self.file)

    def open(self, now: float = 100.0) -> House:
        self.file.open(self.budget, now, 1e9)
        self.budget.keep(now, 1e9)
        return self

    async def granted(self, now: float = 100.0) -> House:
        self.open(now)
        await until(lambda: not self.budget.objection(LANE, COST_USD, 0, 5, now), what="the file")
        return self

    def used(self, now: float = 100.0) -> float:
        return float(self.budget.left(now)[0]["used"])

    def close(self, now: float = 100.0) -> None:
        self.file.close(self.budget.document(now))


async def test_what_was_used_survives_an_orderly_stop_exactly(tmp_path: Path) -> None:
    first = await House(tmp_path).granted()
    for _ in range(7):
        first.budget.spend(LANE, COST_USD, 0, 100.0)
    first.close()
    again = House(tmp_path).open(101.0)
    assert again.used(101.0) == 0.007
    assert again.file.alarm == ""
    again.close()


async def test_another_start_of_the_machine_is_seen(tmp_path: Path) -> None:
    first = await House(tmp_path).granted()
    first.budget.spend(LANE, COST_USD, 0, 100.0)
    first.close()
    again = House(tmp_path, "boot-2").open(30.0)
    assert again.used(30.0) == 0.001
    again.close()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data.replace(b'"ahead":', b'"aheax":')


def other_number(data: bytes) -> bytes:
    return data.replace(b'"at_ms":', b'"at_ms":1', 1)


@pytest.mark.parametrize(
    "damage",
    [cut, flipped, other_number, lambda _: b"", lambda _: b"[1]", lambda _: b"\xff\x00", lambda _: b"[" * 99999],
)
async def test_a_damaged_file_is_set_aside_and_everything_counts_as_used(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    (await House(tmp_path).granted()).close()
    path = tmp_path / "state" / "budgets.json"
    path.write_bytes(damage(path.read_bytes()))
    again = House(tmp_path).open()
    assert again.used() == 1.0
    assert "everything counts as used" in again.file.alarm
    assert "damaged" in again.file.alarm
    assert len(list(path.parent.glob("budgets.json.damaged-*"))) == 1
    assert again.budget.objection(LANE, COST_USD, 0, 10, 100.0)
    again.close()
    third = House(tmp_path).open()
    assert (third.used(), third.file.alarm) == (1.0, ""), "it stays used"
    third.close()


async def test_two_daemons_do_not_spend_the_same_budget(tmp_path: Path) -> None:
    first = await House(tmp_path).granted()
    second = House(tmp_path).open()
    assert "in use by another daemon" in second.file.alarm
    assert second.budget.objection(LANE, COST_USD, 0, 10, 100.0)
    await until(lambda: second.budget.problem, what="the file")
    second.close()
    first.close()
    assert House(tmp_path).open().used() == 0.0, "what the second one thought is not in the file"


async def test_while_it_cannot_be_written_nothing_is_granted_and_then_it_is_again(tmp_path: Path) -> None:
    in_the_way = tmp_path / "state" / "budgets.new"
    in_the_way.mkdir(parents=True)
    house = House(tmp_path).open()
    await until(lambda: house.budget.problem, what="the file")
    assert "Is a directory" in house.budget.problem
    assert "cannot be recorded" in house.budget.objection(LANE, COST_USD, 0, 10, 100.0)
    in_the_way.rmdir()
    house.budget.keep(105.0, 1e9)
    assert house.budget.problem, "it is not tried again at once"
    house.budget.keep(111.0, 1e9)
    await until(lambda: not house.budget.problem, what="the file")
    assert not house.budget.objection(LANE, COST_USD, 0, 5, 111.0)
    house.close()


async def test_what_never_opened_the_file_does_not_write_over_it(tmp_path: Path) -> None:
    first = await House(tmp_path).granted()
    first.budget.spend(LANE, COST_USD, 0, 100.0)
    first.close()
    before = (tmp_path / "state" / "budgets.json").read_bytes()
    House(tmp_path).close()
    assert (tmp_path / "state" / "budgets.json").read_bytes() == before


async def test_a_day_of_steady_use_writes_seldom(tmp_path: Path) -> None:
    house = await House(tmp_path).granted(0.0)
    for minute in range(0, 1440, 2):
        now = minute * 60.0
        house.budget.keep(now, 1e9 + now)
        await until(lambda now=now: not house.budget.objection(LANE, COST_USD, 0, 5, now), what="the file")
        house.budget.spend(LANE, COST_USD, 0, now)
    assert 30 < house.file.writes < 150
    house.close(86_400.0)


SPENDER = """
import asyncio, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_budget_file import LANE, COST_USD, House

async def main():
    house = House(Path({folder!r})).open(time.monotonic())
    while True:
        now = time.monotonic()
        objection = house.budget.objection(LANE, COST_USD, 0, 5, now)
        if not objection:
            print("spent", flush=True)
            house.budget.spend(LANE, COST_USD, 0, now)
        elif "0 requests left" in objection:
            print("stopped", flush=True)
            return
        await asyncio.sleep(0)

asyncio.run(main())
"""


def test_processes_that_are_killed_never_spend_more_than_the_limit_together(tmp_path: Path) -> None:
    """Real processes, real SIGKILL: what they said they spent."""
    script = SPENDER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    spent = 0
    for lines_before_the_kill in (1, 40, 200, 5, 10_000):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None
        said = [line for _, line in zip(range(lines_before_the_kill), process.stdout, strict=False)]
        process.kill()
        said += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        spent += said.count("spent\n")
    assert said[-1] == "stopped\n"
    assert 600 <= spent <= 1000
