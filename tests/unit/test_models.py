"""The shipped models are what `models/catalog.yaml` says they are.

The files are measured here with the runtimes a gateway has; nothing of the training tools is used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from agent.core.errors import ConfigError
from agent.registry.selftest import load_selftest

MODELS = Path(__file__).resolve().parents[2] / "models"
CATALOG: dict[str, Any] = yaml.safe_load((MODELS / "catalog.yaml").read_text(encoding="utf-8"))
VARIANTS = [
    pytest.param(family, variant, id=f"{family_name}/{name}")
    for family_name, family in CATALOG["families"].items()
    for name, variant in family["variants"].items()
]
MCU_VARIANTS = [param for param in VARIANTS if param.values[1]["targets"] == ["edge_mcu"]]

MCU_OPERATORS = {
    "ADD",
    "AVERAGE_POOL_2D",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "DEQUANTIZE",
    "FULLY_CONNECTED",
    "LOGISTIC",
    "MAX_POOL_2D",
    "MEAN",
    "PAD",
    "QUANTIZE",
    "RELU",
    "RELU6",
    "RESHAPE",
    "SOFTMAX",
}
MCU_BYTES = 1_000_000
MCU_PARAMETERS = 10_000
MCU_ARENA = 1 << 20


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def heldout(family: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Canonical inputs [n, ...] float32 and labels [n] of a family."""
    with np.load(MODELS / family["data"]["heldout"]) as arrays:
        return arrays["inputs"], arrays["labels"]


