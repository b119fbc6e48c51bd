"""`script/chaos`: a whole gateway under a seeded schedule of faults, and a ledger that must balance."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.chaos.callers import Caller, HttpCaller, HttpProducer, MqttProducer, Receiver, Sensor
from hil.chaos.faults import bring_about
from hil.chaos.ledger import BAD, Judge, Ledger, Windows, bad
from hil.chaos.schedule import KINDS, Fault, schedule
from hil.chaos.site import GATEWAY, Site
from hil.processes import Stage, StartError, interruptible
from hil.sim.answers import run_models
from hil.stalls import Stalls

DRAIN_S = 90.0
"""After the last fault everything that was accepted is delivered within this."""
WATCH_S = 0.2
THREADS = 32
"""More than there are parts that can be at fault at once: no fault waits for another's thread."""
HTTP_CALLERS = 3


@dataclass
class Summary:
    """What a run came to."""

    seed: int
    minutes: float
    faults: Counter[str]
    left_out: dict[str, str]
    requests: Counter[str]
    items: Counter[str]
    repeats: int
    worst_stall_ms: float
    trouble: list[str] = field(default_factory=list)

    @property
    def balances(self) -> bool:
        return not self.trouble and bad((self.requests, self.items)) == 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "balances": self.balances}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if the ledger balances."""
    parser = argparse.ArgumentParser(prog="script/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the schedule and of all choices (default: another each time)")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="only faults of this kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and files there")
    parser.add_argument("--list", action="store_true", help="only say which kinds there are")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{kind.name:22} {kind.what}" for kind in KINDS.values()))
        return 0
    if not 0.2 <= args.minutes <= 10_000:
        parser.error("--minutes must be 0.2 to 10000")
    if unknown := sorted(set(args.only) - set(KINDS)):
        parser.error(f"--only: no such kind: {', '.join(unknown)}; --list shows them")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1, 10**6)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="edge-agent-chaos-"))
    try:
        with interruptible():
            summary = asyncio.run(_run(seed, args.minutes, tuple(args.only) or tuple(KINDS), folder))
    except KeyboardInterrupt:
        print("script/chaos: interrupted")
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return 130
    except StartError as error:
        print(f"script/chaos: {error}\nlogs: {folder}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(summary.to_dict(), indent=1, default=dict) + "\n")
    show(summary, print)
    if summary.balances and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    elif not summary.balances:
        only = "".join(f" --only {shlex.quote(kind)}" for kind in args.only)
        print(f"logs: {folder}\nagain: script/chaos --minutes {args.minutes:g} --seed {seed}{only}")
    return 0 if summary.balances else 1


def show(summary: Summary, say: Callable[[str], None]) -> None:
    """The summary, for a person."""
    say(f"\nseed {summary.seed}, {summary.minutes:g} minutes, {sum(summary.faults.values())} faults\n")
    for name, count in sorted(summary.faults.items()):
        say(f"  {count:4}  {name:22} {KINDS[name].what}")
    for name, why in summary.left_out.items():
        say(f"     -  {name:22} left out: {why}")
    for what, counts in (("requests", summary.requests), ("durable items", summary.items)):
        say(f"\n{what}: {sum(counts.values())}")
        for word, count in counts.most_common():
            say(f"  {count:6}  {word}{'   <<<' if word in BAD else ''}")
    say(f"\nrepeats under the same id, which a receiver suppresses: {summary.repeats}")
    say(f"the latest that this machine woke anybody: {summary.worst_stall_ms:.0f} ms")
    for line in summary.trouble:
        say(f"trouble: {line}")
    wrong = ", ".join(f"{word} {summary.requests[word] + summary.items[word]}" for word in BAD)
    say(f"{wrong}: {'the ledger balances' if summary.balances else 'the ledger does NOT balance'}")


async def _run(seed: int, minutes: float, kinds: tuple[str, ...], folder: Path) -> Summary:
    catalog = load_catalog(catalog_path(None))
    samples = run_models(catalog)["digits"]
    inputs = [value.tolist() for value in samples.inputs]
    labels = {variant: [_label(samples, answer) for answer in answers] for variant, answers in samples.outputs.items()}
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    ledger, windows, began = Ledger(), Windows(), time.monotonic()
    stage = Stage(folder)
    site = Site(stage, catalog, windows, seed)
    stalls = Stalls(lambda: site.daemon.pid)
    try:
        with stage:
            try:
                await site.start()
                possible = {name for name in kinds if not KINDS[name].needs or KINDS[name].needs in site.can}
                faults = schedule(seed, minutes * 60, possible)
                print(f"seed {seed}: {len(faults)} faults in {minutes:g} minutes", flush=True)
                stalls.start()
                callers, receiver = await asyncio.to_thread(_callers, site, ledger, inputs, seed)
                await _play(site, faults, minutes * 60)
                await asyncio.to_thread(_finish, site, ledger, callers, receiver)
                stalls.stop()
            finally:
                await site.stop()
            handed_on = site.handed_on()
    finally:
        site.unmount()
    judge = Judge(labels, windows, stalls, began)
    requests = Counter(judge.request(asked) for asked in ledger.asked)
    items = Counter(
        judge.item(name, item, ledger, site.set_aside, handed_on, site.held) for name, item in ledger.kept.items()
    )
    _explain(folder, judge, ledger, site, handed_on)
    left_out = {name: _missing(KINDS[name].needs) for name in kinds if name not in possible}
    done = Counter(fault.kind for fault in faults)
    return Summary(seed, minutes, done, left_out, requests, items, ledger.repeats, 1e3 * stalls.worst(), site.deaths)


def _label(samples: Any, answer: Any) -> str:
    labels: tuple[str, ...] = samples.family.labels
    return labels[int(next(iter(answer.values())).argmax())]


def _callers(site: Site, ledger: Ledger, inputs: list[Any], seed: int) -> tuple[list[Caller], Receiver]:
    ports = site.ports
    receiver = Receiver(ports["local"], GATEWAY, ledger)
    callers: list[Caller] = [
        HttpCaller(f"caller-{number}", ports["http"], 6.0, ledger, inputs, seed) for number in range(HTTP_CALLERS)
    ]
    callers += [
        HttpProducer("press", ports["http"], 4.0, ledger, inputs, seed),
        MqttProducer("scale", receiver, GATEWAY, 3.0, ledger, inputs, seed),
        Sensor(ports["local"], GATEWAY, 5.0, ledger, inputs, seed),
    ]
    for caller in callers:
        caller.start()
    return callers, receiver


async def _play(site: Site, faults: tuple[Fault, ...], seconds: float) -> None:
    """Each fault in a thread of its own, at its time; or when its part is whole again, which takes longer than planned
    on a busy machine."""
    started = time.monotonic()
    running: set[asyncio.Task[None]] = set()
    latest: dict[str, asyncio.Task[None]] = {}
    waiting = list(faults)
    while (now := time.monotonic() - started) < seconds or running:
        while waiting and waiting[0].at_s <= now:
            fault = waiting.pop(0)
            part = KINDS[fault.kind].part
            latest[part] = task = asyncio.create_task(_after(latest.get(part), site, fault), name=fault.kind)
            running.add(task)
        for task in [task for task in running if task.done()]:
            running.remove(task)
            if error := task.exception():
                site.deaths.append(f"{task.get_name()}: {error}")
        await asyncio.to_thread(site.watch)
        await asyncio.sleep(WATCH_S)


async def _after(former: asyncio.Task[None] | None, site: Site, fault: Fault) -> None:
    if former is not None:
        await asyncio.wait([former])
    await asyncio.to_thread(bring_about, site, fault)


def _finish(site: Site, ledger: Ledger, callers: list[Caller], receiver: Receiver) -> None:
    """The traffic ends; what was accepted is waited for."""
    for caller in callers:
        caller.halt()
    for caller in callers:
        caller.join()
    site.wait_for("every tier again", lambda status: all(target["available"] for target in status["targets"]))
    end = time.monotonic() + DRAIN_S
    while time.monotonic() < end:
        with suppress(OSError, ValueError):  # it says nothing at this moment
            if not any(site.status()["outbox"]["rows"].values()) and not ledger.undelivered():
                break
        time.sleep(0.2)
    receiver.close()


def _explain(folder: Path, judge: Judge, ledger: Ledger, site: Site, handed_on: dict[str, float]) -> None:
    """What is wrong, one line each, beside the logs."""
    with (folder / "wrong.jsonl").open("w") as lines:
        for asked in ledger.asked:
            if (word := judge.request(asked)) in BAD:
                took = judge.due(asked) - asked.at - asked.deadline_s
                line = {"what": word, "grace_s": round(took, 3), **vars(asked)}
                lines.write(json.dumps(line, default=str) + "\n")
        for name, item in ledger.kept.items():
            if (word := judge.item(name, item, ledger, site.set_aside, handed_on, site.held)) in BAD:
                answers = [ledger.results[id_] for id_ in item.ids]
                lines.write(
                    json.dumps({"what": word, "item": name, **vars(item), "answers": answers}, default=str) + "\n"
                )


def _missing(need: str) -> str:
    return {
        "tmpfs": "mounting a small file system takes root",
        "compiler": "the library that moves the clock takes a C compiler",
    }[need]


if __name__ == "__main__":
    sys.exit(main())
