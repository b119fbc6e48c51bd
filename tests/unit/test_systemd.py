"""What is installed: units that systemd accepts, and that may do little; a configuration that loads; the installer."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from starlette.requests import Request

from agent.config import Config
from agent.config_load import load_config
from agent.ingress.http_models import infer_operation, with_components
from agent.ingress.http_pages import docs_page
from agent.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "systemd"
MAX_EXPOSURE = 2.0
UNITS = ["edge-agent", "edge-agent-worker"]
COMMAND_S = 60


def needs(command: str) -> str:
    """Path of a command. Where there is none: a failure in continuous integration, a skip elsewhere."""
    path = shutil.which(command)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{command} is missing: these tests must run in continuous integration")
        pytest.skip(f"{command} is not installed")
    return path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=COMMAND_S, check=False)


@pytest.fixture(params=[*UNITS, "edge-agent with jetson.conf"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy whose command exists, as `systemd-analyze verify` wants it."""
    name, _, drop_in = request.param.partition(" with ")
    text = (SYSTEMD / f"{name}.service").read_text()
    assert "ExecStart=/opt/edge-agent/bin/edge-agent " in text
    path = tmp_path / f"{name}.service"
    path.write_text(text.replace("/opt/edge-agent/bin/edge-agent", "/bin/true"))
    if drop_in:
        folder = tmp_path / f"{name}.service.d"
        folder.mkdir()
        shutil.copy(SYSTEMD / f"{name}.service.d" / drop_in, folder)
    return path


def test_systemd_accepts_the_units(unit: Path) -> None:
    done = run(needs("systemd-analyze"), "verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_exposure(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.service"
    shutil.copy(SYSTEMD / f"{name}.service", path)
    done = run(needs("systemd-analyze"), "security", "--offline=true", "--no-pager", path)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found.group(1)) <= MAX_EXPOSURE, done.stdout


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / f"{name}.service").read_text().splitlines():
        if not line.startswith("#") and "=" in line:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_daemon_is_watched_and_restarted_for_ever() -> None:
    unit = settings("edge-agent")
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"] == ["30s"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["RestartPreventExitStatus"] == ["2"], "the exit code of a configuration that cannot be used"
    assert unit["OOMPolicy"] == ["continue"], "a child that the kernel ends is started again, and the daemon goes on"
    stop_s = float(unit["TimeoutStopSec"][0].removesuffix("s"))
    assert stop_s > Config().gateway.drain_timeout_s + 5


@pytest.mark.parametrize("name", UNITS)
def test_models_that_nobody_vouches_for_can_be_held_back(name: str) -> None:
    """systemd 252 has seccomp(2) in no group: `confine` would be refused, and nothing would say so."""
    assert settings(name)["SystemCallFilter"][-1] == "seccomp"


def test_only_serial_ports() -> None:
    unit = settings("edge-agent")
    assert unit["DevicePolicy"] == ["closed"]
    assert all(re.fullmatch(r"char-tty[A-Z]+ rw", device) for device in unit["DeviceAllow"])
    assert "dialout" in unit["SupplementaryGroups"]
    assert "PrivateDevices" not in unit, "it would hide the ports"


