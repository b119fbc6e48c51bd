"""`edge-agent models calibrate`: runs a family's variants over its held-out data, fits what their confidence is worth,
and writes that into the catalogue."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agent.core.errors import ConfigError, TargetFailed
from agent.core.types import Tensors
from agent.registry import fitting
from agent.registry.calibration import Calibration, Cascade, least_probability, wilson
from agent.registry.catalog import Catalog, Family, Variant, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.tensors import from_variant, to_variant
from agent.runtimes.base import RuntimeUnavailable
from agent.runtimes.runners import RuntimeOptions

EXIT_OK, EXIT_FAILED = 0, 1
MAX_LOSS = 0.005
"""Share of answers that a cascade may have wrong and the most accurate variant right."""
MICRO_ARENA_BYTES = 1 << 20
ALLOWED_CHANGE = 0.02
"""By which `--check` lets a temperature or a share differ: another processor rounds differently."""


@dataclass(frozen=True, slots=True)
class Report:
    """All variants of a family, least accurate first; `ladder` is the cascade through all of them, cross-validated."""

    family: Family
    measured: tuple[Measured, ...]
    ladder: fitting.Judgement


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant over the held-out data."""

    variant: Variant
    answers: fitting.Answers
    provider: str
    calibration: Calibration
    curve: fitting.Curve | None


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    if not 0 <= args.max_loss < 1:
        raise ConfigError([f"--max-loss: must be at least 0 and below 1, found {args.max_loss:g}"])
    path = catalog_path(args.catalog)
    catalog = load_catalog(path, verify=False, calibrated=False)
    report = measure(catalog, catalog.family(args.family), args.max_loss)
    measured = report.measured
    for one in measured:
        _show(one)
    if len(measured) > 2:
        way = " -> ".join(one.variant.id for one in measured)
        share = report.ladder.offload
        print(f"{way}: accuracy {report.ladder.accuracy:.4f}, the last is asked for {share:.1%}")
    if args.json:
        args.json.write_text(json.dumps(as_json(report), indent=1) + "\n")
    if args.plot:
        from agent.cli_calibrate_plot import draw

        draw(report, args.plot)
    if args.check:
        differing = [one.variant.name for one in measured if _differs(one.variant.calibration, one.calibration)]
        for name in differing:
            print(f"{name}: the catalogue has another calibration", file=sys.stderr)
        return EXIT_FAILED if differing else EXIT_OK
    write(path, report.family.name, {one.variant.id: one.calibration for one in measured})
    print(f"{path}: calibration of {len(measured)} variants written")
    return EXIT_OK


def measure(catalog: Catalog, family: Family, max_loss: float = MAX_LOSS) -> Report:
    """Run every variant over the family's held-out data, one sample at a time, and fit.

    The data are an `.npz` with `inputs` [n, ...], canonical, and `labels` [n], indices of classes. Raises
    `ConfigError`.
    """
    inputs, labels, digest = _held_out(catalog, family)
    ladder = sorted(
        family.variants.values(),
        key=lambda variant: (variant.accuracy.value, "cloud" in variant.targets, variant.bytes),
    )
    run = {variant.id: _answers(catalog, family, variant, inputs) for variant in ladder}
    reference = ladder[-1]
    right = run[reference.id][0].classes
    measured = []
    for variant in ladder:
        answers, provider = run[variant.id]
        temperature = fitting.fit_temperature(answers, labels)
        cascade = curve = None
        if variant is not reference:
            confidences = answers.confidences(temperature)
            cascade = _cascade(answers, temperature, right, labels, reference, max_loss)
            curve = fitting.curve(confidences, answers.classes, right, labels)
        calibration = Calibration(
            temperature=temperature,
            samples=len(labels),
            data_sha256=digest,
            sha256=_digest(catalog.path(variant)),
            cascade=cascade,
        )
        measured.append(Measured(variant, answers, provider, calibration, curve))
    ladder_judged = fitting.judge([one.answers for one in measured[:-1]], right, labels, max_loss)
    return Report(family, tuple(measured), ladder_judged)


def _cascade(
    answers: fitting.Answers,
    temperature: float,
    reference: fitting.Integers,
    labels: fitting.Integers,
    variant: Variant,
    max_loss: float,
) -> Cascade:
    classes, samples = answers.classes, len(labels)
    threshold = fitting.fit_threshold(
        answers.confidences(temperature), fitting.lost(classes, reference, labels), fitting.AIM * max_loss
    )
    judged = fitting.judge([answers], reference, labels, max_loss)
    low, high = wilson(judged.accuracy * samples, samples)
    agreed, right = classes == reference, classes == labels
    return Cascade(
        threshold=math.floor(threshold * 1e6) / 1e6,
        max_loss=max_loss,
        offload=round(judged.offload, 4),
        accuracy=round(judged.accuracy, 4),
        low=round(min(low, judged.accuracy), 4),
        high=round(max(high, judged.accuracy), 4),
        reference=variant.id,
        reference_sha256=variant.sha256,
        agreement=round(float(agreed.mean()), 4),
        right_if_agreed=_share(right[agreed]),
        right_if_not=_share(right[~agreed]),
    )


def _share(right: fitting.Mask) -> float:
    """0 of nothing: a small model that differs is taken to be wrong where none ever was seen to differ."""
    return round(float(right.mean()), 4) if right.size else 0.0


