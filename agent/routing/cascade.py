"""Chooses among a family's variants by how right the answer has to be.

`adaptive` is a cascade: routing chooses who answers; where that is a variant with a threshold, and its calibrated
confidence is below it, the most accurate variant that can answer in what is left of the deadline is asked too. An
answer that is held is never lost: whatever becomes of the escalation, it is there in time. docs/cascade.md has the
rules and what they give.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.config import AccuracySection
from agent.core.types import AccuracyMode, InferenceRequest
from agent.registry.catalog import Family, Variant
from agent.registry.confidence import Classified, classified
from agent.routing.decision import Decision
from agent.routing.router import Among, NoAnswer, Order, Routed, Router
from agent.targets.base import TargetTraits

log = logging.getLogger(__name__)

HOLD_S = 0.002
"""An escalation ends this long before the deadline: the held answer has to be returned then."""
ESCALATED, HELD = "escalated", "held"


@dataclass(slots=True)
class Answered:
    """The answer to give, with the attempts, reasons and cost of both stages. `first` is what the first stage gave, by
    `first_variant`; the answer itself where nothing was escalated. `decisions` has one for each stage."""

    routed: Routed
    classified: Classified
    first: Classified
    first_variant: Variant
    decisions: tuple[Decision, ...]
    escalation: str = ""


class Cascade:
    """Runs one request in its mode. `accuracy_of` says what share of a variant's answers is right."""

    def __init__(self, router: Router, settings: AccuracySection, accuracy_of: Callable[[Variant], float]) -> None:
        self._router = router
        self._floor = settings.floor
        self._accuracy_of = accuracy_of

    async def run(self, request: InferenceRequest, family: Family) -> Answered:
        """Raises `NoAnswer`, if not even a first stage answered."""
        routed = await self._router.run(request, family, among=self._among(request), order=self._order(request))
        found = classified(routed.answer.outputs, family, routed.variant)
        held = Answered(routed, found, found, routed.variant, (routed.decision,))
        if found.sure or request.variant is not None or request.accuracy is not AccuracyMode.ADAPTIVE:
            return held
        try:
            return await self._escalated(request, family, held)
        except Exception:  # whatever it is, there is an answer
            log.exception("an escalation failed inside the daemon", extra={"request_id": request.id})
            return _with(held, HELD, (f"{_sureness(held)}; the escalation failed inside the daemon",))

    def enough(self, request: InferenceRequest, family: Family, variant: Variant, found: Classified) -> bool:
        """Whether an answer that is known already is as right as the request asks."""
        if request.variant is not None:
            return True
        if request.accuracy is AccuracyMode.ADAPTIVE:
            return found.sure
        if request.accuracy is AccuracyMode.ACCEPTABLE:
            return self._accuracy_of(variant) >= self._floor
        return self._accuracy_of(variant) >= max(map(self._accuracy_of, family.variants.values()))

    def _among(self, request: InferenceRequest) -> Among | None:
        if request.accuracy is not AccuracyMode.ACCEPTABLE or request.variant is not None:
            return None
        return lambda traits, variant: self._accuracy_of(variant) >= self._floor

    def _order(self, request: InferenceRequest) -> Order | None:
        """`high` begins with the most accurate; the others as routing ranks."""
        return self._most_accurate if request.accuracy is AccuracyMode.HIGH and request.variant is None else None

    def _most_accurate(self, traits: TargetTraits, variant: Variant) -> float:
        return -self._accuracy_of(variant)

    async def _escalated(self, request: InferenceRequest, family: Family, held: Answered) -> Answered:
        first = held.routed
        asked = self._accuracy_of(first.variant)

        def better(traits: TargetTraits, variant: Variant) -> bool:
            return self._accuracy_of(variant) > asked

        again = replace(request, max_retries=max(0, request.max_retries - len(first.attempts) + 1))
        why = _sureness(held)
        try:
            second = await self._router.run(
                again, family, among=better, order=self._most_accurate, deadline=request.deadline - HOLD_S
            )
        except NoAnswer as failure:
            answered = _with(held, HELD, (f"{why}; no more accurate variant answered", *failure.reasons))
            answered.routed.attempts += failure.attempts
            answered.routed.cost_usd += failure.cost_usd
            answered.decisions += (failure.decision,)
            return answered
        found = classified(second.answer.outputs, family, second.variant)
        escalation = ESCALATED if found.sure else HELD
        end = f"{second.traits.name}/{second.variant.id}: {'answers' if found.sure else 'is not sure either'}"
        routed = replace(
            second,
            attempts=first.attempts + second.attempts,
            reasons=(*first.reasons, why, *second.reasons, end),
            cost_usd=first.cost_usd + second.cost_usd,
        )
        decisions = (*held.decisions, second.decision)
        return Answered(routed, found, held.first, held.first_variant, decisions, escalation)


def _sureness(held: Answered) -> str:
    calibration = held.first_variant.calibration
    assert calibration is not None and calibration.cascade is not None
    return (
        f"{held.routed.traits.name}/{held.first_variant.id}: not sure: confidence {held.first.confidence:.3f} is below "
        f"{calibration.cascade.threshold:.3f}"
    )


def _with(held: Answered, escalation: str, reasons: tuple[str, ...]) -> Answered:
    routed = replace(held.routed, reasons=(*held.routed.reasons, *reasons))
    return replace(held, routed=routed, escalation=escalation)
