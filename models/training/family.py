"""From a family's definition and data to its files and its entry in the catalogue."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from agent import cli_calibrate
from agent.registry.catalog import load_catalog
from training import artefact, catalog, export, fit
from training.data import Dataset, Floats

MODELS = Path(__file__).resolve().parent.parent
CATALOG = MODELS / "catalog.yaml"
FOLDS = 5
EXTENSIONS = {"int8": "tflite", "float16": "tflite", "float32": "onnx"}


@dataclass(frozen=True)
class Variant:
    """One model of a family. The quantisation fixes the file format: float32 is ONNX.

    `tolerance` is the difference in accuracy allowed to a repeated training.
    """

    recipe: fit.Recipe
    quantisation: str
    targets: tuple[str, ...]
    tolerance: float
    version: int = 1


@dataclass(frozen=True)
class Family:
    """What the catalogue says of a family beside its measured figures.

    `validation` is the fraction of the training data that sets the softmax temperature (0: none);
    `scale` divides the input while training, one value per channel.
    """

    name: str
    script: str
    description: str
    labels: tuple[str, ...]
    input: dict[str, Any]
    provenance: dict[str, str]
    scale: Floats
    validation: float
    variants: dict[str, Variant]


def main(family: Family, data: Dataset, arguments: Sequence[str] | None = None) -> int:
    """Command line of a training script; returns the exit status."""
    parser = argparse.ArgumentParser(description=f"Trains the {family.name} models.")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="train aside and compare with the catalogue")
    mode.add_argument("--cross-validate", action="store_true", help="score the recipes on the training data")
    options = parser.parse_args(arguments)
    fit.make_deterministic()
    if options.cross_validate:
        return _cross_validate(family, data, options.seed)
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            return _compare(family, build(family, data, Path(folder), options.seed))
    catalog.write_family(CATALOG, family.name, build(family, data, MODELS, options.seed))
    calibrate(family.name)
    return 0


def calibrate(name: str) -> None:
    """What `edge-agent models calibrate` does: adds to the entry what the variants' confidence is worth."""
    whole = load_catalog(CATALOG, calibrated=False)
    report = cli_calibrate.measure(whole, whole.family(name))
    cli_calibrate.write(CATALOG, name, {one.variant.id: one.calibration for one in report.measured})


def build(family: Family, data: Dataset, root: Path, seed: int) -> dict[str, Any]:
    """Trains every variant, writes the family's files under `root`, returns its entry."""
    (root / family.name).mkdir(exist_ok=True)
    heldout = root / family.name / "heldout.npz"
    data.save_heldout(heldout)
    output = {"name": export.OUTPUT_NAME, "dtype": "float32", "shape": [1, len(family.labels)]}
    return {
        "description": family.description,
        "task": "classification",
        "labels": list(family.labels),
        "inputs": [family.input],
        "outputs": [output],
        "data": family.provenance
        | {
            "heldout": f"{family.name}/{heldout.name}",
            "heldout_sha256": catalog.sha256(heldout),
            "heldout_samples": len(data.heldout_labels),
        },
        "variants": {
            name: _build_variant(family, name, variant, data, root, seed) for name, variant in family.variants.items()
        },
    }


def _build_variant(family: Family, name: str, variant: Variant, data: Dataset, root: Path, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    path = root / family.name / f"{name}.{EXTENSIONS[variant.quantisation]}"
    path.write_bytes(_train_and_export(family, variant, data, seed))
    model = artefact.load(path)
    probabilities = model.probabilities(data.heldout_inputs)
    accuracy = float(np.mean(probabilities.argmax(axis=1) == data.heldout_labels))
    entry = {
        "path": f"{family.name}/{path.name}",
        "format": model.format,
        "quantisation": variant.quantisation,
        "targets": list(variant.targets),
        "version": variant.version,
        "sha256": catalog.sha256(path),
        "bytes": len(model.data),
        "parameters": model.parameters,
        "operators": model.operators,
    }
    if variant.quantisation == "int8":
        entry["arena_bytes"] = artefact.measure_arena(model)
    entry |= {
        "accuracy": {
            "value": round(accuracy, 4),
            "samples": len(data.heldout_labels),
            "tolerance": variant.tolerance,
        },
        "inputs": [_tensor_entry(model.input, family.input["name"])],
        "outputs": [_tensor_entry(model.output, export.OUTPUT_NAME)],
    }
    if variant.quantisation == "int8":
        selftest = path.with_suffix(".selftest.npz")
        _write_selftest(model, data, selftest)
        entry["selftest"] = f"{family.name}/{selftest.name}"
    elapsed = time.monotonic() - started
    print(f"{family.name} {name}: accuracy {accuracy:.4f}, {elapsed:.0f} s", flush=True)
    return entry | {"script": family.script}


def _train_and_export(family: Family, variant: Variant, data: Dataset, seed: int) -> bytes:
    """The model file of one variant. The held-out data plays no part."""
    inputs, labels, temperature = data.train_inputs, data.train_labels, 1.0
    if family.validation:
        inputs, check_inputs, labels, check_labels = train_test_split(
            inputs, labels, test_size=family.validation, stratify=labels, random_state=seed
        )
    models = fit.train(variant.recipe, inputs, labels, family.scale, seed)
    if family.validation:
        outputs = fit.logits(models, check_inputs, family.scale)
        temperature = fit.fit_temperature(outputs, check_labels)
    networks = fit.folded(models, family.scale, temperature)
    name, shape = family.input["name"], family.input["shape"]
    match variant.quantisation:
        case "int8":
            return export.to_int8_tflite(networks[0], name, shape, inputs)
        case "float16":
            return export.to_float16_tflite(networks[0], name, shape)
        case _:
            return export.to_onnx(networks, name, shape)


def _tensor_entry(tensor: artefact.Tensor, maps: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tensor.name, "maps": maps, "dtype": tensor.dtype}
    entry["shape"] = tensor.shape
    if tensor.quantisation is not None:
        entry["scale"], entry["zero_point"] = tensor.quantisation
    return entry


def _write_selftest(model: artefact.Artefact, data: Dataset, path: Path) -> None:
    """The first held-out sample of each class, stored form, and the micro runtime's answers."""
    _, first = np.unique(data.heldout_labels, return_index=True)
    inputs = model.input.encode(data.heldout_inputs[first])
    np.savez_compressed(path, inputs=inputs, outputs=artefact.micro_outputs(model, inputs))


def _compare(family: Family, entry: dict[str, Any]) -> int:
    """Prints a repeated training beside the catalogue; 1 if any accuracy left its tolerance."""
    failed = False
    recorded = catalog.read(CATALOG)["families"][family.name]["variants"]
    for name, variant in entry["variants"].items():
        expected = recorded[name]["accuracy"]
        difference = variant["accuracy"]["value"] - expected["value"]
        identical = variant["sha256"] == recorded[name]["sha256"]
        failed |= abs(difference) > expected["tolerance"]
        print(f"{name}: {difference:+.4f} (tolerance {expected['tolerance']}), {identical=}")
    return int(failed)


def _cross_validate(family: Family, data: Dataset, seed: int) -> int:
    inputs, labels = data.train_inputs, data.train_labels
    for name, variant in family.variants.items():
        folds = fit.cross_validate(variant.recipe, inputs, labels, family.scale, seed, FOLDS)
        each = " ".join(f"{value:.4f}" for value in folds)
        print(f"{family.name} {name}: mean {np.mean(folds):.4f} of {each}", flush=True)
    return 0
