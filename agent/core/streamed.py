"""What a board's own sensor gave: the board's answer, and perhaps what it was computed from."""

from __future__ import annotations

from typing import NamedTuple

from agent.core.types import Tensors


class Streamed(NamedTuple):
    """One sample. Tensors are canonical; times are monotonic seconds of this machine.

    `taken_at` is when it was sampled, to within `bound_s`; None while the board's clock is not known. `seq` and
    `skipped` are the board's (docs/wire-protocol.md), `lost` is what the line lost since the stream began.
    """

    stream: str
    variant: str
    model_sha256: str
    provider: str
    outputs: Tensors
    inputs: Tensors | None
    taken_at: float | None
    bound_s: float
    received_at: float
    compute_s: float
    seq: int
    skipped: int
    lost: int
