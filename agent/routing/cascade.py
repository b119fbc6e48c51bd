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
from agent.core.clock import Clock
from agent.core.types import AccuracyMode, InferenceRequest
from agent.registry.catalog import Family, Variant
from agent.registry.confidence import Classified, classified
from agent.routing.router import Among, NoAnswer, Routed, Router
from agent.targets.base import TargetTraits

log = logging.getLogger(__name__)

HOLD_SHARE, HOLD_MIN_S, HOLD_MAX_S = 0.05, 0.001, 0.02
"""An escalation ends before the deadline, by this share of what was left and within these bounds: the held answer has
to be returned then, also by a machine that is busy."""
ESCALATED, HELD = "escalated", "held"


@dataclass(slots=True)
class Answered:
    """The answer to give, with the attempts, reasons and cost of both stages. `first` is what the first stage gave, by
    `first_variant`; the answer itself where nothing was escalated."""

    routed: Routed
    classified: Classified
    first: Classified
    first_variant: Variant
    escalation: str = ""


class Cascade:
    """Runs one request in its mode. `accuracy_of` says what share of a variant's answers is right."""

    def __init__(
        self, router: Router, settings: AccuracySection, clock: Clock, accuracy_of: Callable[[Variant], float]
    ) -> None:
        self._router = router
        self._clock = clock
        self._floor = settings.floor
        self._accuracy_of = accuracy_of

    async def run(self, request: InferenceRequest, family: Family) -> Answered:
        """Raises `NoAnswer`, if not even a first stage answered."""
        try:
            routed = await self._router.run(request, family, among=self._among(request))
        except NoAnswer as failure:
            failure.reasons += self._below_the_floor(request, family)
            raise
        found = classified(routed.answer.outputs, family, routed.variant)
        held = Answered(routed, found, found, routed.variant)
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
            return self._acceptable(variant)
        return self._accuracy_of(variant) >= max(map(self._accuracy_of, family.variants.values()))

    def _below_the_floor(self, request: InferenceRequest, family: Family) -> tuple[str, ...]:
        among = self._among(request)
        below = [] if among is None else [id_ for id_, one in family.variants.items() if not self._acceptable(one)]
        return (f"not asked: {', '.join(below)}: below accuracy.floor {self._floor:g}",) if below else ()

    def _acceptable(self, variant: Variant) -> bool:
        return self._accuracy_of(variant) >= self._floor

    def _among(self, request: InferenceRequest) -> Among | None:
        if request.accuracy is not AccuracyMode.ACCEPTABLE or request.variant is not None:
            return None
        return lambda traits, variant: self._acceptable(variant)

    async def _escalated(self, request: InferenceRequest, family: Family, held: Answered) -> Answered:
        """Ask better variants until one is sure, each play once."""
        while not held.classified.sure:
            why = _sureness(held)
            retries = max(0, request.max_retries - len(held.routed.attempts) + 1)
            again = replace(request, accuracy=AccuracyMode.HIGH, max_retries=retries)
            hold_s = min(HOLD_MAX_S, max(HOLD_MIN_S, HOLD_SHARE * (request.deadline - self._clock.monotonic())))
            try:
                deadline = request.deadline - hold_s
                better = _better(held.routed)
                second = await self._router.run(again, family, among=better, deadline=deadline, further=True)
            except NoAnswer as failure:
                return _held(held, failure, why)
            held = _after(held, second, why, classified(second.answer.outputs, family, second.variant))
        return held


def _better(held: Routed) -> Among:
    """Plays of variants that were more accurate on the held-out data, and the reference, unless tried already."""
    tried = {(attempt.target, attempt.variant) for attempt in held.attempts}
    calibration = held.variant.calibration
    reference = "" if calibration is None or calibration.cascade is None else calibration.cascade.reference

    def among(traits: TargetTraits, variant: Variant) -> bool:
        better = variant.id == reference or variant.accuracy.value > held.variant.accuracy.value
        return better and (traits.name, variant.id) not in tried

    return among


def _held(held: Answered, failure: NoAnswer, why: str) -> Answered:
    """The answer as it is, with what was tried in vain."""
    answered = _with(held, HELD, (f"{why}; no more accurate variant answered", *failure.reasons))
    answered.routed.attempts += failure.attempts
    answered.routed.cost_usd += failure.cost_usd
    return answered


def _after(held: Answered, second: Routed, why: str, found: Classified) -> Answered:
    """The better variant's answer, with what went before it."""
    first = held.routed
    routed = replace(
        second,
        attempts=first.attempts + second.attempts,
        reasons=(*first.reasons, why, *second.reasons),
        cost_usd=first.cost_usd + second.cost_usd,
    )
    return Answered(routed, found, held.first, held.first_variant, ESCALATED)


def _sureness(held: Answered) -> str:
    calibration = held.routed.variant.calibration
    assert calibration is not None and calibration.cascade is not None
    return (
        f"{held.routed.traits.name}: {held.routed.variant.id} is not sure: confidence {held.classified.confidence:.3f} "
        f"is below {calibration.cascade.threshold:.3f}"
    )


def _with(held: Answered, escalation: str, reasons: tuple[str, ...]) -> Answered:
    routed = replace(held.routed, reasons=(*held.routed.reasons, *reasons))
    return replace(held, routed=routed, escalation=escalation)
