"""What the daemon's answers tell about themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median

from hil.bench.report import CannotMeasure


def compute_us(answers: Sequence[bytes]) -> float:
    """Median of the model's own time. Raises `CannotMeasure` if one is not a computed answer."""
    documents = [json.loads(answer) for answer in answers]
    for document in documents:
        if "error" in document or document["cached"]:
            raise CannotMeasure(f"not a computed answer: {str(document)[:300]}")
    times_ms: list[float] = [document["timing_ms"]["compute"] for document in documents]
    return median(times_ms) * 1e3