def _held_out(catalog: Catalog, family: Family) -> tuple[np.ndarray[Any, Any], fitting.Integers, str]:
    path = catalog.root / family.data.heldout
    try:
        digest = _digest(path)
        with np.load(path) as file:
            inputs, labels = file["inputs"], file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError([f"{path}: must be an .npz with inputs and labels: {error}"]) from None
    at = f"families.{family.name}.data"
    if digest != family.data.heldout_sha256:
        raise ConfigError([f"{at}.heldout_sha256: {family.data.heldout} is not the file recorded; its is {digest}"])
    if len(family.inputs) != 1:
        raise ConfigError([f"families.{family.name}.inputs: held-out data are for families with one input"])
    if len(inputs) != len(labels) or not len(labels) or not 0 <= labels.min() <= labels.max() < len(family.labels):
        raise ConfigError([f"{path}: needs one label from 0 to {len(family.labels) - 1} for each input"])
    return inputs, labels, digest


def _answers(
    catalog: Catalog, family: Family, variant: Variant, inputs: np.ndarray[Any, Any]
) -> tuple[fitting.Answers, str]:
    """What the tier would give: the file's own outputs, made canonical as the daemon makes them."""
    spec = family.inputs[0]
    try:
        run, provider = _runner(catalog, variant)
        rows = []
        for sample in inputs:
            canonical = {spec.name: np.ascontiguousarray(sample, dtype=spec.dtype).reshape(spec.shape)}
            outputs = from_variant(run(to_variant(canonical, variant)), variant, family)
            rows.append(outputs[family.outputs[0].name].ravel())
    except (OSError, ValueError, RuntimeError, RuntimeUnavailable, TargetFailed) as error:
        raise ConfigError([f"families.{family.name}.variants.{variant.id}: does not run: {error}"]) from None
    least = least_probability(variant.outputs[0].scale, len(family.labels))
    return fitting.Answers(np.array(rows, np.float64), least), provider


def _runner(catalog: Catalog, variant: Variant) -> tuple[Callable[[Tensors], Tensors], str]:
    """For a microcontroller its own runtime where this machine has it; LiteRT is within a step of it."""
    if "edge_mcu" in variant.targets and len(variant.inputs) == len(variant.outputs) == 1:
        try:
            micro = importlib.import_module("tflite_micro").runtime
        except ImportError:
            pass
        else:
            interpreter = micro.Interpreter.from_bytes(catalog.path(variant).read_bytes(), arena_size=MICRO_ARENA_BYTES)

            def run(inputs: Tensors) -> Tensors:
                interpreter.set_input(inputs[variant.inputs[0].name], 0)
                interpreter.invoke()
                return {variant.outputs[0].name: interpreter.get_output(0)}

            return run, "tflite-micro"
    loaded = RuntimeOptions(accelerator="cpu").runtime(variant.format).load(catalog.path(variant))
    return loaded.run, loaded.provider


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(one: Measured) -> None:
    calibration = one.calibration
    on = f"{calibration.samples} samples, {one.provider}"
    print(f"{one.variant.name}: temperature {calibration.temperature:g} ({on})")
    cascade = calibration.cascade
    if cascade is not None:
        print(
            f"  threshold {cascade.threshold:.4f}: {cascade.offload:.1%} asked again of {cascade.reference}, accuracy "
            f"{cascade.accuracy:.4f} ({cascade.low:.4f} to {cascade.high:.4f}), agreement {cascade.agreement:.4f}"
        )


def _differs(recorded: Calibration | None, found: Calibration) -> bool:
    if recorded is None:
        return True
    old, new = recorded.model_dump(), found.model_dump()
    shares = [(a, b) for a, b in zip(_leaves(old), _leaves(new), strict=True) if a != b]
    return any(not isinstance(a, float) or not isinstance(b, float) or abs(a - b) > ALLOWED_CHANGE for a, b in shares)


def _leaves(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, Mapping) else [tree]


def as_json(report: Report) -> dict[str, Any]:
    """What was fitted, and the curves, as plain JSON types."""
    return {
        "family": report.family.name,
        "ladder": asdict(report.ladder),
        "variants": {
            one.variant.id: {
                "accuracy": one.variant.accuracy.value,
                "provider": one.provider,
                "calibration": one.calibration.model_dump(mode="json"),
                "curve": None if one.curve is None else asdict(one.curve),
            }
            for one in report.measured
        },
    }


def write(path: Path, family: str, calibrations: Mapping[str, Calibration]) -> None:
    """Set `calibration` of these variants in a catalogue, and leave every other character as it is.

    Raises `ConfigError` where a variant is not written as a block of lines, or the file cannot be written.
    """
    path = path.resolve()
    text = path.read_bytes().decode()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    edits: list[tuple[int, int, str]] = []
    for id_, calibration in calibrations.items():
        variant = _at(root, "families", family, "variants", id_)
        if not isinstance(variant, yaml.MappingNode) or variant.flow_style:
            raise ConfigError([f"{path}: families.{family}.variants.{id_}: must have a line for each key"])
        known = next(((key, value) for key, value in variant.value if key.value == "calibration"), None)
        line = f"calibration: {_flow(calibration)}"
        if known is not None:
            edits.append((known[0].start_mark.index, known[1].end_mark.index, line))
        else:
            after = next((at for at in variant.value if at[0].value == "inputs"), variant.value[0])[0].start_mark
            edits.append((after.index, after.index, f"{line}\n{' ' * after.column}"))
    for start, end, line in sorted(edits, reverse=True):
        text = text[:start] + line + text[end:]
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(text.encode())
        shutil.copymode(path, aside)
        aside.replace(path)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error.strerror or error}"]) from None


def _at(node: Any, *keys: str) -> Any:
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for name, value in pairs if name.value == key), None)
    return node


def _flow(calibration: Calibration) -> str:
    plain = calibration.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000).strip()
