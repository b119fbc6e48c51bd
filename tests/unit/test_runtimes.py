"""The runtimes on the shipped models: what they return equals the library called directly, and they name what ran."""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from agent.registry.catalog import Variant, load_catalog
from agent.runtimes import litert
from agent.runtimes.base import ModelFile, RuntimeUnavailable
from agent.runtimes.litert import Chatter, CompiledRunner, LiteRtRuntime
from agent.runtimes.onnx import OnnxRuntime

MODELS = Path(__file__).resolve().parents[2] / "models"
CATALOG = load_catalog(MODELS / "catalog.yaml")
VARIANTS = [variant for family in CATALOG.families.values() for variant in family.variants.values()]
TFLITE = [pytest.param(variant, id=variant.name) for variant in VARIANTS if variant.format == "tflite"]
ONNX = [pytest.param(variant, id=variant.name) for variant in VARIANTS if variant.format == "onnx"]
DIGITS = CATALOG.families["digits"].variants


def samples(variant: Variant, count: int = 5) -> list[np.ndarray]:
    (spec,) = variant.inputs
    random = np.random.default_rng(1)
    if spec.dtype == "int8":
        return [random.integers(-128, 128, spec.shape, np.int8) for _ in range(count)]
    return [random.uniform(0, 16, spec.shape).astype(spec.dtype) for _ in range(count)]


@pytest.mark.parametrize("variant", TFLITE)
def test_litert_equals_the_library_called_directly(variant: Variant) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(CATALOG.path(variant)))
    interpreter.allocate_tensors()
    runner = LiteRtRuntime().load(CATALOG.path(variant))
    for sample in samples(variant):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], sample)
        interpreter.invoke()
        outputs = runner.run({variant.inputs[0].name: sample})
        assert list(outputs) == [variant.outputs[0].name]
        expected = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        np.testing.assert_array_equal(outputs[variant.outputs[0].name], expected)


@pytest.mark.parametrize("variant", ONNX)
def test_onnx_equals_the_library_called_directly(variant: Variant) -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(CATALOG.path(variant), providers=["CPUExecutionProvider"])
    runner = OnnxRuntime().load(CATALOG.path(variant))
    for sample in samples(variant):
        expected = session.run(None, {variant.inputs[0].name: sample})[0]
        outputs = runner.run({variant.inputs[0].name: sample})
        np.testing.assert_allclose(outputs[variant.outputs[0].name], expected, rtol=1e-5, atol=1e-7)
    assert runner.reentrant


@pytest.mark.parametrize("variant", [*TFLITE, *ONNX])
def test_zeros_are_inputs_the_file_takes(variant: Variant) -> None:
    runtime = LiteRtRuntime() if variant.format == "tflite" else OnnxRuntime()
    runner = runtime.load(CATALOG.path(variant))
    zeros = runner.zeros()
    assert {name: (str(value.dtype), value.shape) for name, value in zeros.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in variant.inputs
    }
    assert set(runner.run(zeros)) == {spec.name for spec in variant.outputs}
    runner.close()


def test_outputs_are_copies() -> None:
    variant = DIGITS["gateway-fp16"]
    runner = LiteRtRuntime().load(CATALOG.path(variant))
    first, second = samples(variant, 2)
    kept = runner.run({"image": first})[variant.outputs[0].name]
    before = kept.copy()
    runner.run({"image": second})
    np.testing.assert_array_equal(kept, before)


def test_litert_names_xnnpack_where_it_took_the_whole_model() -> None:
    runtime = LiteRtRuntime()
    runner = runtime.load(CATALOG.path(DIGITS["gateway-fp16"]))
    assert runtime.name.startswith("litert ")
    assert runner.provider == f"{runtime.name}/xnnpack"
    assert not runner.reentrant


def test_litert_counts_the_operators_that_xnnpack_left() -> None:
    nodes = [
        {"index": 0, "op_name": "RESHAPE", "inputs": [0, 1], "outputs": [4]},
        {"index": 1, "op_name": "FULLY_CONNECTED", "inputs": [4, 3, -1], "outputs": [5]},
        {"index": 2, "op_name": "SOFTMAX", "inputs": [5], "outputs": [6]},
    ]
    delegate = {"index": 3, "op_name": "DELEGATE", "inputs": [0, 1, 3], "outputs": [5]}

    def kernels(*graph: dict[str, object]) -> str:
        return litert._kernels(types.SimpleNamespace(_get_ops_details=lambda: list(graph)))

    assert litert._kernels(object()) == "unknown kernels"
    assert kernels(*nodes) == "built-in kernels"
    assert kernels(*nodes, delegate) == "xnnpack for 2 of 3 operators"
    assert kernels(*nodes, {**delegate, "outputs": [6]}) == "xnnpack"


def test_compiled_model_equals_the_interpreter() -> None:
    """The path that a GPU takes, on LiteRT's CPU accelerator: there is no GPU where this was written."""
    variant = DIGITS["gateway-fp16"]
    runtime = LiteRtRuntime()
    compiled = CompiledRunner(CATALOG.path(variant), runtime.name, "cpu")
    plain = runtime.load(CATALOG.path(variant))
    assert compiled.provider == f"{runtime.name}/cpu accelerator"
    assert set(compiled.zeros()) == {"image"}
    for sample in samples(variant):
        np.testing.assert_allclose(
            compiled.run({"image": sample})[variant.outputs[0].name],
            plain.run({"image": sample})[variant.outputs[0].name],
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="must be float32"):
        compiled.run({"image": np.zeros(3, np.float32)})
    compiled.close()


