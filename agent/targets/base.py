"""What routing knows of a tier. Adding a tier is one file here and one line in `app.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from agent.core.component import Reading
from agent.core.types import InferenceRequest, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a target can be asked now, and if not, why."""

    available: bool
    reason: str = ""


AVAILABLE = Availability(True)


@dataclass(frozen=True, slots=True)
class TargetTraits:
    """What does not change while the daemon runs.

    `max_bytes` is the largest model file the target takes; `timeout_s` bounds any single attempt; `cost_usd` is the
    price of one request; `order` is its place in the fallback chain (lower is asked earlier); `parallel` is how many
    requests it computes at once, `prior_s` what an attempt is taken to cost until one was measured, of which
    `prior_link_s` for the way there and back; `bytes_per_s` is what the way carries (infinite: nothing is sent), and
    `overhead_bytes` what is sent besides tensors; `metered` says that the gateway's owner pays by what is sent.
    """

    name: str
    tier: Tier
    order: int
    max_concurrent: int
    timeout_s: float
    max_bytes: float
    cost_usd: float = 0.0
    region: str | None = None
    backup: bool = False
    parallel: int = 1
    prior_s: float = 0.005
    prior_link_s: float = 0.0
    bytes_per_s: float = inf
    overhead_bytes: int = 0
    metered: bool = False
    link: str = ""
    """What it is reached over, where others may be too: the broker of a lane."""


class Target(Protocol):
    """One place that can answer. Counting what is in flight is routing's work, not the target's."""

    @property
    def traits(self) -> TargetTraits: ...

    def availability(self) -> Availability:
        """Cheap and current: called for every request."""
        ...

    def alive(self) -> bool:
        """Whether the target's own background work still runs; False is a defect, and keeps the watchdog from being
        fed. A target that has none says True."""
        ...

    def parts(self) -> Mapping[str, Reading]:
        """What else of it has a state of its own: links, boards, streams, processes; by names that do not change."""
        ...

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        """The variant this target would run now, or None if it cannot answer for this family."""
        ...

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        """Every variant this target could run now; none if it cannot answer for this family."""
        ...

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        """One attempt, finished by `deadline` (monotonic seconds). Outputs are canonical.

        Raises `TargetError` and nothing else; may be cancelled, and then leaves nothing behind.
        """
        ...

    async def start(self) -> None:
        """Begin to connect or load. Returns soon; availability tells when it is of use."""
        ...

    async def stop(self) -> None:
        """Release everything. Called once, after the last `infer` has returned."""
        ...

    def status(self) -> Mapping[str, Any]:
        """For `/status`: plain JSON types, no secrets."""
        ...
