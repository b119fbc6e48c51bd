"""The model catalogue: `catalog.yaml`, validated whole and frozen.

A *family* is what a caller asks for (`digits`). Its *variants* are model files of different size and accuracy that
answer the same question: the same canonical input, the same labels.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.core.documents import NotYaml, decode_yaml, read_bounded
from agent.core.errors import ConfigError, UnknownModel
from agent.core.types import Complexity
from agent.registry.calibration import Calibration

TargetKind = Literal["edge_mcu", "edge_gpu", "cloud"]
DType = Literal["float32", "float16", "int8", "uint8", "int16", "int32", "int64"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]

MAX_CATALOG_BYTES = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class FamilyTensor(_Strict):
    """A canonical tensor: what callers send and get. Batch size is always 1."""

    name: Identifier
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = Field(min_length=1, max_length=6)
    minimum: float | None = None
    maximum: float | None = None
    unit: str | None = None
    channels: tuple[str, ...] | None = None


class VariantTensor(_Strict):
    """A tensor as the model file names it; `maps` names the canonical one.

    Integer tensors hold `round(real / scale) + zero_point`.
    """

    name: str
    maps: Identifier
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...]
    scale: float | None = Field(default=None, gt=0)
    zero_point: int | None = None

    @model_validator(mode="after")
    def _integers_are_quantised(self) -> Self:
        if self.dtype in ("int8", "uint8", "int16") and (self.scale is None or self.zero_point is None):
            raise ValueError(f"tensor {self.name!r} is {self.dtype} and needs scale and zero_point")
        if (self.scale is None) != (self.zero_point is None):
            raise ValueError(f"tensor {self.name!r}: scale and zero_point go together")
        if self.zero_point is not None:
            if self.dtype not in ("int8", "uint8", "int16", "int32"):
                raise ValueError(f"tensor {self.name!r} is {self.dtype}: scale and zero_point are for small integers")
            limits = np.iinfo(self.dtype)
            if not limits.min <= self.zero_point <= limits.max:
                raise ValueError(f"tensor {self.name!r}: zero_point {self.zero_point} is no {self.dtype}")
        return self


class Accuracy(_Strict):
    """Share of held-out samples that were right, as measured when the model was made."""

    value: float = Field(ge=0, le=1)
    samples: int = Field(ge=1)
    tolerance: float = Field(ge=0, le=1)


class Variant(_Strict):
    """One model file. `id` and `model` are filled in from its place in the catalogue."""

    model: str = ""
    id: str = ""
    path: str
    format: Literal["tflite", "onnx"]
    quantisation: Literal["int8", "float16", "float32"]
    targets: tuple[TargetKind, ...] = Field(min_length=1)
    version: int = Field(ge=1)
    sha256: Sha256
    bytes: int = Field(ge=1)
    parameters: int = Field(ge=1)
    operators: tuple[str, ...]
    arena_bytes: int | None = Field(default=None, ge=16)
    accuracy: Accuracy
    calibration: Calibration | None = None
    inputs: tuple[VariantTensor, ...] = Field(min_length=1)
    outputs: tuple[VariantTensor, ...] = Field(min_length=1)
    selftest: str | None = None
    script: str

    @cached_property
    def name(self) -> str:
        """`family/variant`, unique in a catalogue."""
        return f"{self.model}/{self.id}"

    @cached_property
    def asked_last(self) -> bool:
        """Whether it is the variant that a calibrated family's cascade ends with."""
        return self.calibration is not None and self.calibration.cascade is None

    @cached_property
    def cascade_gain(self) -> float:
        """By how much accuracy rises where what this variant is not sure of is asked again; 0 without a calibration."""
        cascade = None if self.calibration is None else self.calibration.cascade
        return 0.0 if cascade is None else max(0.0, cascade.accuracy - self.accuracy.value)


class FamilyData(_Strict):
    """Where the training data came from, and the held-out part that ships."""

    name: str
    source: str
    licence: str
    split: str
    heldout: str
    heldout_sha256: Sha256
    heldout_samples: int = Field(ge=1)