@pytest.mark.skipif(any(map(litert._exists, litert._GPU_NODES)), reason="this machine has a GPU")
def test_without_a_gpu_the_cpu_is_named_or_the_start_refused() -> None:
    path = CATALOG.path(DIGITS["gateway-fp16"])
    assert LiteRtRuntime(accelerator="auto").load(path).provider.endswith("/xnnpack")
    assert LiteRtRuntime(accelerator="gpu").load(path).provider.endswith("/xnnpack")
    with pytest.raises(RuntimeUnavailable, match="GPU accelerator"):
        LiteRtRuntime(accelerator="gpu", strict=True).load(path)


def test_onnx_takes_the_first_provider_there_is_and_says_so() -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime has CUDA")
    runtime = OnnxRuntime(providers=("tensorrt", "cuda", "cpu"))
    runner = runtime.load(CATALOG.path(DIGITS["cloud-fp32"]))
    assert runner.provider == f"onnxruntime {ort.__version__}/CPUExecutionProvider"
    with pytest.raises(RuntimeUnavailable, match="has no cuda provider"):
        OnnxRuntime(providers=("cuda", "cpu"), strict=True)
    with pytest.raises(RuntimeUnavailable, match="has no tensorrt provider"):
        OnnxRuntime(providers=("tensorrt",))


def test_onnx_strict_refuses_a_session_that_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        "agent.runtimes.onnx.SessionRunner",
        lambda *_: types.SimpleNamespace(execution_provider="CPUExecutionProvider"),
    )
    runtime = OnnxRuntime(providers=("cuda", "cpu"), strict=True)
    with pytest.raises(RuntimeUnavailable, match="runs on CPUExecutionProvider, not on CUDAExecutionProvider"):
        runtime.load(Path("any.onnx"))


@pytest.mark.parametrize("variant", [DIGITS["gateway-fp16"], DIGITS["cloud-fp32"]], ids=lambda v: v.format)
@pytest.mark.parametrize(
    "inputs", [{}, {"image": np.zeros((2, 3), np.float32)}, {"image": np.zeros((1, 8, 8, 1), "f8")}]
)
def test_wrong_inputs_are_refused(variant: Variant, inputs: dict[str, np.ndarray]) -> None:
    runtime = LiteRtRuntime() if variant.format == "tflite" else OnnxRuntime()
    runner = runtime.load(CATALOG.path(variant))
    with pytest.raises((ValueError, RuntimeError)):
        runner.run(inputs)
    assert runner.run(runner.zeros())


def test_a_truncated_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(CATALOG.path(DIGITS["cloud-fp32"]).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.onnx is not a usable model"):
        OnnxRuntime().load(path)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailable, match="neither ai-edge-litert nor tflite-runtime"):
        LiteRtRuntime()
    with pytest.raises(RuntimeUnavailable, match="onnxruntime is not installed"):
        OnnxRuntime()


def test_tflite_runtime_steps_in_for_litert(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module("ai_edge_litert.interpreter").Interpreter
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", types.SimpleNamespace(Interpreter=real))
    runtime = LiteRtRuntime()
    assert runtime.name.startswith("tflite_runtime")
    assert runtime.load(CATALOG.path(DIGITS["gateway-fp16"])).provider == f"{runtime.name}/xnnpack"


def test_a_file_must_be_the_recorded_one(tmp_path: Path) -> None:
    variant = DIGITS["mcu-int8"]
    path = CATALOG.path(variant)
    ModelFile(path, "tflite", variant.sha256).read()
    with pytest.raises(ValueError, match="is not the recorded file"):
        ModelFile(path, "tflite", "0" * 64).read()
    with pytest.raises(ValueError, match=r"gone\.tflite cannot be read: No such file"):
        ModelFile(tmp_path / "gone.tflite", "tflite", variant.sha256).read()


def test_what_the_library_prints_does_not_reach_standard_error(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "agent.runtimes.litert")
    libc = ctypes.CDLL(None)
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")

    def prints(text: bytes) -> None:
        libc.fputs(text, stderr)
        libc.fflush(stderr)

    chatter = Chatter()
    for text in (b"first", b"second"):
        with chatter:
            prints(text)
            with chatter:  # Another thread that loads meanwhile.
                prints(b" inner")
            print("the log goes on", file=sys.stderr)
            prints(b" outer")
        prints(b"afterwards\n")
    assert capfd.readouterr().err == "the log goes on\nafterwards\n" * 2
    assert [vars(record)["text"] for record in caplog.records] == ["first inner outer", "second inner outer"]


def test_a_model_that_the_gpu_does_not_take_is_told_in_one_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert, "_GPU_NODES", ("/dev/null",))
    caplog.set_level("INFO", "agent.runtimes.litert")
    runtime = LiteRtRuntime(accelerator="auto")
    path = CATALOG.path(CATALOG.families["digits"].variants["gateway-fp16"])
    for _ in range(2):
        runtime.load(path)
    assert capfd.readouterr().err == ""
    assert len(caplog.messages) <= 1 and not any("\n" in message for message in caplog.messages)
