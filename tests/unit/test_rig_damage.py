"""What a bad line does to bytes: the rates are what they say, and the same seed damages the same bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.rig.damage import Damage, Faults, Wire

ALL = Faults(
    bit_errors=0.01, drop=0.01, duplicate=0.01, drop_frames=0.1, drop_delimiters=0.1, garbage_every=50, garbage_bytes=5
)
DATA = bytes(range(1, 100)) + b"\0" + b"frame\0" * 200


def apply(faults: Faults, data: bytes, seed: int = 1) -> bytes:
    return Damage(faults, seed).apply(data)


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, len(DATA)), max_size=20))
def test_damage_depends_on_seed_and_position_not_on_the_portions(seed: int, cuts: list[int]) -> None:
    damage = Damage(ALL, seed)
    edges = [0, *sorted(cuts), len(DATA)]
    portions = [damage.apply(DATA[begin:end]) for begin, end in itertools.pairwise(edges)]
    assert b"".join(portions) == apply(ALL, DATA, seed)


def test_another_seed_damages_otherwise() -> None:
    assert apply(ALL, DATA, 1) != apply(ALL, DATA, 2)


def test_without_faults_bytes_arrive_as_they_are() -> None:
    assert apply(Faults(), DATA) == DATA


def test_turning_one_fault_on_does_not_move_another() -> None:
    damage = Damage(Faults(bit_errors=1e-3), 5)
    alone = damage.apply(bytes(10_000))
    with_frames = Damage(Faults(bit_errors=1e-3, drop_delimiters=1e-9), 5).apply(bytes(10_000))
    assert alone == with_frames and damage.counts["bits"] == sum(byte.bit_count() for byte in alone)


def test_bit_errors_come_at_their_rate() -> None:
    errors = sum(byte.bit_count() for byte in apply(Faults(bit_errors=1e-3), bytes(200_000)))
    assert 1_300 < errors < 1_900  # 1,600 expected, standard deviation 40


def test_dropped_and_doubled_bytes_are_counted() -> None:
    damage = Damage(Faults(drop=0.1, duplicate=0.05), 3)
    arrived = damage.apply(bytes(range(256)) * 40)
    assert len(arrived) == 256 * 40 - damage.counts["dropped"] + damage.counts["duplicated"]
    assert 850 < damage.counts["dropped"] < 1_200 and 350 < damage.counts["duplicated"] < 600


def test_frames_are_lost_whole() -> None:
    damage = Damage(Faults(drop_frames=0.3), 4)
    frames = [b"%04d" % number for number in range(500)]
    arrived = damage.apply(b"".join(frame + b"\0" for frame in frames)).split(b"\0")[:-1]
    assert set(arrived) < set(frames) and arrived == sorted(arrived)
    assert damage.counts["frames"] == 500 - len(arrived) and 100 < damage.counts["frames"] < 200


def test_a_lost_delimiter_joins_two_frames() -> None:
    damage = Damage(Faults(drop_delimiters=0.3), 4)
    arrived = damage.apply(b"abc\0" * 300)
    assert arrived.replace(b"\0", b"") == b"abc" * 300
    assert arrived.count(0) == 300 - damage.counts["delimiters"] and 50 < damage.counts["delimiters"] < 130


def test_garbage_comes_between() -> None:
    arrived = apply(Faults(garbage_every=100, garbage_bytes=7), bytes(1_000))
    assert len(arrived) == 1_070 and arrived[:100] == bytes(100) and arrived[107:207] == bytes(100)


@pytest.mark.parametrize("wrong", [{"bit_errors": 1.0}, {"drop": -0.1}, {"baud": -1}, {"drop_frames": 2.0}])
def test_a_rate_that_is_none_is_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Faults(**wrong)  # type: ignore[arg-type]


def test_a_paced_wire_carries_ten_bits_to_a_byte() -> None:
    wire = Wire(Faults(baud=10_000))  # a byte in a millisecond
    wire.put(b"12345", 1.0)
    assert wire.take(1.0) == b"" and wire.take(1.0021) == b"12"
    assert wire.take(1.0039) == b"3" and wire.take(9.0) == b"45"


def test_a_paced_wire_wakes_at_the_end_of_a_frame() -> None:
    wire = Wire(Faults(baud=10_000))
    wire.put(b"ab\0cd", 1.0)
    assert wire.take(1.0) == b""
    assert wire.wake_at() == pytest.approx(1.003)
    assert wire.take(1.003) == b"ab\0"


def test_what_a_wire_is_late_with_is_not_lost_to_the_pace() -> None:
    wire = Wire(Faults(baud=10_000))
    wire.put(b"x" * 100, 1.0)
    wire.take(1.0)
    taken = sum(len(wire.take(1.0 + step * 0.0137)) for step in range(1, 8))
    assert taken == 95  # in 95.9 ms


def test_a_long_wire_delays_and_keeps_the_order() -> None:
    wire = Wire(Faults(delay_s=0.5))
    wire.put(b"a", 1.0)
    wire.put(b"b", 1.2)
    assert wire.wake_at() == 1.5 and wire.take(1.49) == b""
    assert wire.take(1.5) == b"a" and wire.take(2.0) == b"b"
    assert wire.wake_at() is None
