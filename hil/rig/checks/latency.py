"""One exchange at a time, on the shortest line that there is."""

from __future__ import annotations

from agent.link.session import PING_OVERHEAD
from agent.wire.codes import Capability
from agent.wire.frame import line_bytes
from hil.rig.check import Findings, Skip, check, require
from hil.rig.rig import Rig
from hil.rig.traffic import Caller, drive

ROUNDS = 300
PING_SIZES = (0, 64, 1024)
QUANTILES = ((0.5, "median"), (0.9, "p90"), (0.99, "p99"), (1.0, "max"))
P99_LIMIT_MS = 100.0
"""Besides its bytes on the line. A PING is answered between two inferences: above this the board was busy elsewhere."""


@check(
    "latency",
    "ping",
    "PING of several sizes: 99 of 100 come back within 100 ms and what a line of that rate takes.",
    model=None,
)
async def ping(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        for size in (size for size in PING_SIZES if size + PING_OVERHEAD <= session.hello.max_frame):
            data = bytes(i * 7 % 251 for i in range(size))
            times = [(await session.ping(data, rig.soon(5))).round_trip_s for _ in range(ROUNDS)]
            floor_ms = (line_bytes(size) + line_bytes(size + 16)) * 10 / rig.driver.serial.baud * 1e3
            _distribution(findings, f"PING {size} B", times, limit_ms=P99_LIMIT_MS + floor_ms)
            if rig.driver.serial.paced:
                findings.figure(f"PING {size} B: floor of the wire", floor_ms, "ms")


@check("latency", "infer", "INFER one at a time: every answer right; how long they take, and the model's part of it.")
async def infer(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        if not session.hello.capabilities & Capability.ENGINE:
            raise Skip(f"the board has no engine ({session.hello.engine})")
        call = Caller(session, rig.samples(), rig.seed)
        tally = await drive(call, lanes=1, deadline_s=5, count=ROUNDS)
        require(tally.right == tally.total, f"{tally.text()}: {'; '.join(call.wrongs[:3])}")
        _distribution(findings, f"INFER {call.payload} B", tally.took_s)
        compute = sorted(call.compute_us)
        findings.figure("the model alone: median", compute[len(compute) // 2] / 1e3, "ms", note="as the board says")


def _distribution(findings: Findings, what: str, times_s: list[float], limit_ms: float | None = None) -> None:
    ordered = sorted(times_s)
    for share, name in QUANTILES:
        value = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        findings.figure(f"{what}: {name}", value * 1e3, "ms", most=limit_ms if name == "p99" else None)


CHECKS = (ping, infer)
