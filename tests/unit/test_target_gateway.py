"""The gateway target on the shipped models."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from agent.config import GpuSection
from agent.core.clock import SystemClock
from agent.core.errors import TargetFailed, TargetTimeout, TargetUnavailable
from agent.core.types import InferenceRequest, LatencyClass, Tensor, Tier
from agent.registry.catalog import Catalog, Family, Variant, load_catalog
from agent.registry.tensors import classify, from_variant, to_variant
from agent.runtimes.base import Format, Runtime, RuntimeUnavailable
from agent.runtimes.isolated import ProcessEngine
from agent.runtimes.litert import LiteRtRuntime
from agent.runtimes.pool import RuntimePool
from agent.runtimes.runners import RuntimeOptions
from agent.targets.gateway import GatewayTarget

CATALOG = load_catalog(Path(__file__).resolve().parents[2] / "models" / "catalog.yaml")
DIGITS = CATALOG.families["digits"]
CLOCK = SystemClock()
MAX_BYTES = 10e6
SOON_S = 20.0


def with_targets(**targets: tuple[str, ...]) -> Catalog:
    """The shipped catalogue with other tiers for some variants of digits."""
    variants = {
        id_: variant.model_copy(update={"targets": targets.get(id_.replace("-", "_"), variant.targets)})
        for id_, variant in DIGITS.variants.items()
    }
    return CATALOG.model_copy(update={"families": {"digits": DIGITS.model_copy(update={"variants": variants})}})


ALL_HERE = with_targets(mcu_int8=("edge_mcu", "edge_gpu"), cloud_fp32=("cloud", "edge_gpu"))


def request(family: Family, value: Tensor) -> InferenceRequest:
    return InferenceRequest(
        id="r",
        model=family.name,
        inputs={family.inputs[0].name: value},
        latency_class=LatencyClass.NEAR,
        received=CLOCK.monotonic(),
        deadline=CLOCK.monotonic() + SOON_S,
    )


def heldout(family: Family) -> tuple[Tensor, Tensor]:
    with np.load(CATALOG.root / family.data.heldout) as data:
        return data["inputs"], data["labels"]


async def started(
    catalog: Catalog = CATALOG, settings: GpuSection | None = None, *, max_bytes: float = MAX_BYTES, **pool: object
) -> GatewayTarget:
    settings = settings or GpuSection()
    own = RuntimePool(settings, CLOCK, trial=False, **pool) if pool else None  # type: ignore[arg-type]
    target = GatewayTarget(settings, catalog, CLOCK, max_bytes=max_bytes, pool=own)
    await target.start()
    while target.availability().reason == "loading its models":  # noqa: ASYNC110 - nothing else tells
        await asyncio.sleep(0.005)
    return target


def chosen(target: GatewayTarget, family: Family, pinned: str | None = None) -> Variant:
    variant = target.variant_for(family, pinned)
    assert variant is not None
    return variant


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_answers_as_accurately_as_the_catalogue_says(isolation: str) -> None:
    target = await started(settings=GpuSection(isolation=isolation))
    assert target.availability().available
    for family in CATALOG.families.values():
        variant = chosen(target, family)
        inputs, labels = heldout(family)
        right = 0
        for value, label in zip(inputs, labels, strict=True):
            asked = request(family, value[np.newaxis])
            answer = await target.infer(asked, family, variant, asked.deadline)
            right += family.labels.index(classify(answer.outputs, family)[0]) == label
        assert right / len(labels) == pytest.approx(variant.accuracy.value, abs=variant.accuracy.tolerance)
        assert answer.provider.startswith("litert ")
        assert answer.queue_s >= 0 and answer.compute_s > 0 and answer.link_s >= 0
        assert (answer.bytes_sent, answer.bytes_received) == (0, 0)
    await target.stop()


@pytest.mark.parametrize("id_", DIGITS.variants)
async def test_every_variant_equals_the_library_called_directly(id_: str) -> None:
    target = await started(ALL_HERE)
    family = ALL_HERE.families["digits"]
    variant = chosen(target, family, id_)
    runner = RuntimeOptions().runtime(variant.format).load(CATALOG.path(variant))
    for value in heldout(family)[0][:20]:
        asked = request(family, value[np.newaxis])
        answer = await target.infer(asked, family, variant, asked.deadline)
        expected = from_variant(runner.run(to_variant(asked.inputs, variant)), variant, family)
        assert answer.outputs.keys() == expected.keys()
        for name, output in answer.outputs.items():
            assert output.shape == family.outputs[0].shape and output.dtype == np.float32
            np.testing.assert_allclose(output, expected[name], rtol=1e-5, atol=1e-7)
    await target.stop()


async def test_traits_and_choice() -> None:
    target = await started(ALL_HERE, GpuSection(max_concurrent=7, timeout_ms=150))
    traits = target.traits
    assert (traits.name, traits.tier, traits.order, traits.cost_usd) == ("edge_gpu", Tier.EDGE_GPU, 10, 0)
    assert (traits.max_concurrent, traits.timeout_s, traits.max_bytes) == (7, 0.15, MAX_BYTES)
    family = ALL_HERE.families["digits"]
    assert chosen(target, family).id == "cloud-fp32", "the most accurate"
    assert chosen(target, family, "mcu-int8").id == "mcu-int8"
    assert target.variant_for(family, "none") is None
    await target.stop()


async def test_it_is_not_available_while_it_loads() -> None:
    target = GatewayTarget(GpuSection(), CATALOG, CLOCK, max_bytes=MAX_BYTES)
    assert not target.availability().available
    await target.start()
    assert target.availability().reason == "loading its models"
    assert chosen(target, DIGITS).id == "gateway-fp16"
    asked = request(DIGITS, np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(TargetUnavailable):
        await target.infer(asked, DIGITS, chosen(target, DIGITS), asked.deadline)
    await target.stop()


def without_onnx(format: Format) -> Runtime:
    if format == "onnx":
        raise RuntimeUnavailable("onnxruntime is not installed")
    return LiteRtRuntime()


async def test_without_a_library_the_other_variants_answer() -> None:
    target = await started(ALL_HERE, factory=without_onnx)
    family = ALL_HERE.families["digits"]
    assert target.availability().available
    assert chosen(target, family).id == "gateway-fp16", "the most accurate of those that load"
    assert target.variant_for(family, "cloud-fp32") is None
    assert target.status()["models_refused"] == {"digits/cloud-fp32": "onnxruntime is not installed"}
    await target.stop()


async def test_with_no_library_at_all_it_says_why() -> None:
    only_onnx = with_targets(gateway_fp16=("cloud",), cloud_fp32=("edge_gpu",))
    target = await started(only_onnx, factory=without_onnx)
    availability = target.availability()
    assert not availability.available
    assert availability.reason == "onnxruntime is not installed"
    assert target.variant_for(only_onnx.families["digits"], None) is None
    await target.stop()


async def test_a_load_that_fails_unexpectedly_is_the_reason_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mended = threading.Event()

    def broken_at_first(format: Format) -> Runtime:
        if not mended.is_set():
            raise OSError("the driver's library has the wrong version")
        return LiteRtRuntime()

    monkeypatch.setattr("agent.targets.gateway.RELOAD_INITIAL_S", 0.01)
    monkeypatch.setattr("agent.targets.gateway.RELOAD_MAX_S", 0.01)
    target = await started(factory=broken_at_first)
    assert target.availability().reason == "loading failed: the driver's library has the wrong version"
    assert target.parts()["models"] == ("degraded", target.availability().reason)
    mended.set()
    async with asyncio.timeout(SOON_S):
        while not target.availability().available:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.005)
    assert target.parts() == {"models": ("up", "")}
    await target.stop()


async def test_models_over_the_limit_are_not_loaded() -> None:
    target = await started(max_bytes=25_000)
    assert target.status()["models_loaded"] == ["motion/gateway-fp16"]
    assert target.status()["models_refused"] == {"digits/gateway-fp16": "31024 bytes, over the limit of 25000"}
    await target.stop()


async def test_strict_provider_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.runtimes.litert._GPU_NODES", ())
    strict = GpuSection(strict_provider=True, providers=("cuda", "cpu"))
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this build of ONNX Runtime has CUDA")
    target = GatewayTarget(strict, ALL_HERE, CLOCK, max_bytes=MAX_BYTES)
    with pytest.raises(RuntimeUnavailable, match="has no cuda provider"):
        await target.start()
    await target.stop()
    accepted = await started(ALL_HERE, GpuSection(strict_provider=True, providers=("cpu",)))
    assert accepted.availability().available
    await accepted.stop()


async def test_inputs_that_do_not_fit_are_a_failed_attempt() -> None:
    target = await started(ALL_HERE)
    family = ALL_HERE.families["digits"]
    for id_ in family.variants:
        asked = request(family, np.zeros((1, 3), np.float32))
        with pytest.raises(TargetFailed):
            await target.infer(asked, family, chosen(target, family, id_), asked.deadline)
    await target.stop()


async def test_the_deadline_is_kept() -> None:
    target = await started()
    asked = request(DIGITS, np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(TargetTimeout):
        await target.infer(asked, DIGITS, chosen(target, DIGITS), CLOCK.monotonic() - 1)
    await target.stop()


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_status_is_plain_json(isolation: str) -> None:
    target = await started(settings=GpuSection(isolation=isolation))
    status = json.loads(json.dumps(target.status()))
    assert status["models_loaded"] == ["digits/gateway-fp16", "motion/gateway-fp16"]
    pool = status["pool"]
    assert pool["isolation"] == isolation and pool["workers"] == 2 and pool["limit"] == 5
    assert [runtime.split()[0] for runtime in pool["runtimes"]] == ["litert"]
    for model in pool["models"].values():
        assert model["service_ms_p50"] > 0
        assert "litert" in model["provider"]
    await target.stop()


async def test_a_model_that_was_left_out_is_not_asked_and_takes_no_other_along() -> None:
    """Of a runtime process it is forgotten after it ended that process three times."""
    target = await started(settings=GpuSection(isolation="process"))
    bad, good = chosen(target, DIGITS), chosen(target, CATALOG.families["motion"])
    engine = target._pool._engine
    assert isinstance(engine, ProcessEngine)
    del engine._files[bad.sha256]
    assert list(target.variants_for(DIGITS, None)) == [] and list(target.variants_for(DIGITS, bad.id)) == []
    assert list(target.variants_for(CATALOG.families["motion"], None)) == [good]
    models = target.parts()["models"]
    assert bad.name in models.reason and "left out" in models.reason
    assert target.availability().available
    engine._files.clear()
    assert not target.availability().available and "left out" in target.availability().reason
    await target.stop()
