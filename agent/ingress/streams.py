"""What boards sample themselves: published as they answered it, or escalated where they were not sure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agent.config import StreamSection
from agent.core.clock import Clock
from agent.core.errors import InferenceError
from agent.core.streamed import Streamed
from agent.core.types import InferenceRequest, InferenceResult, LatencyClass, Tier
from agent.ingress.base import Core
from agent.registry.tensors import classify

log = logging.getLogger(__name__)

TARGET = "edge_mcu"

Publish = Callable[[str, Mapping[str, Any]], None]
"""A stream's name and a document."""


@dataclass(slots=True)
class _Stream:
    """One configured stream."""

    section: StreamSection
    escalating: set[asyncio.Task[None]] = field(default_factory=set)
    results: int = 0
    escalated: int = 0
    improved: int = 0
    """Escalations that were answered."""
    held: int = 0
    """Unsure answers that were published all the same: nothing to escalate, or too much of it."""


class StreamDoor:
    """`observed` is told of every answer of a board that is published as it is; it must not raise."""

    def __init__(
        self,
        core: Core,
        sections: Sequence[StreamSection],
        publish: Publish,
        observed: Callable[[InferenceResult], None],
        clock: Clock,
    ) -> None:
        self._core = core
        self._publish = publish
        self._observed = observed
        self._clock = clock
        self._streams = {section.name: _Stream(section) for section in sections}

    def take(self, sample: Streamed) -> None:
        """One sample, on the loop. Does not raise."""
        try:
            self._take(sample)
        except Exception:
            log.exception("a streamed result could not be used", extra={"stream": sample.stream})

    async def stop(self, timeout_s: float) -> None:
        """Wait for what is being escalated, at most so long."""
        tasks = [task for stream in self._streams.values() for task in stream.escalating]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def status(self) -> dict[str, dict[str, int]]:
        """For `/status`: plain JSON types."""
        return {
            name: {
                "results": stream.results,
                "escalated": stream.escalated,
                "improved": stream.improved,
                "held": stream.held,
                "in_flight": len(stream.escalating),
            }
            for name, stream in self._streams.items()
        }

    def _take(self, sample: Streamed) -> None:
        stream = self._streams[sample.stream]
        stream.results += 1
        answer = self._answer(stream.section, sample)
        threshold = stream.section.threshold
        if answer.confidence is None or answer.confidence >= threshold:
            self._show(sample, answer)
            return
        unsure = f"{TARGET}: {answer.confidence:.1%} sure, below {threshold:.1%}"
        if sample.inputs is None:
            self._hold(stream, sample, answer, f"{unsure}; its inputs were not sent")
        elif len(stream.escalating) >= stream.section.max_escalations:
            self._hold(stream, sample, answer, f"{unsure}; as many samples as may be are being escalated")
        else:
            try:
                request = self._request(stream.section, sample)
            except InferenceError as error:  # no other tier would take these inputs: the board's answer stands
                self._hold(stream, sample, answer, f"{unsure}; cannot be escalated: {error}")
                return
            stream.escalated += 1
            task = asyncio.get_running_loop().create_task(self._escalate(stream, sample, answer, request, unsure))
            stream.escalating.add(task)
            task.add_done_callback(stream.escalating.discard)

    async def _escalate(
        self, stream: _Stream, sample: Streamed, answer: InferenceResult, request: InferenceRequest, unsure: str
    ) -> None:
        try:
            better = await self._core.infer(request)
        except InferenceError as error:
            self._hold(stream, sample, answer, f"{unsure}; escalated: {error}")
            return
        if better.stale:
            self._hold(stream, sample, answer, f"{unsure}; escalated: nothing could be asked")
            return
        stream.improved += 1
        reasons = (*answer.reasons, f"{unsure}: escalated", *better.reasons)
        self._publish(sample.stream, self._document(sample, better._replace(reasons=reasons)))

    def _hold(self, stream: _Stream, sample: Streamed, answer: InferenceResult, why: str) -> None:
        stream.held += 1
        self._show(sample, answer._replace(reasons=(*answer.reasons, why)))

    def _show(self, sample: Streamed, answer: InferenceResult) -> None:
        """The board's own answer."""
        now = self._clock.monotonic()
        deadline_s = self._deadline_s(self._streams[sample.stream].section)
        since_s = now - _began(sample)
        answer = answer._replace(total_s=since_s, age_s=since_s, deadline_met=since_s <= deadline_s)
        self._observed(answer)
        self._publish(sample.stream, self._document(sample, answer))

    def _answer(self, section: StreamSection, sample: Streamed) -> InferenceResult:
        family = self._core.admission.catalog.family(section.model)
        label, confidence = classify(sample.outputs, family)
        began = _began(sample)
        return InferenceResult(
            request_id=f"{sample.stream}-{sample.seq}",
            model=section.model,
            variant=sample.variant,
            model_sha256=sample.model_sha256,
            outputs=sample.outputs,
            label=label,
            confidence=confidence,
            tier=Tier.EDGE_MCU,
            origin_tier=Tier.EDGE_MCU,
            target=TARGET,
            provider=sample.provider,
            latency_class=LatencyClass(section.latency_class),
            queue_s=0.0,
            link_s=max(0.0, sample.received_at - began - sample.compute_s),
            compute_s=sample.compute_s,
            total_s=0.0,
            deadline_met=True,
            cost_usd=0.0,
            cached=False,
            stale=False,
            age_s=0.0,
            attempts=(),
            reasons=(f"{TARGET}: streamed by the board",),
        )

    def _request(self, section: StreamSection, sample: Streamed) -> InferenceRequest:
        assert sample.inputs is not None
        options: dict[str, Any] = {"latency_class": section.latency_class, "priority": section.priority}
        if section.deadline_ms is not None:
            options["deadline_ms"] = section.deadline_ms
        if section.allowed_regions:
            options["allowed_regions"] = list(section.allowed_regions)
        request = self._core.admission.from_document(
            {"inputs": dict(sample.inputs), "request_id": f"{sample.stream}-{sample.seq}", **options},
            model=section.model,
            producer=section.name,
            received=_began(sample),
            asked_by=f"sensor:{section.name}",
        )
        return replace(request, avoid=frozenset({Tier.EDGE_MCU}))

    def _deadline_s(self, section: StreamSection) -> float:
        if section.deadline_ms is not None:
            return section.deadline_ms / 1e3
        return self._core.admission.deadline_s(LatencyClass(section.latency_class))

    def _document(self, sample: Streamed, answer: InferenceResult) -> dict[str, Any]:
        """The answer, and what is known of its sample."""
        taken = sample.taken_at
        about = {
            "seq": sample.seq,
            "taken_at": None if taken is None else self._clock.wall() - (self._clock.monotonic() - taken),
            "time_error_ms": None if taken is None else round(sample.bound_s * 1e3, 3),
            "skipped": sample.skipped,
            "lost": sample.lost,
        }
        return {"sensor": sample.stream, **answer.to_dict(), "sample": about}


def _began(sample: Streamed) -> float:
    """When its deadline began to count: at the sample; without the board's clock, when the answer came."""
    if sample.taken_at is None:
        return sample.received_at - sample.compute_s
    return min(sample.taken_at, sample.received_at)