class Family(_Strict):
    """A question that can be asked, and the variants that can answer it."""

    name: str = ""
    description: str
    task: Literal["classification"]
    labels: tuple[str, ...] = Field(min_length=2)
    inputs: tuple[FamilyTensor, ...] = Field(min_length=1)
    outputs: tuple[FamilyTensor, ...] = Field(min_length=1)
    data: FamilyData
    variants: Mapping[Identifier, Variant] = Field(min_length=1)

    @cached_property
    def _by_kind(self) -> dict[str, Variant]:
        kinds: dict[str, Variant] = {}
        for variant in self.variants.values():
            for kind in variant.targets:
                best = kinds.get(kind)
                if best is None or variant.accuracy.value > best.accuracy.value:
                    kinds[kind] = variant
        return kinds

    def variant_for(self, kind: TargetKind, pinned: str | None = None) -> Variant | None:
        """The most accurate variant meant for this kind of target, or the pinned one if it is meant for it."""
        if pinned is None:
            return self._by_kind.get(kind)
        variant = self.variants.get(pinned)
        return variant if variant is not None and kind in variant.targets else None

    def variants_for(self, kind: TargetKind, pinned: str | None = None) -> tuple[Variant, ...]:
        """Every variant meant for this kind of target, or the pinned one alone if it is meant for it."""
        if pinned is None:
            return self._all_by_kind.get(kind, ())
        variant = self.variant_for(kind, pinned)
        return () if variant is None else (variant,)

    @cached_property
    def _all_by_kind(self) -> dict[str, tuple[Variant, ...]]:
        kinds: dict[str, tuple[Variant, ...]] = {}
        for variant in self.variants.values():
            for kind in variant.targets:
                kinds[kind] = (*kinds.get(kind, ()), variant)
        return kinds

    @cached_property
    def smallest(self) -> Variant:
        """The least that a target must be able to run to answer at all; it sets the family's complexity."""
        return min(self.variants.values(), key=lambda variant: variant.bytes)


class Catalog(_Strict):
    """All families. `root` is the folder that variant paths are relative to, `sha256` the digest of the bytes that this
    was read from: of a file that may be another one by now."""

    schema_: Literal[1] = Field(alias="schema")
    families: Mapping[Identifier, Family]
    root: Path = Path()
    sha256: str = ""

    def family(self, name: str) -> Family:
        """Raises `UnknownModel`."""
        family = self.families.get(name)
        if family is None:
            known = ", ".join(sorted(self.families))
            raise UnknownModel(f"no model {name[:64]!r}; the catalogue has: {known}", field="model")
        return family

    def path(self, variant: Variant) -> Path:
        return self.root / variant.path

    def file(self, variant: Variant) -> Path:
        """Its path, to be opened. Raises `ValueError` if that leads out of the catalogue's folder, or to something that
        is no plain file and could be read for ever."""
        return self.below("path", variant.path)

    def below(self, field: str, relative: str) -> Path:
        """Of any file that the catalogue names in `field`. Raises `ValueError`, as `file`."""
        path = self.root / relative
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
            plain = path.is_file() or not path.exists()
        except (OSError, RuntimeError) as error:  # a name that is too long; links that go round in a circle
            raise ValueError(f"{field}: leads nowhere: {relative[:100]!r} ({error.__class__.__name__})") from None
        if not inside:
            raise ValueError(f"{field}: leads out of the catalogue's folder: {relative!r}")
        if not plain:
            raise ValueError(f"{field}: is no plain file: {relative!r}")
        return path

    def by_sha256(self, sha256: str) -> Variant | None:
        for family in self.families.values():
            for variant in family.variants.values():
                if variant.sha256 == sha256:
                    return variant
        return None


def complexity(variant: Variant, *, simple: tuple[float, int], medium: tuple[float, int]) -> Complexity:
    """Class of a variant. `simple` and `medium` are limits as (bytes, parameters), both exclusive."""
    for limits, grade in ((simple, Complexity.SIMPLE), (medium, Complexity.MEDIUM)):
        if variant.bytes < limits[0] and variant.parameters < limits[1]:
            return grade
    return Complexity.COMPLEX


def load_catalog(path: Path, *, verify: bool = True, calibrated: bool = True, any_file: bool = False) -> Catalog:
    """Read and validate a catalogue; with `verify`, also that every file is there, whole and as recorded (with
    `any_file`, that one is: whoever loads them refuses the others); with `calibrated`, also that calibrations were
    fitted to these files.

    Raises `ConfigError` with one line for each fault.
    """
    raw, digest = _read_yaml(path)
    families = raw.get("families")
    if isinstance(families, dict):
        for name, family in families.items():
            if isinstance(family, dict):
                family["name"] = str(name)
                variants = family.get("variants")
                for id_, variant in variants.items() if isinstance(variants, dict) else ():
                    if isinstance(variant, dict):
                        variant["model"], variant["id"] = str(name), str(id_)
    raw["root"], raw["sha256"] = path.parent, digest
    try:
        catalog = Catalog.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        ) from None
    problems = _inconsistencies(catalog)
    if calibrated:
        problems += _misfits(catalog)
    if verify and not problems:
        problems += _file_faults(catalog, any_file=any_file)
        problems += _other_data(catalog)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return catalog


def _read_yaml(path: Path) -> tuple[dict[str, Any], str]:
    """The document, and the SHA-256 of the very bytes that it was read from."""
    try:
        data = read_bounded(path, MAX_CATALOG_BYTES)
        raw = decode_yaml(data)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except NotYaml as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: must be a mapping with the keys schema and families"])
    return raw, hashlib.sha256(data).hexdigest()


