"""A full window all the time, over a line of the configured rate, beside what the line can carry: bytes x 10 / baud."""

from __future__ import annotations

from agent.link.session import Session
from agent.wire.messages import MODEL_ID_BYTES
from hil.rig.check import Findings, check, require
from hil.rig.rig import Rig
from hil.rig.traffic import Caller, drive

TRIES = 6
"""The best counts: a busy machine makes a line slower than it is, never faster."""
LEAST = 90.0
SECONDS = 2.0
BITS = 10
INFER_HEAD = MODEL_ID_BYTES + 4


async def _pipelined(rig: Rig, findings: Findings, family: str, least: float | None) -> None:
    """Keeps the window full; writes down the best of `TRIES`."""
    used = 0.0
    with rig.full_speed(findings) as port:
        async with rig.session(port) as session:
            call = Caller(session, rig.samples(family), rig.seed)
            for _ in range(TRIES):
                found = Findings(notes=[f"{session.hello.board}: window {session.window}"])
                now = await _measured(session, call, rig.driver.serial.baud, found, least)
                if now > used:
                    used, findings.figures, findings.notes = now, found.figures, found.notes
                if least is None or not found.missed():
                    return


async def _measured(session: Session, call: Caller, baud: int, findings: Findings, least: float | None) -> float:
    """Returns the share of the line's rate, per cent."""
    out, back = session.counters.bytes_sent, session.counters.bytes_received
    tally = await drive(call, lanes=call.lanes, deadline_s=5, seconds=SECONDS)
    require(tally.right == tally.total, f"on a clean line: {tally.text()}; {'; '.join(call.wrongs[:3])}")
    out, back = session.counters.bytes_sent - out, session.counters.bytes_received - back
    # Both directions carry at once: the longer one sets the pace.
    longer = max(out, back) / tally.total
    floor_s = longer * BITS / baud
    used = 100 * floor_s * tally.total / tally.seconds
    payload = 100 * call.payload / longer
    findings.figure(f"{call.what}, {call.lanes} at once", tally.rate, "per second")
    findings.figure("floor of one call", floor_s * 1e3, "ms", note=f"{longer:.0f} bytes x {BITS} / {baud}")
    findings.figure("one call took", tally.seconds / tally.total * 1e3, "ms")
    findings.figure("share of the line's rate", used, "%", least=least)
    # Of a small call most is frame: there, only the line's rate can be asked for.
    findings.figure(
        "goodput", used * payload / 100, "%", least=least if payload > LEAST else None, note="without frames and heads"
    )
    if call.infers:
        frame = out / tally.total - call.payload - INFER_HEAD
        note = f"beside {INFER_HEAD} B of INFER (model, deadline) and {call.payload} B of tensors"
        findings.figure("overhead of a frame", frame, "B", note=note)
    return used


@check(
    "throughput", "pipelined", "Calls of 600 bytes, as many as the window takes, fill 90 % of the line.", model="motion"
)
async def pipelined(rig: Rig, findings: Findings) -> None:
    await _pipelined(rig, findings, "motion", LEAST)


@check(
    "throughput", "small", "Calls of 64 bytes are all answered rightly at the full rate; how far they fill the line."
)
async def small(rig: Rig, findings: Findings) -> None:
    await _pipelined(rig, findings, "digits", None)


CHECKS = (pipelined, small)
