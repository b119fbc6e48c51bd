"""The firmware as an image for the Cortex-M4F, on an emulated board: its UART, its faults, and core/ on that core."""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from board import (
    ACTIVE,
    BAD,
    BAD_LENGTH,
    OVERHEAD,
    ROOT,
    SELFTEST,
    TRIAL,
    VECTORS,
    Image,
    Status,
    infer,
    line,
    model,
)
from qemu import Machine, build, script

from hil.virtual.engine import TflmEngine
from hil.virtual.library import known_operators, validate_model

NO_ENGINE = 7
ANY_COUNTER = 1  # a flag of MODEL_BEGIN
POWER_ON, PIN, SOFTWARE, WATCHDOG, FAULT = 1, 2, 3, 4, 5
# The firmware waits 8 s for itself; the emulator's clock is the host's.
WATCHDOG_LIMIT_S = 60
# The emulator takes 20 to 40 us for a byte of the line, so the whole megabyte is for CI.
GARBAGE = 1 << 18 if os.environ.get("CI") else 1 << 17

FRAMES = {frame["name"]: frame for frame in VECTORS["frames"]}
EVENTS = {2: "decode", 3: "short", 4: "crc", 5: "oversize"}
ENCODE, DECODE, SHA256, CRC32, VALIDATE = 1, 2, 3, 4, 5
CHECK_ROOM = 16384 - OVERHEAD


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qemu", tmp_path_factory.mktemp("image"))


