"""The audit trail: what is in it, that nothing can be changed in it unseen, and what happens when the disk fails."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cli import main
from agent.config import AuditSection
from agent.core.clock import ManualClock
from agent.core.errors import AuditUnavailable, Unavailable
from agent.core.types import Attempt, Tier
from agent.security import audit as audit_module
from agent.security.audit import Audit, pseudonym
from agent.security.audit_file import AuditFiles, audit_files, read_lines
from agent.security.chain import START, Head, check, link
from tests.unit.mqtt_fakes import catalog, request, result

WAIT_S = 10.0
KEY = b"k" * 32


# --- the chain, pure -------------------------------------------------------------------------------------------------


def chain(count: int, head: Head | None = None) -> list[bytes]:
    lines, head = [], head or Head()
    for number in range(count):
        line, head = link(head, {"kind": "request", "n": number})
        lines.append(line)
    return lines


def test_a_chain_can_be_checked_by_anybody() -> None:
    """As docs/security.md says it, without this package."""
    import hashlib

    prev = START
    for line in chain(5):
        body, _, tail = line.rpartition(b',"hash":"')
        assert hashlib.sha256(body).hexdigest() == tail[:64].decode()
        assert json.loads(line)["prev"] == prev
        prev = tail[:64].decode()


def test_a_whole_chain() -> None:
    lines = chain(10)
    report = check([("a", lines[:4]), ("b", []), ("c", lines[4:])])
    assert (report.broken, report.lines, report.first, report.head.seq) == (None, 10, 1, 10)


LINES = chain(10)
TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a changed field": lambda lines: [*lines[:4], lines[4].replace(b'"n":4', b'"n":5'), *lines[5:]],
    "a line taken out": lambda lines: [*lines[:4], *lines[5:]],
    "two lines in another order": lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]],
    "a line put in": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "a line of another chain": lambda lines: [*lines[:4], link(Head(4, START), {"n": 4})[0], *lines[5:]],
    "a broken hash": lambda lines: [*lines[:4], lines[4].replace(b'"hash":"', b'"hash":"0')[:-4] + b'"}\n', *lines[5:]],
    "a line cut off": lambda lines: [*lines[:4], lines[4][:-9]],
    "no JSON": lambda lines: [*lines[:4], b"\n", *lines[5:]],
    "a line without an end": lambda lines: [*lines[:4], b"x" * 10_000, *lines[5:]],
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_what_is_tampered_with_is_found_at_its_line(tamper: Callable[[list[bytes]], list[bytes]]) -> None:
    report = check([("file", tamper(LINES))])
    assert report.broken is not None
    assert report.broken.line == 5


@given(st.integers(0, 9), st.data())
def test_no_byte_can_be_changed_unseen(number: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(LINES[number]) - 1))
    changed = bytearray(LINES[number])
    changed[at] ^= data.draw(st.integers(1, 255))
    report = check([("file", [*LINES[:number], bytes(changed), *LINES[number + 1 :]])])
    assert report.broken is not None
    assert report.broken.line in (number + 1, number + 2)


def test_what_is_cut_off_at_the_end_shows_by_an_anchor_only() -> None:
    anchor = check([("file", LINES)]).head
    cut = check([("file", LINES[:6])], anchor)
    assert cut.broken is None
    assert not cut.anchored
    assert check([("file", LINES)], check([("file", LINES[:6])]).head).anchored


def test_a_chain_whose_beginning_was_deleted_by_rotation() -> None:
    report = check([("file", LINES[4:])])
    assert (report.broken, report.first) == (None, 5)


# --- the trail -------------------------------------------------------------------------------------------------------


class Trail:
    """An `Audit` in a folder, opened when it is first used and closed to be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ManualClock()

    def open(self, **settings: Any) -> Audit:
        section = AuditSection(enabled=True, dir=self.folder / "audit", **settings)
        self.audit = Audit(section, self.folder, self.clock, {"cloud:eu": "eu-west", "gateway": None})
        self.audit.open()
        return self.audit

    @staticmethod
    def until(condition: Callable[[], object]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end
            os.sched_yield()

    def lines(self) -> list[dict[str, Any]]:
        self.audit.close()
        report = check((path.name, read_lines(path)) for path in audit_files(self.folder / "audit"))
        assert report.broken is None, report.broken
        return [json.loads(line) for path in audit_files(self.folder / "audit") for line in read_lines(path)]


@pytest.fixture
def trail(tmp_path: Path) -> Iterator[Trail]:
    trail = Trail(tmp_path)
    yield trail
    trail.audit.close()


VARIANT = catalog().family("toy").variants["edge"]


def test_what_is_recorded_of_a_request(trail: Trail) -> None:
    audit = trail.open()
    asked = request([7.125, 2, 3, 4], id="r1", producer="m7", asked_by="service:meter", metadata={"patient": "Ada"})
    answer = result(asked, VARIANT)._replace(
        tier=Tier.CLOUD_GPU,
        target="cloud:eu",
        attempts=(Attempt("cloud:eu", Tier.CLOUD_GPU, "large", "ok", 0.01, None),),
    )
    audit.request(asked, answer)
    audit.request(asked, answer._replace(cached=True, stale=True, target="cache", tier=Tier.FALLBACK))
    audit.request(asked, Unavailable("no"))
    audit.request(asked, None)
    audit.refusal({"who": "unknown", "from": "10.0.0.7", "outcome": "unauthorized"})
    audit.act("start", version="1")
    first, stale, refused, gone, stranger, act = trail.lines()
    assert {name: value for name, value in first.items() if name not in ("seq", "prev", "hash")} == {
        "at": "2023-11-14T22:13:20.000Z",
        "kind": "request",
        "who": "service:meter",
        "producer": "m7",
        "request_id": "r1",
        "model": "toy",
        "class": "near",
        "outcome": "ok",
        "tier": "cloud_gpu",
        "target": "cloud:eu",
        "region": "eu-west",
        "variant": VARIANT.id,
        "model_sha256": VARIANT.sha256,
        "attempts": [["cloud:eu", "eu-west", "ok"]],
    }
    assert (stale["outcome"], stale["tier"], refused["outcome"]) == ("stale", "fallback", "unavailable")
    assert gone["outcome"] == "abandoned"
    assert (stranger["kind"], stranger["from"], act["what"]) == ("refusal", "10.0.0.7", "start")
    text = json.dumps([first, stale, refused])
    assert "7.125" not in text and "Ada" not in text and "patient" not in text


def test_masks_and_pseudonyms(trail: Trail, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    audit = trail.open(key_file=tmp_path / "key", rules={"request_id": "mask", "who": "pseudonym", "model": "keep"})
    for producer in ("m7", "m8", "m7"):
        asked = request(id="Ada Lovelace", producer=producer, asked_by="user:ada@example.org")
        audit.request(asked, result(asked, VARIANT))
    lines = trail.lines()
    assert [line["producer"] for line in lines] == [pseudonym(KEY, name) for name in ("m7", "m8", "m7")]
    assert {line["request_id"] for line in lines} == {"***"}
    assert "ada" not in json.dumps(lines).lower()
    assert main(["audit", "pseudonym", "m7", "--key-file", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out.strip() == lines[0]["producer"]
    assert pseudonym(b"j" * 32, "m7") != lines[0]["producer"]


@pytest.mark.parametrize("rule", ["pseudonym", "mask"])
def test_a_pseudonym_is_not_undone_by_who_asked(trail: Trail, tmp_path: Path, rule: Any) -> None:
    (tmp_path / "key").write_bytes(KEY)
    audit = trail.open(key_file=tmp_path / "key", rules={"producer": rule})
    for who in ("mqtt:ward-7", "sensor:ward-7"):
        audit.request(request(producer="ward-7", asked_by=who), Unavailable("no"))
        audit.refusal({"who": who, "outcome": "rate_limited"})
    lines = trail.lines()
    hidden = pseudonym(KEY, "ward-7") if rule == "pseudonym" else "***"
    assert [line["who"] for line in lines] == [f"mqtt:{hidden}"] * 2 + [f"sensor:{hidden}"] * 2
    assert "ward-7" not in json.dumps(lines)


def test_what_cannot_be_written_is_counted_and_the_rest_is_written(
    trail: Trail, caplog: pytest.LogCaptureFixture
) -> None:
    audit = trail.open()
    audit.act("before", text="\ud800")
    trail.until(lambda: audit.status()["waiting"] == 0)
    audit.act("never", number=float("nan"), unknown={b"\xff": 1})
    trail.until(lambda: audit.status()["waiting"] == 0)
    assert audit.alive
    audit.act("after")
    lines = trail.lines()
    assert [line.get("what", line.get("lost")) for line in lines] == ["before", 1, "after"]
    assert "could not be made" in caplog.text


def test_long_names_are_cut(trail: Trail) -> None:
    audit = trail.open()
    asked = request(id="x" * 5000, producer="y" * 5000, asked_by="z" * 5000)
    audit.request(asked, result(asked, VARIANT))
    (line,) = trail.lines()
    assert {len(line[name]) for name in ("request_id", "producer", "who")} == {256}


class Disk:
    """Fails as it is told, in place of the system's write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trail: Trail) -> None:
        self.failing: int | None = None
        self.tried = 0
        real = AuditFiles.append

        def append(files: AuditFiles, entries: Any) -> None:
            self.tried += 1
            if self.failing is not None:
                raise OSError(self.failing, os.strerror(self.failing))
            real(files, entries)

        monkeypatch.setattr(AuditFiles, "append", append)
        monkeypatch.setattr(audit_module, "RETRY_S", 0.01)
        self._trail = trail

    def until(self, condition: Callable[[], object]) -> None:
        self._trail.until(condition)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_drop_counts_what_is_lost_and_says_so_in_the_chain(
    trail: Trail, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = Disk(monkeypatch, trail)
    disk.failing = number
    audit = trail.open(queue=16)
    for count in range(20):
        audit.require()
        audit.act(f"n{count}")
    disk.until(lambda: audit.problem())
    assert os.strerror(number) in audit.problem()
    assert audit.status()["dropped"] == 4
    disk.failing = None
    disk.until(lambda: not audit.problem())
    lines = trail.lines()
    assert [line.get("what") for line in lines if line["kind"] == "act"] == [f"n{count}" for count in range(16)]
    assert [line["lost"] for line in lines if line["kind"] == "gap"] == [4]


def test_refuse_answers_nothing_that_cannot_be_recorded(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, trail)
    audit = trail.open(queue=16, on_full="refuse")
    audit.require()
    disk.failing = errno.ENOSPC
    asked = request(asked_by="loopback")
    audit.request(asked, result(asked, VARIANT))
    disk.until(lambda: audit.problem())
    with pytest.raises(AuditUnavailable) as caught:
        audit.require()
    assert (caught.value.http_status, caught.value.retry_after_s) == (503, 0.01)
    for _ in range(100):  # what was admitted before is kept, beyond the queue's length
        audit.request(asked, result(asked, VARIANT))
    for _ in range(100):
        audit.refusal({"who": "unknown"})
    assert audit.status()["dropped"] == 100
    disk.failing = None
    disk.until(lambda: not audit.problem())
    audit.require()
    assert len([line for line in trail.lines() if line["kind"] == "request"]) == 101


def test_a_damaged_last_file_is_set_aside_and_named(trail: Trail) -> None:
    trail.open(max_file_bytes=4096).act("one")
    trail.lines()
    (path,) = audit_files(trail.folder / "audit")
    path.write_bytes(b"rubbish\n" * 10)
    audit = trail.open()
    audit.act("two")
    lines = trail.lines()
    assert [line["what"] for line in lines] == ["audit resumed", "two"]
    assert lines[0]["set_aside"] == f"{path.name} was set aside as damaged"
    assert path.with_suffix(".jsonl.damaged").read_bytes() == b"rubbish\n" * 10
    assert "damaged" in audit.problem()
    (path,) = audit_files(trail.folder / "audit")
    path.write_bytes(b"again\n" * 10)
    trail.open().act("three")
    trail.lines()
    kept = {aside.read_bytes()[:5] for aside in path.parent.glob("*.damaged*")}
    assert kept == {b"rubbi", b"again"}, "what was set aside first is still there"


# --- the command -----------------------------------------------------------------------------------------------------


def test_verify(trail: Trail, capsys: pytest.CaptureFixture[str]) -> None:
    audit = trail.open()
    for number in range(20):
        audit.act(f"act {number}")
    trail.lines()
    folder = trail.folder / "audit"
    anchor = audit.status()["head"]
    assert main(["audit", "verify", str(folder), "--anchor", anchor]) == 0
    assert f"20 lines in 1 files are whole; the head is {anchor}" in capsys.readouterr().out
    (path,) = audit_files(folder)
    whole = path.read_bytes()

    path.write_bytes(whole.replace(b"act 7", b"act 8"))
    assert main(["audit", "verify", str(folder)]) == 1
    assert f"{path}: line 8: changed" in capsys.readouterr().err

    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    assert main(["audit", "verify", str(folder)]) == 0, "nothing shows"
    assert main(["audit", "verify", str(folder), "--anchor", anchor]) == 1
    assert "the end was cut off" in capsys.readouterr().err
    assert main(["audit", "verify", str(folder), "--anchor", "x"]) == 2
    assert main(["audit", "verify", str(trail.folder)]) == 1


@pytest.mark.parametrize("topic", ["t" * 200, "ж" * 200])
def test_a_reload_that_changed_many_long_keys_is_a_line_that_can_be_verified(trail: Trail, topic: str) -> None:
    audit = trail.open()
    audit.act("reload", changed=[f"sensors.{topic}"] * 50)
    (line,) = trail.lines()  # which verifies them
    assert line["changed"][0] == f"sensors.{topic}"
    assert line["changed"][-1] == f"and {50 - len(line['changed']) + 1} more"
    audit = trail.open()
    audit.act("start")
    assert [line["what"] for line in trail.lines()] == ["reload", "start"]


@pytest.mark.parametrize("rule", ["pseudonym", "mask"])
def test_a_pseudonym_is_not_undone_by_the_id_of_a_streamed_sample(trail: Trail, tmp_path: Path, rule: Any) -> None:
    (tmp_path / "key").write_bytes(KEY)
    audit = trail.open(key_file=tmp_path / "key", rules={"producer": rule})
    audit.request(request(id="ward-7-41", producer="ward-7", asked_by="sensor:ward-7"), Unavailable("no"))
    (line,) = trail.lines()
    hidden = pseudonym(KEY, "ward-7") if rule == "pseudonym" else "***"
    assert (line["request_id"], line["who"]) == (f"{hidden}-41", f"sensor:{hidden}")
