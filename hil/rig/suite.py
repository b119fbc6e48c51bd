"""The suite: what is checked, in this order. Each later group takes for granted what the earlier ones showed."""

from __future__ import annotations

from typing import Final

from hil.rig.check import Check
from hil.rig.checks import (
    cable,
    handshake,
    latency,
    liars,
    noise,
    push,
    soak,
    streaming,
    throughput,
    timing,
    trial,
)

SUITE: Final[tuple[Check, ...]] = (
    *handshake.CHECKS,
    *latency.CHECKS,
    *throughput.CHECKS,
    *push.CHECKS,
    *trial.CHECKS,
    *timing.CHECKS,
    *streaming.CHECKS,
    *soak.CHECKS,
    *noise.CHECKS,
    *cable.CHECKS,
    *liars.CHECKS,
)