@pytest.fixture
def machine(image: Path, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(image, tmp_path)
    yield machine
    machine.close()


def test_it_boots_and_says_what_it_is(machine: Machine) -> None:
    hello = machine.booted()
    assert (hello.board, hello.engine, hello.operators) == ("mps2-an386", "none", b"")
    assert (hello.reset_cause, hello.window, hello.uid, hello.arena) == (POWER_ON, 4, 0, 0)
    assert hello.capabilities == 0  # no engine, no Ed25519, and its flash is RAM
    assert hello.slot_size == 256 * 1024
    again = machine.hello()
    assert (again.boot_id, again.max_frame) == (hello.boot_id, 1088)


def test_it_keeps_within_its_flash_and_ram() -> None:
    said = script("qemu", "-t", "size")
    print(said)
    found = re.search(r"^the firmware +([0-9,]+) +([0-9,]+) +limit 24,000", said, re.MULTILINE)
    assert found, said
    for taken in found.groups():
        assert 16_000 < int(taken.replace(",", "")) < 24_000


def test_pings_of_all_sizes_and_a_clock_that_runs(machine: Machine) -> None:
    hello = machine.hello()
    times = []
    for size in (0, 1, 253, 254, 255, 1000, hello.max_frame - 28):
        body = random.Random(size).randbytes(size)
        pong = machine.ask("PING", body)
        assert (pong.type, pong.body[16:]) == ("PONG", body)
        times += struct.unpack_from("<QQ", pong.body)
    assert times == sorted(times)
    assert machine.ask("PING", bytes(hello.max_frame - 27)).code == BAD_LENGTH


def test_its_clock_keeps_the_hosts_pace(machine: Machine) -> None:
    def both() -> tuple[float, float]:
        before = time.monotonic()
        (there,) = struct.unpack_from("<Q", machine.ask("PING").body)
        return (before + time.monotonic()) / 2, there / 1e6

    machine.hello()
    here, there = both()
    time.sleep(2)
    later_here, later_there = both()
    assert abs((later_there - there) - (later_here - here)) < 0.1


def test_stats_tell_the_stack_and_the_overruns(machine: Machine) -> None:
    stats = machine.stats()
    assert stats[2] == 1
    assert 200 < stats[12] < 4096
    assert stats[14] == 0


def test_without_an_engine_inference_and_updates_are_refused(machine: Machine) -> None:
    machine.hello()
    digits = Image(model(), counter=1)
    assert machine.ask("INFER", infer(digits)).code == NO_ENGINE
    assert machine.ask("MODEL_BEGIN", digits.begin(1024)).code == NO_ENGINE
    assert Status.parse(machine.ask("MODEL_QUERY").body).slot == 0xFF


def test_reset_by_request_and_by_pin(machine: Machine) -> None:
    first = machine.booted()
    machine.send(line("RESET"))
    second = machine.booted()
    assert (second.reset_cause, second.boot_id != first.boot_id) == (SOFTWARE, True)
    machine.system_reset()
    third = machine.booted()
    assert (third.reset_cause, third.boot_id not in (first.boot_id, second.boot_id)) == (PIN, True)
    assert machine.ask("PING").type == "PONG"


def test_a_fault_is_reported_by_the_next_boot(machine: Machine) -> None:
    machine.booted()
    machine.jump(0xF0000000)
    assert machine.booted().reset_cause == FAULT
    report = machine.wait_for(0, type_="LOG").body
    assert report[0] == 3
    assert report[1:].startswith(b"fault: pc 0xf0000000 lr 0x")
    assert machine.ask("PING").type == "PONG"
    machine.send(line("RESET"))
    assert machine.booted().reset_cause == SOFTWARE
    assert machine.ask("PING").type == "PONG"
    assert "LOG" not in [message.type for message in machine.line.messages]


def test_the_watchdog_ends_a_hang(machine: Machine) -> None:
    machine.booted()
    machine.jump(machine.symbol("spin"))
    assert machine.booted(WATCHDOG_LIMIT_S).reset_cause == WATCHDOG
    assert machine.wait_for(0, type_="LOG").body[1:].startswith(b"watchdog reset: pc 0x%08x" % machine.symbol("spin"))
    assert machine.ask("PING").type == "PONG"


def test_a_good_frame_behind_garbage(machine: Machine) -> None:
    machine.hello()
    rng = random.Random(20)
    for _ in range(GARBAGE // 65536):
        machine.send(rng.randbytes(65536))
    machine.send(b"\0")
    assert machine.ask("PING", b"still here").body[16:] == b"still here"
    stats = machine.stats()
    assert stats[4] + stats[5] + stats[6] > GARBAGE // 1024
    assert stats[14] == 0  # nothing was lost before the decoder saw it


# -- core/ on the Cortex-M ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("check")
    machine = Machine(build("qemu-check", folder), folder)
    yield machine
    machine.close()


def packed(frame: dict) -> bytes:
    payload = bytes.fromhex(frame["payload_hex"])
    return struct.pack("<BBHI", frame["type"], frame["flags"], frame["seq"], frame["id"]) + payload


def events(body: bytes) -> list[str | bytes]:
    """What the decoder saw: errors by name, frames as header and payload."""
    found: list[str | bytes] = []
    at = 0
    while at < len(body):
        if body[at] != 1:
            found.append(EVENTS[body[at]])
            at += 1
            continue
        (size,) = struct.unpack_from("<H", body, at + 9)
        found.append(body[at + 1 : at + 9] + body[at + 11 : at + 11 + size])
        at += 11 + size
    return found


@pytest.mark.parametrize("name", FRAMES)
def test_frame_vectors_on_the_core(check: Machine, name: str) -> None:
    frame = FRAMES[name]
    encoded = bytes.fromhex(frame["line_hex"])
    assert check.ask(ENCODE, packed(frame)).body == encoded
    assert events(check.ask(DECODE, struct.pack("<HH", 2048, 7) + encoded).body) == [packed(frame)]


@pytest.mark.parametrize("step", [1, 7, 4096])
@pytest.mark.parametrize("stream", VECTORS["streams"], ids=lambda s: s["name"])
def test_stream_vectors_on_the_core(check: Machine, stream: dict, step: int) -> None:
    expected = [packed(FRAMES[e["frame"]]) if "frame" in e else e["error"] for e in stream["expect"]]
    question = struct.pack("<HH", stream["max_frame"], step) + bytes.fromhex(stream["line_hex"])
    assert events(check.ask(DECODE, question).body) == expected


@pytest.mark.parametrize("size", [0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 1000, 8000])
def test_digests_on_the_core(check: Machine, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert check.ask(SHA256, data).body == 2 * hashlib.sha256(data).digest()
    assert check.ask(CRC32, data).body == struct.pack("<I", zlib.crc32(data))


@pytest.mark.parametrize("family", ["digits", "motion"])
def test_the_validator_on_the_core_says_what_it_says_here(check: Machine, family: str) -> None:
    good = (ROOT / f"models/{family}/mcu-int8.tflite").read_bytes()
    assert len(good) <= CHECK_ROOM
    rng = random.Random(family)
    mutants = [good, good[:1000], b""]
    for _ in range(60):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
        mutants.append(bytes(mutant))
    for mutant in mutants:
        code, text, inputs, outputs = validate_model(mutant, known_operators())
        answer = check.ask(VALIDATE, mutant).body
        assert answer[:2] == struct.pack("<H", code)
        if code == 0:
            assert struct.unpack_from("<II", answer, 2) == (inputs, outputs)
        else:
            assert answer[10:].decode() == text


# -- with TensorFlow Lite Micro ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    library = os.environ.get("TFLM_LIB_DIR")
    if not library:
        pytest.skip("TFLM_LIB_DIR does not name a TensorFlow Lite Micro tree (docs/firmware.md)")
    folder = tmp_path_factory.mktemp("engine")
    machine = Machine(build("qemu", folder, library), folder)
    yield machine
    machine.close()


@pytest.mark.parametrize("family", ["digits", "motion"])
def test_the_shipped_models_answer_bit_for_bit_as_the_reference_runtime(with_engine: Machine, family: str) -> None:
    pytest.importorskip("tflite_micro")
    reference = TflmEngine(64 * 1024, known_operators())
    data = (ROOT / f"models/{family}/mcu-int8.tflite").read_bytes()
    shape = reference.load(data)
    rng = random.Random(family)
    inputs = [rng.randbytes(shape.input_bytes) for _ in range(200)]
    expected = []
    for given in inputs:
        answer = bytearray(shape.output_bytes)
        reference.invoke(given, memoryview(answer))
        expected.append(bytes(answer))

    image = Image(data, inputs[0] + expected[0], flags=ANY_COUNTER, arena=shape.arena_used)
    answer = with_engine.push(image)
    assert Status.parse(answer.body).state == ACTIVE, answer
    slot = next(slot for slot in with_engine.hello().slots if slot.state == ACTIVE)
    assert (slot.input_bytes, slot.output_bytes) == (shape.input_bytes, shape.output_bytes)
    times = []
    for given, answer in zip(inputs, expected, strict=True):
        result = with_engine.ask("INFER", infer(image, given))
        assert (result.type, result.body[16:]) == ("RESULT", answer)
        times.append(struct.unpack_from("<I", result.body, 12)[0])
    stats = with_engine.stats()
    assert stats[12] < 2560, "the stack is nearly used up"
    print(f"{family}: 200 of 200 answers equal; arena {slot.arena_used}, median {sorted(times)[100]} us, {stats[12]=}")


def test_a_model_survives_a_reset_and_a_damaged_one_is_refused(with_engine: Machine) -> None:
    digits = Image(model(), counter=7)
    assert Status.parse(with_engine.push(digits).body).state == ACTIVE
    with_engine.send(line("RESET"))
    with_engine.booted()
    assert with_engine.ask("INFER", infer(digits)).type == "RESULT"
    wrong = Image(model(1), infer(digits)[12:] + bytes(10), counter=8)
    assert with_engine.push(wrong).code == SELFTEST
    assert with_engine.ask("INFER", infer(digits)).type == "RESULT"


def kernel_of(machine: Machine) -> int:
    """A function that every inference of the digits model comes through."""
    table = subprocess.run(["arm-none-eabi-nm", "-C", machine.image], check=True, capture_output=True, text=True).stdout
    rows = [row for row in table.splitlines() if "tflite::MicroInterpreter::Invoke()" in row]
    assert rows, "the engine has no MicroInterpreter::Invoke"
    return int(rows[0].split()[0], 16)


@pytest.mark.parametrize(("target", "cause"), [("fault", FAULT), ("hang", WATCHDOG)])
def test_a_model_that_takes_the_core_down_in_its_trial_is_rolled_back(
    with_engine: Machine, target: str, cause: int
) -> None:
    """The core is led astray in the middle of an inference, as a defective kernel would do."""
    flags = {"flags": ANY_COUNTER}
    former, new = Image(model(), counter=20, **flags), Image(model(1), counter=21, **flags)
    assert Status.parse(with_engine.push(former).body).state == ACTIVE
    assert Status.parse(with_engine.push(new, trial=True).body).state == TRIAL
    assert with_engine.ask("INFER", infer(new)).type == "RESULT"
    with_engine.line.messages.clear()
    where = 0xF0000000 if target == "fault" else with_engine.symbol("spin")
    ask = line("INFER", infer(new), 900)
    with_engine.jump(where, kernel_of(with_engine), lambda: with_engine.send(ask))
    hello = with_engine.booted(WATCHDOG_LIMIT_S)
    assert (hello.reset_cause, hello.rollback) == (cause, 2)
    assert {slot.sha256: slot.state for slot in hello.slots} == {former.sha256: ACTIVE, new.sha256: BAD}
    texts = [with_engine.wait_for(0, type_="LOG").body[1:] for _ in range(2)]
    assert texts[1] == b"the model in trial was rolled back"
    assert with_engine.ask("INFER", infer(former)).type == "RESULT"


def test_a_confirmed_model_outlives_a_reset_and_an_unconfirmed_one_does_not(with_engine: Machine) -> None:
    former, new = (Image(model(i), counter=30 + i, flags=ANY_COUNTER) for i in range(2))
    assert Status.parse(with_engine.push(former).body).state == ACTIVE
    assert Status.parse(with_engine.push(new, trial=True).body).state == TRIAL
    with_engine.send(line("RESET"))
    hello = with_engine.booted()
    assert hello.rollback == 1
    assert with_engine.ask("INFER", infer(former)).type == "RESULT"
    assert Status.parse(with_engine.push(new, trial=True).body).state == TRIAL
    assert Status.parse(with_engine.ask("MODEL_CONFIRM", new.sha256[:8]).body).state == ACTIVE
    with_engine.send(line("RESET"))
    assert with_engine.booted().rollback == 0
    assert with_engine.ask("INFER", infer(new)).type == "RESULT"
