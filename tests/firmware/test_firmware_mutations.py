"""2,000 broken versions of each shipped model: refused with a reason by the firmware and, for the same reason, by the
gateway; or harmless. Never a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ROOT
from mutate import mutations, places, verdicts
from test_firmware_fuzz import run_sanitized

from hil.virtual.engine import EngineError, TflmEngine, run_disposable
from hil.virtual.library import known_operators, validate_model

MODELS = sorted(ROOT.glob("models/*/*.tflite"))
FOR_BOARDS = sorted(ROOT.glob("models/*/mcu-int8.tflite"))
COUNT = 2000
SANITIZED_COUNT = 2000


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_firmware_and_gateway_say_the_same(path: Path) -> None:
    operators = known_operators()
    reasons = set()
    for number, broken in enumerate(mutations(path.read_bytes(), name(path), COUNT)):
        board, gateway = verdicts(broken, operators)
        assert board == gateway, f"mutation {number}"
        assert board[0] == 0 or board[1], f"mutation {number} was refused without a reason"
        reasons.add(board[1])
    if path in FOR_BOARDS:
        assert len(reasons) > 25, "the mutations reach few of the checks"


class Unprobed(TflmEngine):
    """Without a process for each model: the test has one for all."""

    def _probe(self, model: bytes) -> int:
        return 0


@pytest.mark.parametrize("path", FOR_BOARDS, ids=name)
def test_what_is_let_through_is_harmless(path: Path) -> None:
    """It loads and runs, or the engine refuses it; the process that tries lives."""
    pytest.importorskip("tflite_micro")
    operators = known_operators()
    engine = Unprobed(64 * 1024, operators)
    accepted = [m for m in mutations(path.read_bytes(), name(path), COUNT) if validate_model(m, operators)[0] == 0]
    assert len(accepted) > COUNT // 10

    def run_all() -> None:
        ran = 0
        for number, model in enumerate(accepted):
            os.write(2, b"\nat %d" % number)
            try:
                info = engine.load(model)
                engine.invoke(bytes(info.input_bytes), memoryview(bytearray(info.output_bytes)))
                ran += 1
            except EngineError:
                continue
            except Exception as error:  # of the runtime's own Python reader, which the board does not have
                if "struct" not in type(error).__module__ and not isinstance(error, TypeError):
                    raise
        if ran < len(accepted) // 2:
            raise EngineError(f"{ran} of {len(accepted)} ran")

    run_disposable(run_all)


def test_the_firmware_s_validator_under_the_sanitizers() -> None:
    said = run_sanitized("mutate.py", "sanitized", str(SANITIZED_COUNT))
    assert said.count("ok") == len(MODELS)


def test_the_mutator_knows_the_schema() -> None:
    """Of every kind of table there is something to change, and the operators' and tensors' numbers are among it."""
    kinds = {place.what for place in places(FOR_BOARDS[0].read_bytes())}
    for wanted in ("Operator.0", "Operator.1 item", "Tensor.0 item", "Tensor.2", "SubGraph.1 item", "Buffer.0 length"):
        assert wanted in kinds
