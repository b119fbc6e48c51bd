"""The catalogue: what it holds, and that nothing inconsistent or damaged gets past it."""

import hashlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from cascade_fakes import calibration_document, cascade_document
from fakes import family_document, make_catalog, variant_document
from pydantic import ValidationError

from agent.core.errors import ConfigError, UnknownModel
from agent.core.types import Complexity
from agent.registry.catalog import MAX_CATALOG_BYTES, Catalog, Variant, VariantTensor, complexity, load_catalog

SHIPPED = Path(__file__).parents[2] / "models" / "catalog.yaml"


class Folder:
    """A catalogue on disk that can be bent before it is loaded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.document: dict[str, Any] = {"schema": 1, "families": {"toy": family_document()}}
        (root / "toy").mkdir()
        for variant in self.variants.values():
            data = variant["path"].encode()
            (root / variant["path"]).write_bytes(data)
            variant["sha256"], variant["bytes"] = hashlib.sha256(data).hexdigest(), len(data)

    @property
    def toy(self) -> dict[str, Any]:
        return self.document["families"]["toy"]

    @property
    def variants(self) -> dict[str, Any]:
        return self.toy["variants"]

    def load(self, **options: bool) -> Catalog:
        path = self.root / "catalog.yaml"
        path.write_text(yaml.safe_dump(deepcopy(self.document)))
        return load_catalog(path, **options)

    def refusal(self) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load()
        path = str(self.root / "catalog.yaml")
        assert all(problem.startswith(path) for problem in caught.value.problems)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_catalogue_is_read(folder: Folder) -> None:
    catalog = folder.load()
    family = catalog.family("toy")
    small = family.variants["small"]
    assert (family.name, small.model, small.id, small.name) == ("toy", "toy", "small", "toy/small")
    assert catalog.path(small) == folder.root / "toy/edge_mcu.tflite"
    assert catalog.by_sha256(small.sha256) is small
    assert catalog.by_sha256("0" * 64) is None


def test_the_shipped_catalogue_is_whole() -> None:
    catalog = load_catalog(SHIPPED)
    for family in catalog.families.values():
        for kind in ("edge_mcu", "edge_gpu", "cloud"):
            assert family.variant_for(kind) is not None, (family.name, kind)


def test_an_unknown_model_names_the_known_ones(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'x+'; the catalogue has: toy$") as caught:
        catalog.family("x" * 500)
    assert caught.value.field == "model"
    assert len(str(caught.value)) < 150


def test_the_most_accurate_variant_for_a_tier_is_taken() -> None:
    rough = variant_document("edge_gpu", accuracy={"value": 0.8, "samples": 1, "tolerance": 0})
    both = variant_document("edge_gpu", targets=["edge_gpu", "edge_mcu"])
    family = make_catalog(toy=family_document(variants={"rough": rough, "both": both})).family("toy")

    def chosen(kind: Any, pinned: str | None = None) -> str | None:
        variant = family.variant_for(kind, pinned)
        return variant and variant.id

    assert (chosen("edge_gpu"), chosen("edge_mcu"), chosen("cloud")) == ("both", "both", None)
    assert chosen("edge_gpu", "rough") == "rough"
    assert chosen("edge_mcu", "rough") is None
    assert chosen("edge_gpu", "none") is None


def test_the_smallest_variant_sets_what_a_family_asks_of_a_machine() -> None:
    assert make_catalog().family("toy").smallest.id == "small"


@pytest.mark.parametrize(
    ("size", "parameters", "expected"),
    [
        (999_999, 9_999, Complexity.SIMPLE),
        (1_000_000, 9_999, Complexity.MEDIUM),
        (999_999, 10_000, Complexity.MEDIUM),
        (9_999_999, 999_999, Complexity.MEDIUM),
        (10_000_000, 1, Complexity.COMPLEX),
        (1, 1_000_000, Complexity.COMPLEX),
    ],
)
def test_complexity_has_exclusive_limits(size: int, parameters: int, expected: Complexity) -> None:
    variant = Variant.model_validate(variant_document(bytes=size, parameters=parameters))
    assert complexity(variant, simple=(1e6, 10_000), medium=(1e7, 1_000_000)) is expected


# --- refusals --------------------------------------------------------------------------------------------------------


def bent(at: str, value: Any) -> Any:
    """A change of the family `toy`: `variants.small.path` -> value."""

    def change(folder: Folder) -> None:
        *way, last = at.split(".")
        node = folder.toy
        for key in way:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[int(last) if isinstance(node, list) else last] = value

    return change


TWICE = [{"name": n, "maps": "window", "dtype": "float32", "shape": [1, 4]} for n in "ab"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (bent("variants.small.surprise", 1), "families.toy.variants.small.surprise: Extra inputs"),
        (bent("variants.small.sha256", "abc"), "variants.small.sha256: String should match"),
        (bent("variants.small.sha256", "0" * 64), "small.sha256: the file toy/edge_mcu.tflite is not the one recorded"),
        (bent("variants.small.bytes", 5), "small.bytes: the file toy/edge_mcu.tflite has 19 bytes, 5 are recorded"),
        (bent("variants.small.path", "toy/none.tflite"), "small.path: cannot be read: No such file"),
        (bent("variants.small.path", "toy"), "small.path: is no plain file: 'toy'"),
        (bent("variants.small.path", "../x.tflite"), "small.path: must stay below the catalogue's folder"),
        (bent("variants.small.path", "/etc/passwd"), "small.path: must stay below the catalogue's folder"),
        (bent("variants.small.path", "toy/\0"), "small.path: must stay below the catalogue's folder"),
        (bent("variants.small.selftest", "../../x"), "small.selftest: must stay below the catalogue's folder"),
        (bent("data.heldout", "/x"), "data.heldout: must stay below the catalogue's folder"),
        (bent("variants.small.targets", []), "small.targets: Tuple should have at least 1 item"),
        (bent("variants.small.targets", ["edge_tpu"]), "small.targets.0: Input should be 'edge_mcu', 'edge_gpu'"),
        (bent("variants.small.inputs.0.maps", "other"), "small.inputs: must map each of ['window'] once"),
        (bent("variants.large.inputs", TWICE), "large.inputs: must map each of ['window'] once"),
        (bent("variants.small.outputs.0.maps", "other"), "small.outputs: must map each of ['probabilities'] once"),
        (bent("variants.small.inputs.0.shape", [1, 5]), "small.inputs: 'in' holds 5 values, 'window' has 4"),
        (bent("variants.small.inputs.0.scale", None), "tensor 'in' is int8 and needs scale and zero_point"),
        (bent("variants.small.inputs.0.scale", 0), "small.inputs.0.scale: Input should be greater than 0"),
        (bent("variants.small.inputs.0.scale", float("inf")), "small.inputs.0.scale: Input should be a finite number"),
        (bent("variants.small.inputs.0.zero_point", 128), "tensor 'in': zero_point 128 is no int8"),
        (bent("variants.large.inputs.0.scale", 0.1), "tensor 'in': scale and zero_point go together"),
        (
            bent("variants.small.inputs.0.dtype", "float32"),
            "tensor 'in' is float32: scale and zero_point are for small",
        ),
        (bent("labels", ["a", "b"]), "families.toy.labels: 2 labels for an output of 3 values"),
        (bent("labels", ["a"]), "families.toy.labels: Tuple should have at least 2 items"),
        (bent("variants", {}), "families.toy.variants: "),
        (bent("variants", ["x"]), "families.toy.variants: "),
        (bent("variants", None), "families.toy.variants: "),
        (bent("variants.small", None), "families.toy.variants.small: "),
        (bent("inputs.0.shape", []), "families.toy.inputs.0.shape: "),
        (bent("inputs.0.shape", [0]), "families.toy.inputs.0.shape.0: "),
        (lambda folder: folder.document.update(schema=2), "schema: Input should be 1"),
        (lambda folder: folder.document.update(families=[]), "families: "),
        (lambda folder: folder.document.update(families={"Bad Name": folder.toy}), "families.Bad Name"),
        (lambda folder: folder.document.pop("families"), "families: Field required"),
    ],
)
def test_refused_with_its_place(folder: Folder, change: Any, expected: str) -> None:
    change(folder)
    assert expected in folder.refusal()


def test_files_are_not_looked_at_where_that_is_not_wanted(folder: Folder) -> None:
    folder.variants["small"]["path"] = "toy/none.tflite"
    assert folder.load(verify=False).family("toy").variants["small"].path == "toy/none.tflite"


def test_one_whole_file_is_enough_where_that_is_said(folder: Folder) -> None:
    first, *others = folder.variants.values()
    for variant in others:
        (folder.root / variant["path"]).write_bytes(b"damaged")
    assert folder.load(any_file=True).family("toy")
    (folder.root / first["path"]).unlink()
    with pytest.raises(ConfigError) as caught:
        folder.load(any_file=True)
    assert len(caught.value.problems) == 3


def test_every_damaged_file_gets_its_line(folder: Folder) -> None:
    for variant in folder.variants.values():
        (folder.root / variant["path"]).write_bytes(b"damaged")
    assert len(folder.refusal().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"- a", "must be a mapping with the keys schema and families"),
        (b"", "must be a mapping with the keys schema and families"),
        (b"\xff", "cannot be read as YAML: byte 0: not UTF-8"),
        (b"a: [", "cannot be read as YAML: line 1"),
        (b"[" * 20_000, "cannot be read as YAML: nested too deeply"),
        (b"a: 2024-99-99", "cannot be read as YAML: a value cannot be read"),
        (b"families: &f {}\nx: *f", "aliases are not supported"),
        (b"#" * (MAX_CATALOG_BYTES + 1), "larger than"),
    ],
)
def test_a_file_that_is_no_catalogue(tmp_path: Path, text: bytes, expected: str) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_catalog(path)
    assert expected in str(caught.value)


def test_a_catalogue_is_frozen(catalog: Catalog) -> None:
    with pytest.raises(ValidationError):
        catalog.root = Path("/")
    with pytest.raises(ValidationError):
        catalog.family("toy").variants["small"].bytes = 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
def test_tensors_without_quantisation(dtype: Any) -> None:
    assert VariantTensor(name="x", maps="x", dtype=dtype, shape=(1,)).scale is None


# --- calibrations ----------------------------------------------------------------------------------------------------


def calibrated(folder: Folder) -> dict[str, Any]:
    """The small variant's calibration, as the command would have written it."""
    small, large = folder.variants["small"], folder.variants["large"]
    cascade = cascade_document(reference_sha256=large["sha256"])
    small["calibration"] = calibration_document(small["sha256"], cascade)
    found: dict[str, Any] = small["calibration"]
    return found


