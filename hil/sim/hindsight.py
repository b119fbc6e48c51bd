"""What the best play would have been: the oracle, who knows every play's real time and whether it is right.

It weighs what happened by the same utility function as the policy (`routing.utility`), with lateness, success and
accuracy 0 or 1 instead of expectations. The term for load is left out: it stands for what a play does to others later,
and of that nothing is left once they too are judged by what happened to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agent.config import Config, RoutingSection, UtilityWeights
from agent.core.types import InferenceRequest, LatencyClass
from agent.registry.catalog import Family, Variant
from agent.routing.decision import Decision, Play
from agent.routing.router import Among, Router
from agent.routing.utility import utility
from agent.routing.walk import Variants
from agent.targets.base import Target
from hil.sim.strategies import Strategy

if TYPE_CHECKING:
    from hil.sim.world import World

CLOSE = 0.02
"""A choice within this share of the best utility counts as right."""


class Hindsight:
    """Utilities of what would happen, and of what did."""

    def __init__(self, world: World, settings: RoutingSection) -> None:
        self._world = world
        self._weights: Mapping[LatencyClass, UtilityWeights] = {
            kind: getattr(settings.weights, kind.value) for kind in LatencyClass
        }
        self._max_cost_usd = settings.max_cloud_cost

    def best(self, request: InferenceRequest, deadline: float) -> float:
        """Of the best single play if it began now; of being refused, if none is worth more."""
        return max([self.nothing(request), *(one.worth for one in self.plays(request, deadline))])

    def nothing(self, request: InferenceRequest) -> float:
        """Of being refused."""
        return self.worth(request.latency_class, False, True, 0.0, 0)

    def plays(self, request: InferenceRequest, deadline: float) -> Iterator[Foreseen]:
        """Every play that could begin now, and what it would be worth: what does not come by the deadline is given up,
        and was paid for."""
        world, now = self._world, self._world.clock.monotonic()
        family = world.catalog.family(request.model)
        number, sample = world.number(request), world.sample(request, family)
        for target in world.targets.values():
            if target.weather.gone(now):
                continue
            traits = target.traits
            if request.allowed_regions and traits.tier.is_cloud and traits.region not in request.allowed_regions:
                continue
            sent, received = world.bytes(traits.tier, family.name)
            for variant in target.variants_for(family, request.variant):
                plan = target.plan(number, variant, now)
                comes = not target.weather.silent(now) and plan.took_s <= min(plan.lost_s, traits.timeout_s)
                late = not comes or now + plan.took_s > deadline
                right = not late and bool(world.samples[family.name].right[variant.id][sample])
                worth = self.worth(request.latency_class, right, late, traits.cost_usd, sent + received)
                yield Foreseen(Play(traits.name, variant.id), variant, worth, plan.took_s)

    def worth(self, latency_class: LatencyClass, right: bool, late: bool, cost_usd: float, bytes: int) -> float:
        """Of what happened. Nothing came: neither right nor in time."""
        return utility(
            self._weights[latency_class],
            accuracy=float(right),
            late=float(late),
            cost_usd=cost_usd,
            max_cost_usd=self._max_cost_usd,
            bytes=bytes,
        )


class Foreseen(NamedTuple):
    play: Play
    variant: Variant
    worth: float
    took_s: float


class OracleRouter(Router):
    """Asks the best play, and only that; nobody, where no play is worth more than a refusal. Among equals the
    quickest."""

    hindsight: Hindsight

    def decide(
        self,
        request: InferenceRequest,
        family: Family,
        now: float,
        *,
        among: Among | None = None,
        deadline: float | None = None,
    ) -> tuple[Decision, Variants]:
        foreseen = sorted(
            self.hindsight.plays(request, request.deadline), key=lambda one: (-one.worth, one.took_s, one.play)
        )
        variants: Mapping[Play, Variant] = {one.play: one.variant for one in foreseen}
        nothing = self.hindsight.nothing(request)
        ranked: Sequence[Play] = [one.play for one in foreseen[:1] if one.worth > nothing]
        return Decision("oracle", tuple(ranked), ("oracle: knows what comes",)), variants


def _oracle(targets: Sequence[Target], config: Config, world: World) -> Router:
    router = OracleRouter(targets, config.routing, world.clock)
    router.hindsight = Hindsight(world, config.routing)
    return router


ORACLE = Strategy("oracle", _oracle)
