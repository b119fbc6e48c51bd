"""What routing is compared with: each is the daemon's router with another opinion about whom to ask.

Breakers, limits, attempts and everything around them are the daemon's own in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from agent.config import Config
from agent.core.types import InferenceRequest, LatencyClass, Tier
from agent.registry.catalog import Family, Variant
from agent.registry.tensors import classify
from agent.routing.budget import budget_of
from agent.routing.decision import Decision
from agent.routing.limits import limits_of
from agent.routing.router import Among, Router
from agent.routing.walk import NoAnswer, Routed, Variants
from agent.targets.base import Target, TargetTraits

if TYPE_CHECKING:
    from hil.sim.world import World

AnyRouter = TypeVar("AnyRouter", bound=Router)
Wish = Callable[[InferenceRequest], Sequence[Tier]]
"""The tiers to ask, first one first."""

CLOUD = (Tier.CLOUD_GPU, Tier.CLOUD_SERVERLESS)
TABLE: Mapping[LatencyClass, Sequence[Tier]] = {
    LatencyClass.REALTIME: (Tier.EDGE_MCU, Tier.EDGE_GPU),
    LatencyClass.NEAR: (Tier.EDGE_GPU, Tier.EDGE_MCU),
    LatencyClass.INTERACTIVE: (Tier.EDGE_GPU, *CLOUD, Tier.EDGE_MCU),
    LatencyClass.BATCH: (*CLOUD, Tier.EDGE_GPU, Tier.EDGE_MCU),
}
"""A rule for each class, as one would write it down without looking at anything."""
CONFIDENT = 0.9
"""From here on the plain cascade believes the microcontroller: one figure for all models, fitted to nothing."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """`keeps_deadlines`: it gives up at the deadline, as the daemon does; False: it answers, however late. `cascades`:
    requests keep their own accuracy mode; False: whatever variant the router names first is believed."""

    name: str
    router: Callable[[Sequence[Target], Config, World], Router]
    keeps_deadlines: bool = True
    cascades: bool = False


class Wished(Router):
    """Asks the tiers of a wish list in its order, and nobody else. Constraints rule out as ever."""

    wish: Wish

    def decide(
        self,
        request: InferenceRequest,
        family: Family,
        now: float,
        *,
        among: Among | None = None,
        deadline: float | None = None,
    ) -> tuple[Decision, Variants]:
        decision, variants = super().decide(request, family, now, among=among, deadline=deadline)
        tiers = list(self.wish(request))
        tier_of = {one.target: one.tier for one in decision.judged}
        ranked = [play for play in decision.ranked if tier_of[play.target] in tiers]
        ranked.sort(key=lambda play: tiers.index(tier_of[play.target]))
        decision.ranked = tuple(ranked)
        return decision, variants


class PlainCascade(Router):
    """The microcontroller first; the cloud, if it is not `CONFIDENT`; what was held, if that fails."""

    async def run(
        self,
        request: InferenceRequest,
        family: Family,
        *,
        among: Among | None = None,
        deadline: float | None = None,
        further: bool = False,
    ) -> Routed:
        try:
            held = await super().run(request, family, among=_first_step, deadline=deadline)
        except NoAnswer:
            return await super().run(request, family, among=_second_step, deadline=deadline, further=True)
        _, confidence = classify(held.answer.outputs, family)
        if confidence >= CONFIDENT:
            return held
        try:
            escalated = await super().run(request, family, among=_second_step, deadline=deadline, further=True)
        except NoAnswer as failure:
            held.cost_usd += failure.cost_usd
            return held
        escalated.cost_usd += held.cost_usd
        escalated.attempts = held.attempts + escalated.attempts
        return escalated


def _first_step(traits: TargetTraits, _variant: Variant) -> bool:
    return traits.tier is Tier.EDGE_MCU


def _second_step(traits: TargetTraits, _variant: Variant) -> bool:
    return traits.tier in CLOUD


def _made(kind: type[AnyRouter], targets: Sequence[Target], config: Config, world: World) -> AnyRouter:
    """With the daemon's budgets, floor and limits."""
    return kind(
        targets,
        config.routing,
        world.clock,
        budgets=budget_of(config.budgets, config.cloud.lanes, None),
        floor_of=lambda _: config.accuracy.floor,
        limit_for=limits_of(config.routing.overload),
    )


def _router(targets: Sequence[Target], config: Config, world: World) -> Router:
    """The daemon's own."""
    return _made(Router, targets, config, world)


def _wished(wish: Wish) -> Callable[[Sequence[Target], Config, World], Router]:
    def build(targets: Sequence[Target], config: Config, world: World) -> Router:
        router = _made(Wished, targets, config, world)
        router.wish = wish
        return router

    return build


def _preset(policy: str) -> Callable[[Sequence[Target], Config, World], Router]:
    def build(targets: Sequence[Target], config: Config, world: World) -> Router:
        routing = config.routing.model_copy(update={"policy": policy})
        return _router(targets, config.model_copy(update={"routing": routing}), world)

    return build


OURS = Strategy("ours", _router, cascades=True)
ALWAYS_CLOUD = Strategy("always cloud", _wished(lambda _: CLOUD), keeps_deadlines=False)
ALWAYS_GATEWAY = Strategy("always gateway", _wished(lambda _: (Tier.EDGE_GPU,)), keeps_deadlines=False)
ALWAYS_MCU = Strategy("always mcu", _wished(lambda _: (Tier.EDGE_MCU,)), keeps_deadlines=False)
RULE_TABLE = Strategy("rule table", _wished(lambda request: TABLE[request.latency_class]))
SCORECARD = Strategy("scorecard", _preset("scorecard"))
PLAIN_CASCADE = Strategy("plain cascade", lambda targets, config, world: _made(PlainCascade, targets, config, world))
BASELINES = (ALWAYS_CLOUD, ALWAYS_GATEWAY, ALWAYS_MCU, RULE_TABLE, SCORECARD, PLAIN_CASCADE)
