"""The far end of a cloud lane: takes requests from a shared subscription, runs the catalogue's cloud variants, replies.

Any number of workers share a lane. Each drops what is too late before running it, answers a repeated request with the
answer it has, and says `busy` rather than queue without end. Time budgets count from this machine's own receipt of the
request: no common clock is assumed. The protocol is `wire.lane`, in words in docs/mqtt.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from agent.core.clock import Clock
from agent.core.errors import ConfigError, LinkError, ProtocolError, TargetBusy, TargetError, TargetTimeout
from agent.core.types import Tensor, Tensors
from agent.link.mqtt import LinkOptions, LinkState, Message, MessageProperties, MqttLink, Will
from agent.registry.catalog import Catalog, Family, Variant
from agent.registry.tensors import from_variant, misfit, to_variant
from agent.runtimes.base import LoadedModel, ModelFile, RunOutcome
from agent.wire import lane, oip
from agent.wire.mqtt_properties import usable_topic

log = logging.getLogger(__name__)

MAX_ASKERS = 16
"""Repeats of one request that may wait for its answer."""
MAX_KEPT_BYTES = 16 << 20


class Pool(Protocol):
    """What a worker needs of `runtimes.pool.RuntimePool`."""

    async def load_all(self, files: list[ModelFile]) -> Mapping[str, LoadedModel | Exception]: ...

    async def run(self, sha256: str, inputs: Tensors, deadline: float) -> RunOutcome: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`topic` is the lane's; workers of one `group` share its requests."""

    topic: str
    worker_id: str
    group: str = "workers"
    max_concurrent: int = 4
    """Inferences at once: what presence announces."""
    max_queued: int = 16
    """Requests beyond those; one more is answered `busy`."""
    default_budget_s: float = 30.0
    """For a request that states neither a budget nor a message expiry."""
    duplicate_window_s: float = 60.0
    """How long an answer is kept for repeats of its request, at least; never less than the request's own lifetime."""
    duplicate_entries: int = 1024
    presence_interval_s: float = 30.0
    """Presence is refreshed this often, and ends by itself after three times that."""
    drain_s: float = 5.0
    delay_s: float = 0.0
    """Added to each request before it runs: stands in for a slow network in tests and demonstrations."""
    jitter_s: float = 0.0
    """Mean of what comes on top of `delay_s` at random, exponentially distributed."""


@dataclass(slots=True)
class WorkerCounters:
    received: int = 0
    answered: int = 0
    computed: int = 0
    duplicates: int = 0
    expired: int = 0
    busy: int = 0
    invalid: int = 0
    failed: int = 0
    unanswerable: int = 0
    """Requests without a usable response topic, and answers that could not be handed to the broker."""


@dataclass(frozen=True, slots=True)
class _Served:
    family: Family
    variant: Variant


@dataclass(frozen=True, slots=True)
class _Asker:
    topic: str
    correlation: bytes | None
    until: float


@dataclass(frozen=True, slots=True)
class _Reply:
    status: str
    payload: bytes
    header_length: int | None = None


@dataclass(slots=True)
class _Job:
    served: _Served
    message: Message
    askers: list[_Asker] = field(default_factory=list)

    def until(self) -> float:
        return max(asker.until for asker in self.askers)


