"""`Pipeline.infer` around an invoke, beside the bare invoke of the same model file in the same process.

Every variant of the shipped catalogue runs on the gateway's target, those for other tiers too: their sizes are what
matters here. Inputs are the family's held-out samples in turn. A cached answer is never taken, but answers are put into
the cache and its file, as in the daemon.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from agent.config import FallbackSection, GpuSection, RoutingSection
from agent.core.clock import SystemClock
from agent.core.types import InferenceRequest, LatencyClass, Tensor
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog, Family, TargetKind, Variant, load_catalog
from agent.registry.locate import catalog_path
from agent.routing.router import Router
from agent.runtimes.pool import RuntimePool
from agent.store.cache import ResultCache
from agent.targets.gateway import GatewayTarget
from agent.telemetry.metrics import Metrics
from agent.telemetry.story import Stories
from hil.bench import loops
from hil.bench.bare import bare_sampler, canonical_inputs
from hil.bench.report import Aim, CannotMeasure, Line
from hil.bench.stats import Sampler, Summary, alternate, timed_async

AIM = 1.3
AIM_MODEL_US = 200.0
NEAR = 1.5
"""A model counts as one of `AIM_MODEL_US` within this factor."""
ALWAYS_INLINE_MS, NEVER_INLINE_MS = 5.0, 0.0
BUDGET_S = 2.0
"""Deadline of a request: no part of what is measured."""


def measure(seconds: float) -> list[Line]:
    """Two lines for each variant, and the verdict."""
    catalog = for_gateway(load_catalog(catalog_path(None)))
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as folder, loops.runner() as runner:
        gateways = {
            name: runner.run(Gateway.open(catalog, limit_ms, Path(folder) / name / "cache.sqlite"))
            for name, limit_ms in (("inline", ALWAYS_INLINE_MS), ("pooled", NEVER_INLINE_MS))
        }
        try:
            for family in catalog.families.values():
                for variant in family.variants.values():
                    lines += _variant(runner, gateways, catalog, family, variant, seconds)
        finally:
            for gateway in gateways.values():
                runner.run(gateway.close())
    return _judged(lines)


def for_gateway(catalog: Catalog) -> Catalog:
    """The same catalogue, with every variant meant for the gateway as well."""
    targets: tuple[TargetKind, ...] = ("edge_mcu", "edge_gpu", "cloud")
    families = {
        name: family.model_copy(
            update={
                "variants": {
                    id_: variant.model_copy(update={"targets": targets}) for id_, variant in family.variants.items()
                }
            }
        )
        for name, family in catalog.families.items()
    }
    return catalog.model_copy(update={"families": families})


class Gateway:
    """The daemon without its doors: a pipeline over the gateway's target alone."""

    def __init__(self, catalog: Catalog, inline_below_ms: float, cache_path: Path) -> None:
        self._clock = SystemClock()
        settings, routing = _settings(inline_below_ms), RoutingSection()
        pool = RuntimePool(settings, self._clock, trial=False)
        self._target = GatewayTarget(settings, catalog, self._clock, max_bytes=math.inf, pool=pool)
        self._cache = ResultCache(FallbackSection(), cache_path, catalog, self._clock)
        stories = Stories(routing.explain_last, self._clock)
        router = Router([self._target], routing, self._clock, watcher=stories.routed)
        self.pipeline = Pipeline(catalog, router, self._cache, Metrics(), self._clock, routing, stories=stories)

    @classmethod
    async def open(cls, catalog: Catalog, inline_below_ms: float, cache_path: Path) -> Gateway:
        """Ready to answer: models are loaded. Raises `CannotMeasure`."""
        gateway = cls(catalog, inline_below_ms, cache_path)
        gateway._cache.open()
        await gateway._target.start()
        available = gateway._target.availability()
        if not available.available:
            raise CannotMeasure(available.reason)
        return gateway

    async def close(self) -> None:
        await self._target.stop()
        self._cache.close()

    def sampler(self, run: Callable[..., list[float]], catalog: Catalog, family: Family, variant: Variant) -> Sampler:
        """Seconds of each `Pipeline.infer`; making the request is the doors' part."""
        questions = self._questions(family, variant, canonical_inputs(catalog, family))
        return lambda seconds: run(timed_async(self.pipeline.infer, questions, seconds))

    def _questions(self, family: Family, variant: Variant, samples: Sequence[Tensor]) -> Iterator[InferenceRequest]:
        for number in itertools.count():
            now = self._clock.monotonic()
            yield InferenceRequest(
                id=f"bench-{number}",
                model=family.name,
                inputs={family.inputs[0].name: samples[number % len(samples)]},
                latency_class=LatencyClass.INTERACTIVE,
                received=now,
                deadline=now + BUDGET_S,
                variant=variant.id,
                producer="bench",
                use_cache=False,
            )


def _settings(inline_below_ms: float) -> GpuSection:
    """The CPU and nothing else, insisted on: then the target starts only when its models are loaded."""
    return GpuSection(inline_below_ms=inline_below_ms, providers=("cpu",), accelerator="cpu", strict_provider=True)


def _variant(
    runner: asyncio.Runner,
    gateways: Mapping[str, Gateway],
    catalog: Catalog,
    family: Family,
    variant: Variant,
    seconds: float,
) -> Sequence[Line]:
    sides: dict[str, Sampler] = {"bare": bare_sampler(catalog, family, variant)}
    for name, gateway in gateways.items():
        sides[name] = gateway.sampler(runner.run, catalog, family, variant)
        for _ in range(3):
            sides[name](0.01)  # until the pool has made up its mind where the model runs
    found = {name: side.scaled(1e6) for name, side in alternate(sides, seconds).items()}
    bare = found["bare"]
    floor = "bare LiteRT invoke" if variant.format == "tflite" else "bare ONNX Runtime invoke"
    lines = []
    for name in gateways:
        note = f"{found[name].p50 - bare.p50:.1f} us around the invoke"
        lines.append(Line("pipeline", f"{variant.name}, {name}", "us", found[name], floor, bare, note=note))
    return lines


def _judged(lines: list[Line]) -> list[Line]:
    """With the verdict on a model of 0.2 ms: measured where a shipped model is near that, else worked out."""
    inline = [line for line in lines if line.name.endswith("inline") and line.peer is not None]
    nearest = min(inline, key=lambda line: abs(math.log(_peer(line).p50 / AIM_MODEL_US)))
    aim = Aim(AIM)
    if AIM_MODEL_US / NEAR <= _peer(nearest).p50 <= AIM_MODEL_US * NEAR:
        judged = Line(
            "pipeline",
            f"of 0.2 ms: {nearest.name}",
            "us",
            nearest.ours,
            nearest.peer_name,
            nearest.peer,
            aim,
            f"measured: the shipped model nearest to {AIM_MODEL_US:.0f} us, from above",
        )
        return [*lines, judged]
    overhead = nearest.ours.p50 - _peer(nearest).p50
    count = nearest.ours.count
    worked_out = Summary(count, AIM_MODEL_US + overhead, AIM_MODEL_US + overhead)
    floor = Summary(count, AIM_MODEL_US, AIM_MODEL_US)
    note = (
        f"arithmetic, not measured: no shipped model takes about {AIM_MODEL_US:.0f} us here; "
        f"{overhead:.1f} us around {nearest.name}, put around {AIM_MODEL_US:.0f} us"
    )
    return [*lines, Line("pipeline", "of 0.2 ms: worked out", "us", worked_out, "0.2 ms", floor, aim, note)]


def _peer(line: Line) -> Summary:
    assert line.peer is not None
    return line.peer
