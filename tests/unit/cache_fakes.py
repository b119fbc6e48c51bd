"""Answers and caches for the tests of the result cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agent.config import FallbackSection
from agent.core.clock import ManualClock
from agent.core.types import InferenceResult, LatencyClass, Tier
from agent.store.cache import Hit, ResultCache, cache_key

SHA, OTHER_SHA = "a" * 64, "b" * 64
FRESH_S, STALE_S = 10.0, 100.0


class Models:
    def __init__(self, *known: str) -> None:
        self.known = known or (SHA,)

    def by_sha256(self, sha256: str) -> object | None:
        return sha256 if sha256 in self.known else None


def section(size: int = 10_000, *, stale: bool = True) -> FallbackSection:
    return FallbackSection(cache_ttl=FRESH_S, stale_ttl=STALE_S, max_cache_size=size, enable_stale_results=stale)


def answer(value: float = 1.0, *, variant: str = "v1", sha256: str = SHA) -> InferenceResult:
    return InferenceResult(
        request_id="r",
        model="digits",
        variant=variant,
        model_sha256=sha256,
        outputs={"probabilities": np.array([[value, 1 - value]], np.float32)},
        label="3",
        confidence=0.75,
        tier=Tier.EDGE_GPU,
        origin_tier=Tier.EDGE_GPU,
        target="edge_gpu",
        provider="litert 2.3.0/xnnpack",
        latency_class=LatencyClass.NEAR,
        queue_s=0,
        link_s=0,
        compute_s=0,
        total_s=0,
        deadline_met=True,
        cost_usd=0,
        cached=False,
        stale=False,
        age_s=0,
        attempts=(),
        reasons=(),
    )


def key(n: float, model: str = "digits", variant: str | None = None) -> tuple[str, str, bytes]:
    return cache_key(model, variant, {"image": np.full((1, 4), n, np.float32)})


def value_of(hit: Hit | None) -> float | None:
    return None if hit is None else float(hit.entry.outputs["probabilities"][0, 0])


def opened(path: Path | None, clock: ManualClock, size: int = 10_000, **options: Any) -> ResultCache:
    cache = ResultCache(section(size, **options), path, Models(), clock)
    cache.open()
    return cache