def test_a_calibration_is_read(folder: Folder) -> None:
    calibrated(folder)
    small = folder.load().family("toy").variants["small"]
    assert small.calibration is not None
    assert small.calibration.cascade is not None
    assert small.cascade_gain == pytest.approx(0.985 - 0.95)


CALIBRATION = "families.toy.variants.small.calibration"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sha256", "e" * 64, "sha256: was fitted to another file of this variant"),
        ("data_sha256", "e" * 64, "data_sha256: was fitted to other held-out data"),
        ("cascade.reference", "none", "cascade.reference: toy has no variant 'none'"),
        ("cascade.reference_sha256", "e" * 64, "cascade.reference_sha256: was fitted to another file of large"),
        ("temperature", 0, "temperature: "),
        ("cascade.threshold", 2.5, "cascade.threshold: "),
        ("cascade.accuracy", 0.5, "cascade: Value error, accuracy must be between low and high"),
        ("more", 1, "more: "),
    ],
)
def test_a_calibration_of_something_else_is_refused(folder: Folder, key: str, value: Any, told: str) -> None:
    at = calibrated(folder)
    *path, last = key.split(".")
    for part in path:
        at = at[part]
    at[last] = value
    assert f"{CALIBRATION}.{told}" in folder.refusal()


def test_held_out_data_that_are_there_must_be_those_of_the_calibration(folder: Folder) -> None:
    calibrated(folder)
    folder.load()  # not every gateway has the data
    (folder.root / "toy" / "heldout.npz").write_bytes(b"other data")
    assert "families.toy.data.heldout_sha256: toy/heldout.npz is not the file recorded" in folder.refusal()


def test_what_is_about_to_be_calibrated_need_not_be_calibrated_yet(folder: Folder) -> None:
    calibrated(folder)["sha256"] = "e" * 64
    folder.load(verify=False, calibrated=False)