class Worker:
    """One worker process's work; `cli_worker` gives it a process."""

    def __init__(
        self, settings: WorkerSettings, catalog: Catalog, pool: Pool, options: LinkOptions, clock: Clock
    ) -> None:
        self.settings = settings
        self.counters = WorkerCounters()
        self._catalog = catalog
        self._pool = pool
        self._clock = clock
        self._presence_topic = lane.presence_topic(settings.topic, settings.worker_id)
        self.link = MqttLink(
            replace(options, will=Will(self._presence_topic)), clock, name=f"worker {settings.worker_id}"
        )
        self.link.on_state(self._on_link)
        self._presence = b""
        self._filters: list[str] = []
        self._jobs: dict[object, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers = AnswerStore(settings.duplicate_entries, settings.duplicate_window_s)
        self._refresher: asyncio.TimerHandle | None = None
        self._leaving = False

    async def start(self) -> None:
        """Load the models and begin to connect. Raises `ConfigError` if none of them can be served."""
        served, problems = await self._load()
        if not served:
            raise ConfigError(problems or ["the catalogue has no variant with the target `cloud`"])
        self._presence = lane.Presence(
            self.settings.worker_id, self.settings.max_concurrent, tuple(model for _, model in served)
        ).to_bytes()
        for item, model in served:
            topic = lane.request_topic(self.settings.topic, model.model, model.sha256)
            self._filters.append(f"$share/{self.settings.group}/{topic}")
            await self.link.subscribe(self._filters[-1], partial(self._on_request, item))
        await self.link.start()

    async def stop(self) -> None:
        """Take no more, say so, finish what is here within `drain_s`, and leave."""
        self._leaving = True
        if self._refresher is not None:
            self._refresher.cancel()
        # Presence goes before the last answers do: gateways should ask somebody else from now on.
        await asyncio.gather(*(self.link.unsubscribe(topic_filter) for topic_filter in self._filters))
        try:
            async with asyncio.timeout(self.settings.drain_s):
                await self.link.publish_acknowledged(self._presence_topic, b"", retain=True)
        except (LinkError, TimeoutError):
            log.warning("presence could not be cleared", extra={"worker": self.settings.worker_id})
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.settings.drain_s)
            for task in late:
                task.cancel()
        await self.link.stop()
        await self._pool.close()
        log.info("worker stopped", extra=self.status())

    def status(self) -> dict[str, Any]:
        return {key: getattr(self.counters, key) for key in WorkerCounters.__slots__}

    async def _load(self) -> tuple[list[tuple[_Served, lane.ServedModel]], list[str]]:
        wanted = {
            variant.sha256: _Served(family, variant)
            for family in self._catalog.families.values()
            for variant in family.variants.values()
            if "cloud" in variant.targets
        }
        files, refused, served, problems = [], {}, [], []
        for sha256, item in wanted.items():
            try:
                path = self._catalog.file(item.variant)
                files.append(ModelFile(path, item.variant.format, sha256, item.variant.bytes))
            except ValueError as error:
                refused[sha256] = error
        for sha256, outcome in {**refused, **await self._pool.load_all(files)}.items():
            variant = wanted[sha256].variant
            if isinstance(outcome, LoadedModel) and (fault := misfit(variant, outcome.inputs, outcome.outputs)):
                outcome = ValueError(fault)
            if isinstance(outcome, LoadedModel):
                model = lane.ServedModel(variant.model, variant.id, sha256, outcome.provider)
                served.append((wanted[sha256], model))
            else:
                problems.append(f"{variant.name}: {outcome}")
                log.error("model cannot be served", extra={"variant": variant.name, "error": str(outcome)})
        return served, problems

    # --- presence ------------------------------------------------------------------------------------------------

    def _on_link(self, state: LinkState) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            self._refresher = None
        if state.connected and not self._leaving:
            self._announce()

    def _announce(self) -> None:
        interval_s = self.settings.presence_interval_s
        self._refresher = asyncio.get_running_loop().call_later(interval_s, self._announce)
        expiry = MessageProperties("application/json", message_expiry_s=math.ceil(3 * interval_s))
        try:
            self.link.publish(self._presence_topic, self._presence, qos=1, retain=True, properties=expiry)
        except LinkError as error:
            log.warning("presence could not be published", extra={"error": str(error)})

    # --- requests ------------------------------------------------------------------------------------------------

    def _on_request(self, served: _Served, message: Message) -> None:
        self.counters.received += 1
        properties = message.properties
        if properties.response_topic is None or not usable_topic(properties.response_topic):
            self.counters.unanswerable += 1
            log.warning("request without a usable response topic", extra={"topic": message.topic})
            return
        try:
            budget_s = lane.budget_s(properties.get(lane.BUDGET_MS))
        except ProtocolError as error:
            asker = _Asker(properties.response_topic, properties.correlation_data, math.inf)
            self._refuse(asker, lane.INVALID, str(error))
            return
        if budget_s is None:
            expiry_s = properties.message_expiry_s
            budget_s = self.settings.default_budget_s if expiry_s is None else float(expiry_s)
        asker = _Asker(properties.response_topic, properties.correlation_data, message.received + budget_s)
        self._admit(_key(served.variant, message), served, message, asker)

    def _admit(self, key: object, served: _Served, message: Message, asker: _Asker) -> None:
        known = self._answers.get(key, message.received)
        if known is not None:
            self.counters.duplicates += 1
            self._reply(known, [asker])
            return
        job = self._jobs.get(key)
        if job is not None and len(job.askers) < MAX_ASKERS:
            self.counters.duplicates += 1
            job.askers.append(asker)
        elif job is not None or len(self._jobs) >= self.settings.max_concurrent + self.settings.max_queued:
            self._refuse(asker, lane.BUSY, f"{len(self._jobs)} requests run or wait here already")
        else:
            self._jobs[key] = job = _Job(served, message, [asker])
            task = asyncio.get_running_loop().create_task(self._work(key, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _delay_s(self) -> float:
        jitter_s = self.settings.jitter_s
        return self.settings.delay_s + (random.expovariate(1 / jitter_s) if jitter_s else 0.0)

    async def _work(self, key: object, job: _Job) -> None:
        reply: _Reply | None = None
        until = -math.inf
        try:
            if delay_s := self._delay_s():
                await asyncio.sleep(delay_s)
            while reply is None and job.until() > until:  # a repeat that came meanwhile may have more time
                until = job.until()
                reply = await self._answer(job)
        finally:
            # Not after an await: a repeat either joins the job before this, or finds the answer.
            del self._jobs[key]
            if reply is not None:
                if reply.status == lane.OK:
                    # A repeat can come as long as its request may be under way.
                    self._answers.put(key, reply, self._clock.monotonic(), until=job.until())
                self._reply(reply, job.askers)

    async def _answer(self, job: _Job) -> _Reply | None:
        """None: too late to be of use to anybody."""
        family, variant = job.served.family, job.served.variant
        try:
            if self._clock.monotonic() >= job.until():
                raise TargetTimeout("its budget was spent before it could begin")
            inputs = _inputs(job.message, family)
            outcome = await self._pool.run(variant.sha256, to_variant(inputs, variant), job.until())
            outputs = from_variant(outcome.outputs, variant, family)
        except ProtocolError as error:
            self.counters.invalid += 1
            return _Reply(lane.INVALID, lane.encode_error(str(error)))
        except TargetTimeout as error:
            self.counters.expired += 1
            log.warning("request expired", extra={"variant": variant.name, "error": str(error)})
            return None
        except TargetBusy as error:
            self.counters.busy += 1
            return _Reply(lane.BUSY, lane.encode_error(str(error)))
        except TargetError as error:
            self.counters.failed += 1
            log.warning("inference failed", extra={"variant": variant.name, "error": str(error)})
            return _Reply(lane.FAILED, lane.encode_error(str(error)))
        except Exception:
            self.counters.failed += 1
            log.exception("inference failed", extra={"variant": variant.name})
            return _Reply(lane.FAILED, lane.encode_error("internal error"))
        self.counters.computed += 1
        execution = lane.Execution(
            variant.sha256, outcome.provider, self.settings.worker_id, outcome.queue_s, outcome.compute_s
        )
        response = oip.OipResponse(family.name, outputs, variant.id, parameters=execution.to_parameters())
        return _Reply(lane.OK, *oip.encode_response(response))

    def _refuse(self, asker: _Asker, status: str, message: str) -> None:
        if status == lane.BUSY:
            self.counters.busy += 1
        else:
            self.counters.invalid += 1
        self._reply(_Reply(status, lane.encode_error(message)), [asker])

    def _reply(self, reply: _Reply, askers: list[_Asker]) -> None:
        now = self._clock.monotonic()
        length = () if reply.header_length is None else ((oip.HEADER_LENGTH, str(reply.header_length)),)
        for asker in askers:
            if asker.until <= now:
                self.counters.expired += 1
                continue
            properties = MessageProperties(
                content_type=oip.CONTENT_TYPE if length else "application/json",
                correlation_data=asker.correlation,
                message_expiry_s=math.ceil(min(asker.until - now, lane.MAX_BUDGET_S)),
                user=((lane.STATUS, reply.status), *length),
            )
            try:
                self.link.publish(asker.topic, reply.payload, properties=properties)
                self.counters.answered += 1
            except (LinkError, ValueError) as error:
                self.counters.unanswerable += 1
                log.warning("reply could not be sent", extra={"topic": asker.topic, "error": str(error)})


class AnswerStore:
    """The latest answers by request, bounded in number and bytes; each is kept for the window, or for as long as its
    request may be under way if that is longer."""

    def __init__(self, entries: int, window_s: float) -> None:
        self._limit = entries
        self._window_s = window_s
        self._kept: OrderedDict[object, tuple[float, _Reply]] = OrderedDict()
        self._bytes = 0

    def get(self, key: object, now: float) -> _Reply | None:
        kept = self._kept.get(key)
        return kept[1] if kept is not None and now < kept[0] else None

    def put(self, key: object, reply: _Reply, now: float, until: float = 0.0) -> None:
        self._remove(key)
        self._kept[key] = (max(now + self._window_s, until), reply)
        self._bytes += len(reply.payload)
        while self._kept and (
            len(self._kept) > self._limit or self._bytes > MAX_KEPT_BYTES or next(iter(self._kept.values()))[0] <= now
        ):
            self._remove(next(iter(self._kept)))

    def _remove(self, key: object) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._bytes -= len(kept[1].payload)

    def __len__(self) -> int:
        return len(self._kept)


def _key(variant: Variant, message: Message) -> object:
    """What makes two requests the same: model file, key and content, as two gateways may have had the same idea."""
    name = message.properties.get(lane.IDEMPOTENCY_KEY)
    if not name:
        return object()
    return variant.sha256, name, hashlib.blake2b(message.payload, digest_size=16).digest()


def _inputs(message: Message, family: Family) -> dict[str, Tensor]:
    """The family's canonical tensors, and nothing else. Raises `ProtocolError`."""
    request = oip.decode_request(message.payload, oip.header_length(message.properties.get(oip.HEADER_LENGTH)))
    if request.inputs.keys() != {spec.name for spec in family.inputs}:
        raise ProtocolError(
            f"{family.name} takes {[spec.name for spec in family.inputs]}, found {list(request.inputs)}"
        )
    for spec in family.inputs:
        value = request.inputs[spec.name]
        if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
            raise ProtocolError(
                f"{spec.name} must be {spec.dtype} {list(spec.shape)}, found {value.dtype.name} {list(value.shape)}"
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ProtocolError(f"{spec.name} holds NaN or infinity")
    return request.inputs
