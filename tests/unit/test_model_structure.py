"""Files of unknown origin are looked through before a library opens them, and opened in a process with limits."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from agent.config import GpuSection
from agent.core.clock import SystemClock
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.registry.model_structure import MAX_DEPTH, check_structure
from agent.runtimes.base import Confinement, ModelFile
from agent.runtimes.isolated import ProcessEngine
from agent.runtimes.pool import RuntimePool
from agent.runtimes.runners import RuntimeOptions
from tests.protobuf import field, varint

CATALOG = load_catalog(catalog_path(None))
VARIANTS = [variant for family in CATALOG.families.values() for variant in family.variants.values()]
MUTATIONS = 300


def onnx(tensor: bytes = b"") -> bytes:
    return field(1, 8) + field(7, field(5, tensor))


def refused(tmp_path: Path, data: bytes, suffix: str = "onnx") -> str:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its structure is wrong") as found:
        check_structure(path.name, data, suffix)
    return str(found.value)


def shared_operators(count: int) -> bytes:
    """A TFLite file of `count` operators that are one and the same table, whose inputs are `count` times tensor 0."""
    builder = flatbuffers.Builder(1 << 20)
    schema.OperatorCodeStart(builder)
    code = schema.OperatorCodeEnd(builder)
    schema.TensorStart(builder)
    tensor = schema.TensorEnd(builder)
    schema.BufferStart(builder)
    buffer = schema.BufferEnd(builder)
    inputs = builder.CreateNumpyVector(np.zeros(count, np.int32))
    schema.OperatorStart(builder)
    schema.OperatorAddInputs(builder, inputs)
    operator = schema.OperatorEnd(builder)

    def vector(table: int, times: int = 1) -> int:
        builder.StartVector(4, times, 4)
        for _ in range(times):
            builder.PrependUOffsetTRelative(table)
        return builder.EndVector()

    tensors, operators = vector(tensor), vector(operator, count)
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, tensors)
    schema.SubGraphAddOperators(builder, operators)
    graph = schema.SubGraphEnd(builder)
    codes, graphs, buffers = vector(code), vector(graph), vector(buffer)
    schema.ModelStart(builder)
    schema.ModelAddVersion(builder, 3)
    schema.ModelAddOperatorCodes(builder, codes)
    schema.ModelAddSubgraphs(builder, graphs)
    schema.ModelAddBuffers(builder, buffers)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_small_file_that_points_to_the_same_thing_again_and_again(tmp_path: Path) -> None:
    check_structure("m", shared_operators(100), "tflite")
    assert "more than 1048576" in refused(tmp_path, shared_operators(65_536), "tflite")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_ships_is_sound(variant) -> None:  # type: ignore[no-untyped-def]
    check_structure(variant.path, CATALOG.path(variant).read_bytes(), variant.format)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "has no graph"),
        (b"\xff" * 100, "a number that does not end"),
        (onnx(field(13, b"location: ../../etc/passwd")), "kept in another file"),
        (onnx(field(14, 1)), "kept in another file"),
        (onnx(field(1, 1 << 40)), "elements"),
        (onnx(field(1, varint(1 << 20) + varint(1 << 20))), "elements"),
        (onnx(field(1, varint(2) * 70)), "dimensions"),
        (field(7, b"")[:-1] + b"\x7f", "outside of its message"),
        (b"\x3b" + b"\x00", "wire type 3"),
    ],
    ids=["empty", "noise", "external", "external location", "huge", "huge packed", "many dims", "cut off", "groups"],
)
def test_onnx_files_that_are_not(tmp_path: Path, data: bytes, why: str) -> None:
    assert why in refused(tmp_path, data)


def test_graphs_in_graphs_in_graphs(tmp_path: Path) -> None:
    graph = b""
    for _ in range(MAX_DEPTH):
        graph = field(1, field(5, field(6, graph)))
    assert "deep" in refused(tmp_path, field(7, graph))


def test_a_depth_bomb_does_not_go_deep(tmp_path: Path) -> None:
    """Each byte pair another level, far beyond any stack."""
    graph = b""
    for _ in range(3000):
        graph = field(1, field(5, field(6, graph)))
    refused(tmp_path, field(7, graph))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_mutations_are_refused_with_a_reason_or_pass_and_never_anything_else(variant) -> None:  # type: ignore[no-untyped-def]
    whole = CATALOG.path(variant).read_bytes()[:200_000]
    chance = random.Random(5)
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 9)):
            at = chance.randrange(len(data))
            data[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32))))
        cut = data[: chance.randrange(8, len(data))] if chance.random() < 0.2 else data
        try:
            check_structure("model", bytes(cut), variant.format)
        except ValueError as error:
            assert "its structure is wrong" in str(error)


# --- limits -----------------------------------------------------------------------------------------------------------

TFLITE = CATALOG.families["digits"].variants["gateway-fp16"]
CLOUD = CATALOG.families["digits"].variants["cloud-fp32"]


def file_of(variant) -> ModelFile:  # type: ignore[no-untyped-def]
    return ModelFile(CATALOG.path(variant), variant.format, variant.sha256)


@pytest.fixture
async def confined() -> AsyncIterator[RuntimePool]:
    pool = RuntimePool(GpuSection(), SystemClock(), confinement=Confinement(1024, 60, check_structure))
    yield pool
    await pool.close()


@pytest.mark.parametrize("variant", [TFLITE, CLOUD], ids=["tflite", "onnx"])
async def test_sound_models_run_within_the_limits_and_never_in_this_process(confined: RuntimePool, variant) -> None:  # type: ignore[no-untyped-def]
    await confined.load(CATALOG.path(variant), variant.format, variant.sha256)
    status = confined.status()
    assert status["isolation"] == "process"
    assert status["models"][variant.sha256[:12]]["runs_in"] == "process"


async def test_a_file_that_is_not_sound_is_opened_by_nobody(confined: RuntimePool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data := onnx(field(14, 1)))
    with pytest.raises(ValueError, match="kept in another file"):
        await confined.load(path, "onnx", hashlib.sha256(data).hexdigest())
    assert confined.status()["pid"] is None, "no process was started for it"


async def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """A file that nobody writes to holds the load up for ever."""
    import os

    fifo = tmp_path / "slow.tflite"
    os.mkfifo(fifo)
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock(), Confinement(1024, 1.0, check_structure))
    with pytest.raises(ValueError, match=r"takes the runtime down: .* did not answer for 1\.0 s and was killed"):
        await engine.load(ModelFile(fifo, "tflite", "0" * 64))
    await engine.close()


async def test_one_that_takes_too_much_memory_is_refused() -> None:
    """The library needs more than 8 MB to open anything: it says so, or does not come to an end."""
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock(), Confinement(8, 5, check_structure))
    try:
        with pytest.raises(ValueError, match=r"it takes more memory than it may|takes the runtime down|alloc"):
            await engine.load(file_of(CLOUD))
    finally:
        await engine.close()
