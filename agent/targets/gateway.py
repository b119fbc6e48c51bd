"""Tier `edge_gpu`: the gateway's own runtimes, on whatever accelerator or CPU they find."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

from agent.config import GpuSection
from agent.core.clock import Clock
from agent.core.component import Reading
from agent.core.errors import TargetFailed, TargetUnavailable
from agent.core.types import InferenceRequest, TargetAnswer, Tensor, Tensors, Tier
from agent.link.backoff import Backoff
from agent.registry.catalog import Catalog, Family, Variant
from agent.registry.tensors import from_variant, misfit, to_variant
from agent.runtimes.base import Confinement, LoadedModel, ModelFile, RuntimeUnavailable
from agent.runtimes.pool import RuntimePool
from agent.targets.base import AVAILABLE, Availability, TargetTraits

log = logging.getLogger(__name__)

RELOAD_INITIAL_S, RELOAD_MAX_S = 1.0, 60.0
"""Between two tries to load, where the first failed as a whole."""
LOADING = Availability(False, "loading its models")


class _Plan:
    """How one loaded variant's tensors relate to the canonical ones.

    Most variants here are floating point with canonical shapes; their tensors only change names.
    """

    __slots__ = ("_family", "_inputs", "_outputs", "variant")

    def __init__(self, family: Family, variant: Variant) -> None:
        self.variant = variant
        self._family = family
        inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in family.inputs}
        outputs = {tensor.name: tensor.shape for tensor in family.outputs}
        same_inputs = all(
            spec.scale is None and (spec.dtype, spec.shape) == inputs[spec.maps] for spec in variant.inputs
        )
        same_outputs = all(
            spec.scale is None and spec.dtype == "float32" and spec.shape == outputs[spec.maps]
            for spec in variant.outputs
        )
        self._inputs = [(spec.name, spec.maps) for spec in variant.inputs] if same_inputs else None
        self._outputs = [(spec.name, spec.maps, spec.shape) for spec in variant.outputs] if same_outputs else None

    def to_file(self, inputs: Tensors) -> dict[str, Tensor]:
        """Raises `TargetFailed`."""
        try:
            if self._inputs is not None:
                return {name: inputs[maps] for name, maps in self._inputs}
            return to_variant(inputs, self.variant)
        except (KeyError, ValueError) as error:
            raise TargetFailed(f"the inputs do not fit {self.variant.name}: {error}") from None

    def to_canonical(self, outputs: Tensors) -> dict[str, Tensor]:
        """Raises `TargetFailed`."""
        if self._outputs is not None and all(
            name in outputs and outputs[name].shape == shape for name, _, shape in self._outputs
        ):
            return {maps: outputs[name] for name, maps, _ in self._outputs}
        return from_variant(outputs, self.variant, self._family)


LEFT_OUT = "left out, because it ended the runtime process each time"


class GatewayTarget:
    """Runs the catalogue's `edge_gpu` variants. `max_bytes` is the largest model file that is loaded; `confinement` is
    for a catalogue that nobody vouches for."""

    def __init__(
        self,
        settings: GpuSection,
        catalog: Catalog,
        clock: Clock,
        *,
        max_bytes: float,
        pool: RuntimePool | None = None,
        confinement: Confinement | None = None,
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        queued = max(0, settings.max_concurrent - settings.workers)
        self._pool = pool or RuntimePool(settings, clock, max_queued=queued, confinement=confinement)
        self._traits = TargetTraits(
            name="edge_gpu",
            tier=Tier.EDGE_GPU,
            order=10,
            max_concurrent=settings.max_concurrent,
            timeout_s=settings.timeout_ms / 1e3,
            parallel=settings.workers,
            max_bytes=max_bytes,
        )
        self._plans: dict[str, _Plan] = {}
        self._best: dict[str, Variant] = {}
        self._runnable: dict[str, tuple[Variant, ...]] = {}
        self._refused: dict[str, str] = {}
        self._too_large: set[str] = set()
        self._loading: asyncio.Task[None] | None = None
        self._loaded = False
        self._not_loaded = LOADING

    @property
    def traits(self) -> TargetTraits:
        return self._traits

    def alive(self) -> bool:
        return True

    def parts(self) -> Mapping[str, Reading]:
        broken = [f"{name}: {why}" for name, why in self._refused.items() if name not in self._too_large]
        broken += [
            f"{name}: {LEFT_OUT}" for name, plan in self._plans.items() if not self._pool.has(plan.variant.sha256)
        ]
        found = {"models": Reading.working("; ".join(broken) if self._loaded else self._not_loaded.reason)}
        if self._pool.in_process:
            problem = self._pool.problem()
            found["runtime process"] = Reading.there(not problem, problem)
        return found

    def availability(self) -> Availability:
        if not self._loaded:
            return self._not_loaded
        if not self._plans:
            return Availability(
                False, "; ".join(sorted(set(self._refused.values()))) or "the catalogue has no model for it"
            )
        problem = self._pool.problem()
        if problem:
            return Availability(False, problem)
        if not any(self._pool.has(plan.variant.sha256) for plan in self._plans.values()):
            return Availability(False, f"every model was {LEFT_OUT}")
        return AVAILABLE

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        """The most accurate variant that is loaded; while loading, the one that will be."""
        if not self._loaded:
            return family.variant_for("edge_gpu", pinned)
        if pinned is None:
            return self._best.get(family.name)
        plan = self._plans.get(f"{family.name}/{pinned}")
        return None if plan is None else plan.variant

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        """Every variant that is loaded; while loading, those that will be."""
        if not self._loaded:
            return family.variants_for("edge_gpu", pinned)
        if pinned is None:
            found = self._runnable.get(family.name, ())
        else:
            plan = self._plans.get(f"{family.name}/{pinned}")
            found = () if plan is None else (plan.variant,)
        return tuple(variant for variant in found if self._pool.has(variant.sha256))

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        began = self._clock.monotonic()
        plan = self._plans.get(variant.name)
        if plan is None:
            raise TargetUnavailable(self._refused.get(variant.name, f"{variant.name} is not loaded"))
        ran = await self._pool.run(variant.sha256, plan.to_file(request.inputs), deadline)
        outputs = plan.to_canonical(ran.outputs)
        elapsed = self._clock.monotonic() - began
        return TargetAnswer(
            outputs=outputs,
            provider=ran.provider,
            queue_s=ran.queue_s,
            link_s=max(0.0, elapsed - ran.queue_s - ran.compute_s),
            compute_s=ran.compute_s,
        )

    async def start(self) -> None:
        """Begin to load. With `strict_provider`, raises `RuntimeUnavailable` if another provider would run."""
        if self._settings.strict_provider:
            await self._load()
        else:
            self._loading = asyncio.create_task(self._load_at_last(), name="edge_gpu-load")

    async def stop(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait((self._loading,))
        await self._pool.close()

    def status(self) -> Mapping[str, Any]:
        return {
            "models_loaded": sorted(self._plans),
            "models_refused": dict(self._refused),
            "pool": self._pool.status(),
        }

    async def _load_at_last(self) -> None:
        """Until it succeeds. Whatever keeps the models from being loaded is why the tier cannot be asked."""
        backoff = Backoff(RELOAD_INITIAL_S, RELOAD_MAX_S, random.random)
        while True:
            try:
                return await self._load()
            except Exception as error:  # a driver's or a library's: it may be there later
                self._not_loaded = Availability(False, f"loading failed: {error}")
                log.exception("models were not loaded")
            await asyncio.sleep(backoff.failed(self._clock.monotonic()))

    async def _load(self) -> None:
        wanted = [
            (family, variant)
            for family in self._catalog.families.values()
            for variant in family.variants.values()
            if "edge_gpu" in variant.targets
        ]
        fitting = [(family, variant) for family, variant in wanted if variant.bytes <= self._traits.max_bytes]
        files: dict[str, ModelFile] = {}
        unsafe: dict[str, ValueError] = {}
        for _, variant in wanted:
            if variant.bytes > self._traits.max_bytes:
                self._too_large.add(variant.name)
                self._refused[variant.name] = f"{variant.bytes} bytes, over the limit of {self._traits.max_bytes:.0f}"
        for _, variant in fitting:
            try:
                path = self._catalog.file(variant)
                files[variant.name] = ModelFile(path, variant.format, variant.sha256, variant.bytes)
            except ValueError as error:
                unsafe[variant.name] = error
        outcomes = await self._pool.load_all(files.values())
        for family, variant in fitting:
            outcome = unsafe.get(variant.name) or outcomes[variant.sha256]
            if isinstance(outcome, LoadedModel) and (fault := misfit(variant, outcome.inputs, outcome.outputs)):
                outcome = ValueError(fault)
            if isinstance(outcome, LoadedModel):
                self._plans[variant.name] = _Plan(family, variant)
                self._runnable[family.name] = (*self._runnable.get(family.name, ()), variant)
                best = self._best.get(family.name)
                if best is None or variant.accuracy.value > best.accuracy.value:
                    self._best[family.name] = variant
                log.info("model loaded", extra={"variant": variant.name, "provider": outcome.provider})
                continue
            if self._settings.strict_provider and isinstance(outcome, RuntimeUnavailable):
                raise outcome
            self._refused[variant.name] = str(outcome)
            log.warning("model refused", extra={"variant": variant.name, "reason": str(outcome)})
        self._loaded = True