def plain(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json")
    return dumped


def test_the_installed_configuration_shows_every_default() -> None:
    path = SYSTEMD / "edge-agent.yaml"
    config = load_config(path, {})
    assert plain(config) == plain(Config())
    shown = yaml.safe_load(path.read_text())
    assert set(shown) == set(Config.model_fields)
    text = path.read_text()
    for section in Config.model_fields:
        model = Config.model_fields[section].annotation
        for key in getattr(model, "model_fields", {}):
            optional = ("ca_file", "cert_file", "key_file")
            assert key in optional or re.search(rf"^ +(# )?{key}:", text, re.MULTILINE), f"{section}.{key} is not shown"


def test_the_examples_in_the_configuration_are_right() -> None:
    """What a user gets who takes the comment signs away."""
    lines = []
    for line in (SYSTEMD / "edge-agent.yaml").read_text().splitlines():
        if re.match(r"^ *(lanes|sensors|ports|tokens|jwt|tls|producers): (\[\]|\{\}|null)", line):
            continue
        lines.append(re.sub(r"^( *)# ( *(?:- \{.*|(?:- )?[a-z0-9_/+\"-]+:.*))$", r"\1\2", line))
    tree = yaml.safe_load("\n".join(lines))
    config = Config.model_validate(_without_references(tree))
    assert [lane.name for lane in config.cloud.lanes] == ["eu-west"]
    assert config.edge_mcu.ports == ("/dev/edge-mcu0", "/dev/edge-mcu1")
    assert config.gateway.id == "press-line-07"
    assert [sensor.model for sensor in config.sensors.values()] == ["motion"]
    assert config.security.jwt is not None
    assert config.http.tls is not None
    assert config.producers["ward-3"].allowed_regions == ("eu-west-1",)


def _without_references(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_references(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_references(value) for value in node]
    return (
        node.replace("${credential:", "").replace("${CREDENTIALS_DIRECTORY", "").replace("}", "")
        if isinstance(node, str)
        else node
    )


@pytest.mark.parametrize("name", ["edge-agent.env", "worker.env"])
def test_environment_files_hold_no_secret(name: str) -> None:
    for line in (SYSTEMD / name).read_text().splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Z_]+=[^ ].*", line), line
        assert not re.search(r"PASSWORD=.+", line)


def test_udev_rules() -> None:
    rules = (SYSTEMD / "99-edge-agent.rules").read_text()
    labels = set(re.findall(r'LABEL="(\w+)"', rules))
    assert set(re.findall(r'GOTO="(\w+)"', rules)) == labels, "each jump has its target"
    for line in rules.splitlines():
        for part in re.split(r",\s*", line) if line and not line.startswith("#") else []:
            assert re.fullmatch(r'[A-Z]+(\{\w+\})?(==|!=|\+=|=)"[^"]*"', part), part


# --- the installer ---


def install(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run("sh", SYSTEMD / "install.sh", *arguments)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_text())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_install_twice_and_remove(tmp_path: Path) -> None:
    options = ("--files-only", "--worker", "--destdir", tmp_path)
    done = install("install", *options)
    assert done.returncode == 0, done.stderr
    first = tree(tmp_path)
    assert set(first) == {
        "etc/systemd/system/edge-agent.service",
        "etc/systemd/system/edge-agent-worker.service",
        "etc/udev/rules.d/99-edge-agent.rules",
        "etc/edge-agent/edge-agent.yaml",
        "etc/edge-agent/edge-agent.env",
        "etc/edge-agent/worker.env",
    }
    assert first["etc/edge-agent/edge-agent.env"][0] == 0o600
    assert (tmp_path / "etc/edge-agent/credentials").stat().st_mode & 0o777 == 0o700
    assert install("install", *options).returncode == 0
    assert tree(tmp_path) == first

    config = tmp_path / "etc/edge-agent/edge-agent.yaml"
    config.write_text("http: {port: 8081}\n")
    done = install("install", *options)
    assert config.read_text() == "http: {port: 8081}\n", "what an operator changed is kept"
    assert "edge-agent.yaml.new" in done.stdout

    assert install("uninstall", "--destdir", tmp_path).returncode == 0
    assert set(tree(tmp_path)) == {name for name in first if name.startswith("etc/edge-agent")} | {
        "etc/edge-agent/edge-agent.yaml.new"
    }
    assert install("uninstall", "--purge", "--destdir", tmp_path).returncode == 0
    assert tree(tmp_path) == {}


def test_what_an_operator_wrote_outlives_an_uninstall_and_no_purge(tmp_path: Path) -> None:
    where = ("--destdir", tmp_path)
    assert install("install", "--files-only", "--worker", *where).returncode == 0
    rules = tmp_path / "etc/udev/rules.d/99-edge-agent.rules"
    rules.write_text("# my board\n")
    units = tmp_path / "etc/systemd/system"
    (units / "edge-agent-worker.service").write_text("# of a former version\n")
    assert install("install", "--files-only", *where).returncode == 0
    assert "ExecStart=" in (units / "edge-agent-worker.service").read_text()
    drop_in, state = (
        units / "edge-agent.service.d/override.conf",
        tmp_path / "var/lib/private/edge-agent-worker/counter",
    )
    for path in (drop_in, state):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    done = install("uninstall", *where)
    assert f"kept {rules}" in done.stdout
    assert rules.exists() and drop_in.exists() and state.exists()
    assert install("uninstall", "--purge", *where).returncode == 0
    assert tree(tmp_path) == {}


def wheel(folder: Path) -> Path:
    """A package that needs nothing, with a command and with models, as edge-agent's wheel has them."""
    info, data = "toy-1.dist-info", "toy-1.data/data/share/edge-agent/models"
    files = {
        "toy.py": "def main():\n    print(__file__, main.__code__.co_filename)\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nedge-agent = toy:main\n",
        f"{data}/catalog.yaml": "{}\n",
        f"{data}/training/__pycache__/x.cpython-311.pyc": "",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    path = folder / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_an_image_works_where_it_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual environment below --destdir names /opt/edge-agent, and one without pip is made again. The service's
    user can read it, whatever umask root has."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    image = tmp_path / "an image"
    home = image / "opt/edge-agent"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python").symlink_to(sys.executable)
    options = ("install", "--destdir", image, "--source", wheel(tmp_path), "--python", sys.executable)
    for _ in ("to make", "to repair"):
        done = run("sh", "-c", 'umask 077; exec sh "$@"', "sh", SYSTEMD / "install.sh", *options)
        assert done.returncode == 0, done.stderr
        scripts = [path for path in (home / "bin").iterdir() if not path.is_symlink()]
        assert {"activate", "edge-agent", "pip"} <= {path.name for path in scripts}
        compiled = list(home.rglob("toy.*.pyc"))
        assert compiled
        for path in [*scripts, *compiled, home / "pyvenv.cfg"]:
            assert str(image).encode() not in path.read_bytes(), path
        assert "/opt/edge-agent/bin/python" in (home / "bin/edge-agent").read_text()
        assert os.access(home / "bin/edge-agent", os.X_OK)
        assert (home / "share/edge-agent/models/catalog.yaml").is_file()
        assert all(path.stat().st_mode & 0o055 == 0o055 for path in (home, home / "bin", home / "bin/edge-agent"))
        assert not list((home / "share").rglob("__pycache__"))
        shutil.rmtree(next(home.glob("lib/python*/site-packages/pip")))


@pytest.mark.parametrize("arguments", [["--sudo"], ["--destdir"]])
def test_the_installer_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = install(*arguments)
    assert done.returncode == 2
    assert "install.sh: " in done.stderr


# --- what the pages say ---


@pytest.mark.parametrize("page", ["README.md", "docs/mqtt.md", "docs/operations.md"])
def test_files_that_commands_name_are_there(page: str) -> None:
    named = set(re.findall(r"(?<![\w/])examples/[\w.-]*\w", (ROOT / page).read_text()))
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_examples_are_what_the_models_take() -> None:
    pictures = [yaml.safe_load((ROOT / "examples/seven.json").read_text())["inputs"]]
    pictures.append(np.fromfile(ROOT / "examples/seven-int16.bin", "<i2").reshape(8, 8).tolist())
    held = np.load(ROOT / "models/digits/heldout.npz")
    assert all(picture == held["inputs"][0].reshape(8, 8).tolist() for picture in pictures)
    assert held["labels"][0] == 7
    window = np.fromfile(ROOT / "examples/window-float32.bin", "<f4").reshape(100, 6)
    assert any((window == one).all() for one in np.load(ROOT / "models/motion/heldout.npz")["inputs"])


def test_the_exposure_in_the_manual_is_the_measured_one() -> None:
    analyze = needs("systemd-analyze")
    version = re.search(r"systemd (\d+)", run(analyze, "--version").stdout)
    stated = re.search(r"with systemd (\d+): ([0-9.]+),", (ROOT / "docs/operations.md").read_text())
    assert stated is not None
    if version is None or version.group(1) != stated.group(1):
        pytest.skip("measured with another version of systemd")
    done = run(analyze, "security", "--offline=true", "--no-pager", SYSTEMD / "edge-agent.service")
    assert f"edge-agent.service: {stated.group(2)} " in done.stdout


async def test_the_page_of_operations_has_no_markup_left_and_says_what_each_key_means() -> None:
    operation = {"description": "See `docs`.", **infer_operation()}
    api = {"info": {"title": "t", "version": "1"}, "paths": {"/infer": {"post": operation}}}
    whole = with_components(lambda: dict(api))()
    response = await docs_page(lambda: whole)(
        Request({"type": "http", "method": "GET", "path": "/docs", "headers": []})
    )
    assert b"`" not in re.sub(rb"<pre>.*?</pre>|<style>.*?</style>", b"", bytes(response.body), flags=re.DOTALL)
    assert b"<code>docs</code>" in response.body
    for name, schema in whole["components"]["schemas"].items():
        for key, value in schema.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key}"


# --- Prometheus ---


def test_rules_name_metrics_that_exist() -> None:
    metrics = Metrics()
    metrics.watch(lambda: {"ready": True})
    exported = set(re.findall(r"^# TYPE (\w+)", metrics.render().decode(), re.MULTILINE))
    rules = yaml.safe_load((ROOT / "deploy/prometheus/edge-agent.rules.yml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    for group in rules["groups"]:
        for rule in group["rules"]:
            for name in re.findall(r"\bedge_agent[\w:]*", rule["expr"]):
                base = re.sub(r"_(bucket|sum|count)$", "", name)
                assert name in recorded or name in exported or base in exported, name
            assert "alert" not in rule or {"summary"} == set(rule["annotations"])
    assert yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["rule_files"] == [
        "edge-agent.rules.yml"
    ]