def _inconsistencies(catalog: Catalog) -> list[str]:
    problems = []
    for family in catalog.families.values():
        labels, scores = len(family.labels), _elements(family.outputs[0])
        if labels != scores:
            problems.append(f"families.{family.name}.labels: {labels} labels for an output of {scores} values")
        problems += _unsafe(f"families.{family.name}.data.heldout", family.data.heldout)
        for variant in family.variants.values():
            at = f"families.{family.name}.variants.{variant.id}"
            problems += _mismatches(f"{at}.inputs", variant.inputs, family.inputs)
            problems += _mismatches(f"{at}.outputs", variant.outputs, family.outputs)
            problems += _unsafe(f"{at}.path", variant.path)
            if variant.selftest is not None:
                problems += _unsafe(f"{at}.selftest", variant.selftest)
    return problems


def _misfits(catalog: Catalog) -> Iterator[str]:
    for family in catalog.families.values():
        for variant in family.variants.values():
            yield from _unfit(f"families.{family.name}.variants.{variant.id}.calibration", variant, family)


def _unfit(at: str, variant: Variant, family: Family) -> Iterator[str]:
    """A calibration is worth something for the files it was fitted to, and for no others."""
    calibration = variant.calibration
    if calibration is None:
        return
    again = f"run `edge-agent models calibrate {family.name}` again"
    if calibration.sha256 != variant.sha256:
        yield f"{at}.sha256: was fitted to another file of this variant; {again}"
    if calibration.data_sha256 != family.data.heldout_sha256:
        yield f"{at}.data_sha256: was fitted to other held-out data; {again}"
    cascade = calibration.cascade
    if cascade is not None:
        reference = family.variants.get(cascade.reference)
        if reference is None:
            yield f"{at}.cascade.reference: {family.name} has no variant {cascade.reference!r}; {again}"
        elif cascade.reference_sha256 != reference.sha256:
            yield f"{at}.cascade.reference_sha256: was fitted to another file of {cascade.reference}; {again}"


def _elements(tensor: FamilyTensor | VariantTensor) -> int:
    return math.prod(tensor.shape)


def _mismatches(at: str, tensors: Sequence[VariantTensor], canonical: Sequence[FamilyTensor]) -> Iterator[str]:
    sizes = {tensor.name: _elements(tensor) for tensor in canonical}
    if sorted(tensor.maps for tensor in tensors) != sorted(sizes):
        yield f"{at}: must map each of {sorted(sizes)} once"
    for tensor in tensors:
        if _elements(tensor) != sizes.get(tensor.maps, _elements(tensor)):
            yield f"{at}: {tensor.name!r} holds {_elements(tensor)} values, {tensor.maps!r} has {sizes[tensor.maps]}"


def _unsafe(at: str, path: str) -> Iterator[str]:
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts or "\0" in path:
        yield f"{at}: must stay below the catalogue's folder, found {path!r}"


def _variants(catalog: Catalog) -> Iterator[Variant]:
    return (variant for family in catalog.families.values() for variant in family.variants.values())


def _file_faults(catalog: Catalog, *, any_file: bool) -> list[str]:
    """With `any_file`, none unless every file has one."""
    faults = [_file_fault(catalog, variant) for variant in _variants(catalog)]
    return [] if any_file and not all(faults) else [fault for fault in faults if fault]


def _file_fault(catalog: Catalog, variant: Variant) -> str:
    """What is wrong with its file; empty: nothing."""
    at = f"families.{variant.model}.variants.{variant.id}"
    try:
        if variant.selftest is not None:
            catalog.below("selftest", variant.selftest)
        with catalog.file(variant).open("rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        return f"{at}.{error}"
    except OSError as error:
        return f"{at}.path: cannot be read: {error.strerror}: {variant.path}"
    if digest != variant.sha256:
        return f"{at}.sha256: the file {variant.path} is not the one recorded"
    if size != variant.bytes:
        return f"{at}.bytes: the file {variant.path} has {size} bytes, {variant.bytes} are recorded"
    return ""


def _other_data(catalog: Catalog) -> Iterator[str]:
    """Held-out data need not be on a gateway; if it is, a calibration must be of it."""
    for family in catalog.families.values():
        at = f"families.{family.name}.data"
        try:
            path = catalog.below("heldout", family.data.heldout)
        except ValueError as error:
            yield f"{at}.{error}"
            continue
        if not path.is_file() or not any(variant.calibration for variant in family.variants.values()):
            continue
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            yield f"{at}.heldout: {error}"
            continue
        if found != family.data.heldout_sha256:
            yield f"{at}.heldout_sha256: {family.data.heldout} is not the file recorded"
