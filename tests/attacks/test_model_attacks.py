"""Models and catalogues made to harm: each is refused with its reason, and what is left goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli import main
from agent.config import GpuSection
from agent.core.clock import SystemClock
from agent.core.errors import ConfigError
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.registry.model_structure import check_structure
from agent.registry.signing import PrivateKey
from agent.registry.trust import CatalogSignature, signature_path
from agent.runtimes.base import Confinement, Format, ModelFile
from agent.runtimes.isolated import ProcessEngine
from agent.runtimes.pool import RuntimePool
from agent.runtimes.runners import RuntimeOptions
from agent.settings import load_settings
from hil.processes import Stage, free_port
from tests import protobuf
from tests.e2e.gateway import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")

KEY = PrivateKey.generate()
IMAGE = ("image", 1, 8, 8, 1)
TRIAL_S = 60.0


class Site:
    """A fleet's own catalogue: a copy of what ships, for an attacker to change."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(
            catalog_path(None).parent, folder / "models", ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
        self.folder = folder
        self.root = folder / "models"
        self.path = self.root / "catalog.yaml"
        self.document: dict[str, Any] = yaml.safe_load(self.path.read_text())

    def variant(self, name: str) -> dict[str, Any]:
        family, _, id_ = name.partition("/")
        found: dict[str, Any] = self.document["families"][family]["variants"][id_]
        return found

    def write(self) -> None:
        self.path.write_text(yaml.safe_dump(self.document))

    def put(self, name: str, data: bytes, suffix: str) -> None:
        """In place of a variant's file, with a catalogue that says that this is right."""
        entry = self.variant(name)
        entry["path"] = f"put.{name.replace('/', '-')}.{suffix}"
        (self.root / entry["path"]).write_bytes(data)
        entry |= {"format": suffix, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for own in self.document["families"].values():  # calibrations were of the former files
            for other in own["variants"].values():
                other.pop("calibration", None)
        self.write()

    def sign(self, counter: int = 1, key: PrivateKey = KEY) -> None:
        CatalogSignature.make(self.path, counter, key).save(signature_path(self.path))

    def config(self, **models: Any) -> dict[str, Any]:
        section = {"catalog": str(self.path), "trusted_keys": [KEY.public.raw.hex()], **models}
        return {"models": section, "gateway": {"state_dir": str(self.folder / "state")}}

    def refusal(self, **models: Any) -> str:
        """Of a start."""
        path = self.folder / "edge-agent.yaml"
        path.write_text(json.dumps(self.config(**models)))
        with pytest.raises(ConfigError) as refused:
            load_settings(path, any_file=True)
        return str(refused.value)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# --- a catalogue that somebody changed --------------------------------------------------------------------------------


def accuracy(site: Site) -> None:
    site.variant("digits/gateway-fp16")["accuracy"]["value"] = 1.0
    site.write()


def targets(site: Site) -> None:
    site.variant("digits/mcu-int8")["targets"] = ["edge_mcu", "edge_gpu"]
    site.write()


def another_file(site: Site) -> None:
    site.put("digits/gateway-fp16", (site.root / site.variant("motion/gateway-fp16")["path"]).read_bytes(), "tflite")


@pytest.mark.parametrize("change", [accuracy, targets, another_file])
def test_an_entry_that_was_edited_ends_the_signature(site: Site, change: Callable[[Site], None]) -> None:
    site.sign()
    change(site)
    why = site.refusal()
    assert "models.catalog" in why and "it was changed since it was signed" in why
    assert "edge-agent models sign-catalog" in why, "what to do"


def test_a_signature_of_another_catalogue_is_none_of_this_one(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    accuracy(other)
    other.sign()
    shutil.copy(signature_path(other.path), signature_path(site.path))
    assert "it was changed since it was signed" in site.refusal()


def test_another_key_and_no_key(site: Site) -> None:
    assert "No such file" in site.refusal()
    site.sign(key=PrivateKey.generate())
    assert "which is not trusted" in site.refusal()


def test_what_was_read_is_what_is_trusted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue that is read is the attacker's; the signed one is back before anybody looks at the signature."""
    signed = site.path.read_bytes()
    site.sign()
    accuracy(site)

    def swapped(path: Path, **options: Any) -> Any:
        catalog = load_catalog(path, **options)
        path.write_bytes(signed)
        return catalog

    monkeypatch.setattr("agent.settings.load_catalog", swapped)
    assert "it was changed since it was signed" in site.refusal()


# --- names that lead elsewhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["path", "selftest"])
@pytest.mark.parametrize("value", ["../../etc/passwd", "/etc/passwd", "digits/../../x", "digits/\0x"])
def test_paths_out_of_the_folder(site: Site, field: str, value: str) -> None:
    site.variant("digits/mcu-int8")[field] = value
    site.write()
    why = site.refusal(require_signed=False)
    assert f"families.digits.variants.mcu-int8.{field}: must stay below the catalogue's folder" in why


@pytest.mark.parametrize("name", ["../digits", "a/b", "", "digits\0", "." * 3])
def test_names_that_are_paths(site: Site, name: str) -> None:
    site.document["families"][name] = site.document["families"].pop("motion")
    site.write()
    assert "families" in site.refusal(require_signed=False)


@pytest.mark.parametrize("what", ["symlink", "symlinked folder", "fifo", "device", "circle", "long name"])
def test_files_that_are_no_files_of_the_catalogue(site: Site, what: str, tmp_path: Path) -> None:
    """Nothing of them is read: a pipe or a device could be read for ever."""
    entry = site.variant("digits/gateway-fp16")
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(site.root / entry["path"], outside / "model.tflite")
    trap = site.root / "trap"
    entry["path"] = "trap"
    expected = "leads out of the catalogue's folder"
    if what == "symlink":
        trap.symlink_to(outside / "model.tflite")
    elif what == "symlinked folder":
        trap.symlink_to(outside)
        entry["path"] = "trap/model.tflite"
    elif what == "device":
        trap.symlink_to("/dev/zero")
    elif what == "circle":
        trap.symlink_to(trap)
        expected = "leads nowhere"
    elif what == "long name":
        entry["path"] = "x" * 5000
        expected = "leads nowhere"
    else:
        os.mkfifo(trap)
        expected = "is no plain file"
    site.write()
    with pytest.raises(ConfigError) as refused:
        load_catalog(site.path)
    assert f"families.digits.variants.gateway-fp16.path: {expected}" in str(refused.value)


# --- files that harm whoever opens them -------------------------------------------------------------------------------


async def tried(path: Path, data: bytes, memory_mb: int = 1024, seconds: float = TRIAL_S) -> str:
    """What the disposable process says of a file with this content; empty: it runs."""
    await asyncio.to_thread(path.write_bytes, data)
    limits = Confinement(memory_mb, seconds, check_structure)
    engine = ProcessEngine(RuntimeOptions(), 1, seconds, SystemClock(), limits)
    format: Format = "onnx" if path.suffix == ".onnx" else "tflite"
    try:
        check_structure(path.name, data, format)
        await engine.load(ModelFile(path, format, hashlib.sha256(data).hexdigest(), len(data)))
    except ValueError as error:
        return str(error)
    finally:
        await engine.close()
    return ""


def crashing() -> bytes:
    """A shipped model with one word changed: its structure is sound, and LiteRT 2.3.0 dies of SIGSEGV running it."""
    catalog = load_catalog(catalog_path(None))
    data = bytearray(catalog.path(catalog.family("motion").variants["mcu-int8"]).read_bytes())
    data[2060:2064] = b"\xff" * 4
    return bytes(data)


async def test_a_model_that_crashes_the_library(tmp_path: Path) -> None:
    why = await tried(tmp_path / "crash.tflite", crashing())
    if "takes the runtime down" not in why:
        pytest.skip(f"this version of the library does not crash of it: {why or 'it runs'}")
    assert why.endswith("died")


async def test_a_model_that_asks_for_memory_while_it_runs(tmp_path: Path) -> None:
    """192 MB, of a file of 300 bytes: with enough allowed it runs, so that it is the limit that ends it."""
    pytest.importorskip("onnxruntime")
    glutton = protobuf.glutton(192, *IMAGE)
    assert "alloc" in await tried(tmp_path / "glutton.onnx", glutton, 128)
    assert await tried(tmp_path / "glutton.onnx", glutton, 2048) == ""


async def test_a_model_that_never_ends(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    why = await tried(tmp_path / "endless.onnx", protobuf.endless(*IMAGE), seconds=5.0)
    assert "takes the runtime down" in why


@pytest.mark.parametrize("location", ["../../../../etc/passwd", "/etc/passwd", "weights.bin"])
async def test_weights_in_another_file(tmp_path: Path, location: str) -> None:
    graph = protobuf.graph([], [protobuf.external("w", location)], [], [])
    assert "a tensor is kept in another file" in await tried(tmp_path / "external.onnx", protobuf.model(graph))


def test_who_opens_such_a_file_has_no_sockets_programs_or_files() -> None:
    attempts = """
import ctypes, errno, socket, subprocess, sys, tempfile, threading
from agent.runtimes.confine import confine, confined
other = threading.Event()
threading.Thread(target=lambda: (other.wait(), attempt(socket.socket))).start()  # one that is there already
def attempt(act):
    try:
        act()
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print("allowed")
def fill():
    with open(sys.argv[1], "wb", buffering=0) as file:
        file.write(b"x")
confine(256, 60)
if not confined():
    print("no seccomp")
attempt(lambda: subprocess.run(["true"]))
attempt(socket.socket)
attempt(fill)
other.set()
"""
    with Stage() as stage:
        done = subprocess.run(
            [sys.executable, "-c", attempts, str(stage.folder / "filled")],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
    if "no seccomp" in done.stdout:
        pytest.skip("this kernel or processor has no filter of system calls here")
    assert done.stdout.split() == ["EPERM", "EPERM", "EFBIG", "EPERM"], done.stderr


async def test_each_file_has_a_process_of_its_own_and_what_passed_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = load_catalog(catalog_path(None))
    files = [
        ModelFile(catalog.path(variant), variant.format, variant.sha256, variant.bytes)
        for variant in (catalog.family(name).variants["gateway-fp16"] for name in ("digits", "motion"))
    ]
    trials: list[str] = []
    load = ProcessEngine.load

    async def counted(engine: ProcessEngine, file: ModelFile) -> Any:
        if engine._confinement is not None and engine._confinement.memory_mb:
            trials.append(f"{id(engine)} {file.sha256}")
        return await load(engine, file)

    monkeypatch.setattr(ProcessEngine, "load", counted)
    kept = tmp_path / "state" / "passed.json"
    confinement = Confinement(1024, TRIAL_S, check_structure, kept)
    for expected in (2, 2):
        pool = RuntimePool(GpuSection(), SystemClock(), confinement=confinement)
        await pool.load_all(files)
        await pool.close()
        assert len(trials) == expected
    assert len({trial.split()[0] for trial in trials}) == 2
    stricter = Confinement(512, TRIAL_S, check_structure, kept)
    pool = RuntimePool(GpuSection(), SystemClock(), confinement=stricter)
    await pool.load_all(files)
    await pool.close()
    assert len(trials) == 4, "within other limits it has not passed"
    kept.write_text("[1, 2")
    pool = RuntimePool(GpuSection(), SystemClock(), confinement=confinement)
    await pool.load_all(files[:1])
    await pool.close()
    assert len(trials) == 5, "a file of passes that is damaged passes nothing"


def test_nobody_signs_them_by_mistake(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    KEY.save(site.folder / "key")
    site.put("digits/cloud-fp32", protobuf.glutton(512, *IMAGE), "onnx")
    sign = ["models", "sign-catalog", "--catalog", str(site.path), "--key", str(site.folder / "key")]
    assert main([*sign, "--memory-mb", "256"]) == 2
    said = capsys.readouterr().err
    assert "digits/cloud-fp32" in said and "it is not signed" in said
    assert not signature_path(site.path).exists()


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_the_daemon_refuses_what_harms_and_answers_with_the_rest(site: Site) -> None:
    """Nobody vouches for the catalogue, and that is allowed. One model never ends, one crashes the library, one file is
    damaged, one has not the outputs of its entry, one leads elsewhere; one is left."""
    pytest.importorskip("onnxruntime")
    site.put("digits/mcu-int8", crashing(), "tflite")
    site.put("motion/gateway-fp16", protobuf.endless("window", 1, 100, 6), "onnx")
    damaged = site.variant("motion/cloud-fp32")
    wrong = site.variant("digits/cloud-fp32")
    away = site.variant("motion/mcu-int8")
    for entry in (damaged, wrong, away, site.variant("digits/mcu-int8")):
        entry["targets"] = ["edge_gpu"]
    (site.root / damaged["path"]).write_bytes(b"damaged")
    wrong["outputs"][0]["name"] = "nothing"
    (site.folder / "outside.tflite").write_bytes((site.root / away["path"]).read_bytes())
    (site.root / away["path"]).unlink()
    (site.root / away["path"]).symlink_to(site.folder / "outside.tflite")
    site.write()
    port = free_port()
    digit = json.loads((Path(__file__).parents[2] / "examples/digit.json").read_text())
    url = f"http://127.0.0.1:{port}"
    with Stage(site.folder / "stage") as stage:
        config = site.config(require_signed=False, trial_s=5) | {"http": {"port": port}, "mqtt": {"enabled": False}}
        daemon = stage.daemon(config)

        def loaded() -> Any:
            with urllib.request.urlopen(f"{url}/status", timeout=20) as reply:
                status = json.load(reply)
            (target,) = (found for found in status["targets"] if found["name"] == "edge_gpu")
            return target["detail"] if target["detail"]["models_loaded"] else None

        detail = wait_until(loaded, "the models are loaded", 60)
        assert detail["models_loaded"] == ["digits/gateway-fp16"]
        refused = detail["models_refused"]
        assert "did not answer for 5.0 s and was killed" in refused["motion/gateway-fp16"]
        assert "is not the recorded file" in refused["motion/cloud-fp32"]
        assert "digits/mcu-int8" in refused
        assert "no output 'nothing'" in refused["digits/cloud-fp32"]
        assert "leads out of the catalogue's folder" in refused["motion/mcu-int8"]
        assert detail["pool"]["isolation"] == "process"
        body = json.dumps({"model": "digits", "inputs": digit, "latency_class": "batch"}).encode()
        asked = urllib.request.Request(f"{url}/infer", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=20) as reply:
            assert json.load(reply)["label"] == "3"
        assert daemon.alive()
