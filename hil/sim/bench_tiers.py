"""`edge-agent bench tiers`: measures what the simulator draws from."""

from __future__ import annotations

import argparse

from hil.sim import setting, tiers
from hil.sim.setting import say


def _main(args: argparse.Namespace) -> int:
    setting.within("--samples", args.samples, 10, 100_000)
    found = tiers.measure(args.samples)
    say(f"  {'variant':24} {'compute p50':>12} {'p95 ms':>8} {'rest p50':>10} {'p95 ms':>8}")
    for name, times in found.variants.items():
        say(f"  {name:24} {_ms(times.service, 12)} {_ms(times.link, 10)}")
    for name, spread in found.own.items():
        say(f"  {'daemon, ' + name:24} {_ms(spread, 12)}")
    setting.write_json(args.json, found.to_dict())
    return setting.EXIT_OK


def _ms(spread: tiers.Spread, width: int) -> str:
    return f"{spread.at(0.5) * 1e3:{width}.3f} {spread.at(0.95) * 1e3:8.3f}"


main = setting.command("bench tiers", _main)
