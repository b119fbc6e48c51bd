"""The benchmark's own arithmetic and its command. What it measures is never a condition: machines differ."""

import argparse
import itertools
import json
import random

import pytest

from agent import cli
from agent.wire.mqtt_properties import MessageProperties
from hil.bench import main as bench
from hil.bench import report, stats
from hil.bench.http_client import post
from hil.bench.mqtt_client import PUBLISH, packet, publish
from hil.bench.report import Aim, Line, Report
from hil.bench.stats import Summary, alternate, quantile, summarise


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [
        ([7.0], 0.5, 7.0),
        ([7.0], 0.95, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0], 0.0, 1.0),
    ],
)
def test_quantile_is_a_sample(samples: list[float], share: float, expected: float) -> None:
    assert quantile(samples, share) == expected


def test_quantile_is_nearest_rank() -> None:
    hundred = [float(number) for number in range(1, 101)]
    random.Random(1).shuffle(hundred)
    assert [quantile(hundred, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_a_bad_block_does_not_move_the_median() -> None:
    good, bad = [1.0, 1.1, 1.2], [50.0, 60.0, 70.0]
    assert summarise([good, bad, good]) == Summary(count=9, p50=1.1, p95=1.2)
    with pytest.raises(ValueError, match="no blocks"):
        summarise([])
    with pytest.raises(ValueError, match="no samples"):
        summarise([good, []])


def test_sides_take_turns_and_no_side_always_follows_the_same_one() -> None:
    turns: list[tuple[str, float]] = []

    def side(name: str) -> stats.Sampler:
        def sample(seconds: float) -> list[float]:
            turns.append((name, seconds))
            return [float(len(turns)), 0.0]

        return sample

    found = alternate({"a": side("a"), "b": side("b")}, 2.0, blocks=4)
    assert [name for name, _ in turns] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {seconds for _, seconds in turns} == {0.5}
    assert {summary.count for summary in found.values()} == {8}


def line(ours: float, peer: float | None = None, aim: Aim | None = None, **options: bool) -> Line:
    beside = None if peer is None else Summary(10, peer, peer)
    return Line("mqtt", "name", "us", Summary(10, ours, ours), "peer", beside, aim, **options)


def test_ratio_is_always_a_cost() -> None:
    assert line(300.0, 200.0).ratio == 1.5
    assert line(300.0, 200.0, higher_is_better=True).ratio == pytest.approx(2 / 3)
    assert line(300.0).ratio is None


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (line(300.0, 200.0, Aim(1.5)), True),
        (line(301.0, 200.0, Aim(1.5)), False),
        (line(310.0, 200.0, Aim(1.5, allowance=10.0, allowance_name="the invoke")), True),
        (line(5.9, 2.0, Aim(6.0, "figure")), True),
        (line(6.1, 2.0, Aim(6.0, "figure")), False),
        (line(6.1, 2.0), None),
        (line(6.1, None, Aim(1.5)), None),
    ],
)
def test_verdicts(found: Line, met: bool | None) -> None:
    assert found.met is met


def test_the_table_says_what_was_missed() -> None:
    found = Report(1.0, {}, [line(300.0, 100.0, Aim(1.5)), line(100.0, 100.0, Aim(1.5))], {"mcu": "no firmware"})
    shown: list[str] = []
    report.text("mqtt", found.lines, shown.append)
    report.verdicts(found, shown.append)
    text = "\n".join(shown)
    assert "3.00x" in text and "NOT MET" in text
    assert "aims met: 1 of 2" in text
    assert "not measured: mcu: no firmware" in text


def test_wire_through_the_command(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{tmp_path}/bench.json"
    assert cli.main(["bench", "--only", "wire", "--seconds", "0.2", "--json", file]) == 0
    assert "cobs + crc32" in capsys.readouterr().out
    with open(file) as stream:
        found = json.load(stream)
    assert found["schema"] == report.SCHEMA and found["seconds"] == 0.2 and found["failed"] == {}
    machine = found["machine"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["python"] and machine["versions"]["cobs"]
    first = found["results"][0]
    assert first["bench"] == "wire" and first["unit"] == "us" and first["count"] > 0
    assert 0 < first["p50"] <= first["p95"]
    assert 0 < first["peer"]["p50"] <= first["peer"]["p95"] and first["peer"]["name"]
    assert first["ratio"] > 0
    assert first["aim"]["limit"] == 6 and first["aim"]["met"] is (first["aim"]["judged"] <= 6)


@pytest.mark.parametrize("options", [["--only", "wires"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_nonsense_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *options]) == 2
    assert "must be" in capsys.readouterr().err


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hil.bench import wire

    def missing(seconds: float) -> list[Line]:
        raise report.CannotMeasure("no cobs")

    monkeypatch.setattr(wire, "measure", missing)
    args = argparse.Namespace(only=["wire"], seconds=0.2, json=None)
    assert bench.main(args) == 1
    assert "not measured: wire: no cobs" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384])
def test_mqtt_packets_have_the_length_of_the_standard(size: int) -> None:
    made = packet(PUBLISH, 2, bytes(size))
    length, shift = 0, 0
    for at in itertools.count(1):
        length |= (made[at] & 0x7F) << shift
        shift += 7
        if made[at] < 0x80:
            break
    assert made[0] == 0x32 and length == size and len(made) == at + 1 + size


def test_requests_are_whole() -> None:
    sent = publish("a/b", b"{}", 1, MessageProperties())
    assert sent == b"\x32\x0a\x00\x03a/b\x00\x01\x00{}"
    assert post("/infer", b"{}", "application/json").endswith(b"Content-Length: 2\r\n\r\n{}")