def encode(values: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """Real values as the file's tensor stores them."""
    if "scale" not in tensor:
        return values.astype(tensor["dtype"])
    steps = np.round(values / tensor["scale"]) + tensor["zero_point"]
    return np.clip(steps, -128, 127).astype(np.int8)


def run(variant: dict[str, Any], stored: np.ndarray) -> np.ndarray:
    """Stored outputs [n, classes] of stored inputs [n, ...], one at a time."""
    path = str(MODELS / variant["path"])
    if variant["format"] == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = variant["inputs"][0]["name"]
        return np.concatenate([session.run(None, {name: row[None]})[0] for row in stored])
    interpreter = Interpreter(model_path=path)
    interpreter.allocate_tensors()
    rows = []
    for row in stored:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return np.concatenate(rows)


def selftest(variant: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Golden inputs and outputs, int8, of a microcontroller variant."""
    with np.load(MODELS / variant["selftest"]) as arrays:
        return arrays["inputs"], arrays["outputs"]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_file_is_the_one_recorded(family: dict[str, Any], variant: dict[str, Any]) -> None:
    path = MODELS / variant["path"]
    assert sha256(path) == variant["sha256"]
    assert path.stat().st_size == variant["bytes"]
    assert (MODELS / variant["script"]).is_file()


@pytest.mark.parametrize("family", CATALOG["families"].values(), ids=CATALOG["families"])
def test_heldout_set_is_the_one_recorded(family: dict[str, Any]) -> None:
    inputs, labels = heldout(family)
    tensor = family["inputs"][0]
    assert sha256(MODELS / family["data"]["heldout"]) == family["data"]["heldout_sha256"]
    assert len(inputs) == len(labels) == family["data"]["heldout_samples"]
    assert inputs.dtype == tensor["dtype"]
    assert list(inputs.shape[1:]) == tensor["shape"][1:]
    assert tensor["minimum"] <= inputs.min() and inputs.max() <= tensor["maximum"]
    assert set(labels) == set(range(len(family["labels"])))


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_accuracy_is_the_one_recorded(family: dict[str, Any], variant: dict[str, Any]) -> None:
    """A fixed file may lose one sample to another kernel's rounding, and no more."""
    inputs, labels = heldout(family)
    answers = run(variant, encode(inputs, variant["inputs"][0])).argmax(axis=1)
    recorded = variant["accuracy"]
    assert recorded["samples"] == len(labels)
    assert np.mean(answers == labels) == pytest.approx(recorded["value"], abs=1.01 / len(labels))
    assert 0 < recorded["tolerance"] <= 0.05


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_outputs_are_probabilities(family: dict[str, Any], variant: dict[str, Any]) -> None:
    inputs, _ = heldout(family)
    output = variant["outputs"][0]
    stored = run(variant, encode(inputs[:20], variant["inputs"][0]))
    assert stored.shape == (20, len(family["labels"]))
    assert stored.dtype == output["dtype"]
    if "scale" in output:
        stored = (stored.astype(np.float32) - output["zero_point"]) * output["scale"]
    assert stored.min() >= 0 and stored.max() <= 1
    assert stored.sum(axis=1) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_tensors_are_those_recorded(family: dict[str, Any], variant: dict[str, Any]) -> None:
    source, target = variant["inputs"][0], variant["outputs"][0]
    assert source["maps"] == family["inputs"][0]["name"]
    assert target["maps"] == family["outputs"][0]["name"]
    assert source["shape"] == family["inputs"][0]["shape"]
    path = str(MODELS / variant["path"])
    if variant["format"] == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for node, tensor in zip([*session.get_inputs(), *session.get_outputs()], [source, target], strict=True):
            assert (node.name, node.shape, node.type) == (
                tensor["name"],
                tensor["shape"],
                "tensor(float)",
            )
        return
    interpreter = Interpreter(model_path=path)
    (first,), (last,) = interpreter.get_input_details(), interpreter.get_output_details()
    for details, tensor in zip([first, last], [source, target], strict=True):
        assert details["name"] == tensor["name"]
        assert details["shape"].tolist() == tensor["shape"]
        assert np.dtype(details["dtype"]).name == tensor["dtype"]
        assert details["quantization"] == (tensor.get("scale", 0.0), tensor.get("zero_point", 0))


@pytest.mark.parametrize(("family", "variant"), MCU_VARIANTS)
def test_operators_are_those_recorded(family: dict[str, Any], variant: dict[str, Any]) -> None:
    data = (MODELS / variant["path"]).read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    codes = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    assert {codes[entry.builtinCode] for entry in model.operatorCodes} == set(variant["operators"])


def test_larger_digit_models_are_more_accurate() -> None:
    variants = CATALOG["families"]["digits"]["variants"]
    ladder = [variants[name]["accuracy"]["value"] for name in ("mcu-int8", "gateway-fp16")]
    ladder.append(variants["cloud-fp32"]["accuracy"]["value"])
    assert ladder == sorted(set(ladder))


@pytest.mark.parametrize(("family", "variant"), MCU_VARIANTS)
def test_microcontroller_limits(family: dict[str, Any], variant: dict[str, Any]) -> None:
    assert variant["quantisation"] == "int8"
    assert variant["bytes"] < MCU_BYTES
    assert variant["parameters"] < MCU_PARAMETERS
    assert 0 < variant["arena_bytes"] < MCU_ARENA
    assert variant["arena_bytes"] % 16 == 0
    assert set(variant["operators"]) <= MCU_OPERATORS
    assert (variant["outputs"][0]["scale"], variant["outputs"][0]["zero_point"]) == (1 / 256, -128)


def test_every_family_has_a_microcontroller_model() -> None:
    assert len(MCU_VARIANTS) == len(CATALOG["families"])


@pytest.mark.parametrize(("family", "variant"), MCU_VARIANTS)
def test_selftest_vector_holds_on_litert(family: dict[str, Any], variant: dict[str, Any]) -> None:
    """One golden sample per class; LiteRT's kernels may round a last bit differently."""
    inputs, outputs = selftest(variant)
    assert len(inputs) == len(outputs) == len(family["labels"])
    assert inputs.dtype == outputs.dtype == np.int8
    difference = run(variant, inputs).astype(int) - outputs
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("family", "variant"), MCU_VARIANTS)
def test_micro_runtime(family: dict[str, Any], variant: dict[str, Any]) -> None:
    """In the recorded arena: the golden outputs exactly, and LiteRT's within one step."""
    runtime = pytest.importorskip("tflite_micro").runtime
    data = (MODELS / variant["path"]).read_bytes()
    interpreter = runtime.Interpreter.from_bytes(data, arena_size=variant["arena_bytes"])

    def invoke(row: np.ndarray) -> np.ndarray:
        interpreter.set_input(row[None], 0)
        interpreter.invoke()
        return interpreter.get_output(0)[0]

    golden_inputs, golden_outputs = selftest(variant)
    assert np.array_equal([invoke(row) for row in golden_inputs], golden_outputs)
    stored = encode(heldout(family)[0], variant["inputs"][0])
    difference = run(variant, stored).astype(int) - [invoke(row) for row in stored]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("damage", ["cut off", "a byte", "a block"])
def test_a_damaged_selftest_is_said_as_such(tmp_path: Path, damage: str) -> None:
    data = next(MODELS.rglob("*.selftest.npz")).read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(
        {
            "cut off": data[: len(data) // 2],
            "a byte": data[:200] + bytes([data[200] ^ 255]) + data[201:],
            "a block": data[:40] + bytes(30) + data[70:],
        }[damage]
    )
    with pytest.raises(ConfigError, match=r"x\.npz: is no self-test"):
        load_selftest(path)
