"""Measures every artefact of catalog.yaml again and compares it with what the catalogue records.

Prints one line per variant. Exits 1 if a digest, a size, an operator list, a parameter count, an
arena or a self-test differs, or an accuracy by more than its tolerance. `--cascade` also prints
what a family's small model decides alone at several confidence thresholds.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from training import artefact, catalog
from training.family import CATALOG, MODELS

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def measure_variant(
    variant: dict[str, Any], inputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[dict[str, Any], NDArray[np.float32], list[str]]:
    """Measured figures, probabilities [n, classes], and the names of figures that differ."""
    path = MODELS / variant["path"]
    model = artefact.load(path)
    probabilities = model.probabilities(inputs)
    measured = {
        "sha256": catalog.sha256(path),
        "bytes": len(model.data),
        "parameters": model.parameters,
        "operators": model.operators,
    }
    if "arena_bytes" in variant:
        measured["arena_bytes"] = artefact.measure_arena(model)
    differing = [key for key, value in measured.items() if value != variant[key]]
    accuracy = float(np.mean(probabilities.argmax(axis=1) == labels))
    recorded = variant["accuracy"]
    if abs(accuracy - recorded["value"]) > recorded["tolerance"]:
        differing.append("accuracy")
    if "selftest" in variant:
        with np.load(MODELS / variant["selftest"]) as vector:
            answers = artefact.micro_outputs(model, vector["inputs"])
            if not np.array_equal(answers, vector["outputs"]):
                differing.append("selftest")
    return measured | {"accuracy": accuracy}, probabilities, differing


def print_cascade(small: NDArray[np.float32], large: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    """Share answered by `small` and accuracy of the pair, by threshold on small's confidence."""
    for threshold in THRESHOLDS:
        alone = small.max(axis=1) >= threshold
        answers = np.where(alone, small.argmax(axis=1), large.argmax(axis=1))
        right = np.mean(answers == labels)
        print(f"  confidence >= {threshold:.2f}: {alone.mean():6.1%} alone, accuracy {right:.4f}")


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Measures every model of the catalogue.")
    parser.add_argument("--cascade", action="store_true", help="small model first, large if unsure")
    options = parser.parse_args()
    failed = False
    for name, family in catalog.read(CATALOG)["families"].items():
        with np.load(MODELS / family["data"]["heldout"]) as heldout:
            inputs, labels = heldout["inputs"], heldout["labels"]
        outputs = []
        for variant_name, variant in family["variants"].items():
            measured, probabilities, differing = measure_variant(variant, inputs, labels)
            outputs.append(probabilities)
            failed |= bool(differing)
            arena = f"{measured['arena_bytes']} B" if "arena_bytes" in measured else "-"
            print(
                f"{name + '/' + variant_name:20} accuracy {measured['accuracy']:.4f} of "
                f"{len(labels)} (mean confidence {probabilities.max(axis=1).mean():.3f}), "
                f"{measured['parameters']} parameters, {measured['bytes']} B, arena {arena}, "
                f"{' '.join(measured['operators'])}" + (f"  DIFFERS: {', '.join(differing)}" if differing else "")
            )
        if options.cascade:
            print_cascade(outputs[0], outputs[-1], labels)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
