"""Configuration: every default by name, and the environment over the file."""

from pathlib import Path
from typing import Any

import pytest

from agent import cli
from agent.config import AmountsSection, Config, Section
from agent.config_load import load_config
from agent.core.errors import ConfigError
from agent.routing.meter import UNITS, WINDOWS_MS


def load(tmp_path: Path, text: str | bytes, **environ: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, environ)


def refusal(tmp_path: Path, text: str | bytes, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return str(caught.value)


# --- defaults --------------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, dict[str, Any]] = {
    "gateway": {"state_dir": Path("/var/lib/edge-agent"), "drain_timeout_s": 5},
    "models": {
        "catalog": None,
        "trusted_keys": (),
        "require_signed": True,
        "trial_memory_mb": 1024,
        "trial_s": 60,
    },
    "routing": {
        "policy": "utility",
        "hysteresis": 0.01,
        "high_tolerance": 0.005,
        "probe_after_s": 60,
        "probe_share": 0.02,
        "probe_metered": False,
        "hedge_classes": ("realtime", "near"),
        "hedge_metered": False,
        "max_cloud_cost": 0.01,
        "edge_preference": 0.7,
        "max_in_flight": 256,
        "explain_last": 256,
    },
    "accuracy": {"mode": "adaptive", "floor": 0.9},
    "shadow": {"rate": 0, "per_hour": 60, "usd_per_day": 0.1, "timeout_ms": 5000, "max_queued": 16},
    "drift": {"window": 500, "min_samples": 50, "margin": 0.02},
    "routing.weights.realtime": {"accuracy": 1, "lateness": 2, "cost": 0.5, "bytes": 0.01, "load": 0.05},
    "routing.weights.near": {"accuracy": 1, "lateness": 1.5, "cost": 0.5, "bytes": 0.01, "load": 0.02},
    "routing.weights.interactive": {"accuracy": 1, "lateness": 1, "cost": 0.5, "bytes": 0.01, "load": 0.02},
    "routing.weights.batch": {"accuracy": 1, "lateness": 0.5, "cost": 0.05, "bytes": 0.01, "load": 0.02},
    "routing.latency_thresholds": {"realtime": 10, "near_realtime": 100, "interactive": 500, "batch": 1000},
    "routing.model_size_thresholds": {"edge_mcu": 1, "edge_gpu": 10, "cloud": 1000},
    "routing.parameter_thresholds": {"simple": 10_000, "medium": 1_000_000},
    "routing.breaker": {
        "failures": 5,
        "error_rate": 0.5,
        "window": 20,
        "backoff_initial_s": 0.5,
        "backoff_max_s": 120,
    },
    "edge_mcu": {
        "enabled": True,
        "ports": (),
        "baud": 921_600,
        "timeout_ms": 50,
        "max_concurrent": 4,
        "health_check_interval": 5,
        "require_signed_updates": False,
        "streams": (),
    },
    "edge_gpu": {
        "enabled": True,
        "providers": ("tensorrt", "cuda", "cpu"),
        "accelerator": "auto",
        "strict_provider": False,
        "timeout_ms": 200,
        "max_concurrent": 5,
        "threads": 1,
        "workers": 2,
        "inline_below_ms": 0.5,
        "isolation": "thread",
    },
    "cloud": {"lanes": ()},
    "budgets": {
        **dict.fromkeys(f"{unit}_per_{window}" for unit in UNITS for window in WINDOWS_MS),
        "burst": 0.25,
        "borrow": 0.25,
        "borrow_priority": 8,
        "overhead_bytes": 700,
        "count_time_off": False,
    },
    "fallback": {
        "cache_ttl": 3600,
        "max_cache_size": 10_000,
        "enable_stale_results": True,
        "stale_ttl": 86_400,
        "write_bytes_per_day": 1 << 30,
    },
    "outbox": {
        "enabled": False,
        "max_rows": 100_000,
        "max_bytes": 256 << 20,
        "max_age_s": 604_800,
        "full": "reject",
        "commit_wait_ms": 50,
        "commit_rows": 64,
        "max_waiting": 4096,
        "max_in_flight": 64,
        "max_asked": 8,
        "drain_per_s": 1000,
        "retry_max_s": 30,
        "session_expiry_s": 86_400,
    },
    "uplink": {"lane": None, "topic": "edge-agent/results", "message_expiry_s": None},
    "mqtt": {
        "enabled": True,
        "broker": "mqtt://127.0.0.1:1883",
        "username": None,
        "password": None,
        "ca_file": None,
        "cert_file": None,
        "key_file": None,
        "keepalive_s": 15,
        "max_payload_bytes": 1 << 20,
        "max_in_flight": 128,
        "shared_requests": True,
    },
    "http": {
        "enabled": True,
        "host": "127.0.0.1",
        "port": 8080,
        "max_body_bytes": 1 << 20,
        "max_connections_per_address": 64,
        "tls": None,
        "allow_plaintext": False,
    },
    "security": {"tokens": (), "jwt": None, "open_on_loopback": None, "certificate_warn_days": 30},
    "security.limits": {"tracked": 4096},
    "security.limits.identity": {"per_s": 2000, "burst": 4000},
    "security.limits.producer": {"per_s": 1000, "burst": 2000},
    "security.limits.failures": {"per_s": 0.5, "burst": 20},
    "security.audit": {
        "enabled": False,
        "dir": None,
        "max_file_bytes": 16 << 20,
        "keep_files": 16,
        "queue": 4096,
        "on_full": "drop",
        "fsync_s": 5,
        "rules": {},
        "key_file": None,
    },
    "monitoring": {
        "log_level": "info",
        "log_format": "json",
        "status_interval_s": 10,
        "sample_interval_s": 2,
        "record": None,
        "record_payload": False,
        "record_max_bytes": 64 << 20,
        "record_files": 4,
    },
}
LANE_DEFAULTS = {
    "kind": "gpu",
    "topic": "edge-agent/lanes/default",
    "cost_per_request": 0.001,
    "timeout_ms": 5000,
    "max_concurrent": 100,
    "username": None,
    "password": None,
    "ca_file": None,
    "cert_file": None,
    "key_file": None,
    "region": None,
    "backup": False,
    "metered": None,
}
SENSOR_DEFAULTS = {
    "name": None,
    "latency_class": "near",
    "deadline_ms": None,
    "priority": 5,
    "format": "json",
    "field": None,
    "dtype": None,
    "scale": 1,
    "qos": 1,
    "use_cache": True,
    "accuracy": None,
    "shadow": True,
    "durable": False,
    "uplink": False,
    "allowed_regions": (),
}
FULL = """
gateway: {id: press-7, state_dir: /srv/agent, drain_timeout_s: 2}
models: {catalog: /srv/models/catalog.yaml}
routing:
  max_cloud_cost: 0.02
  edge_preference: 0.8
  latency_thresholds: {realtime: 5, near_realtime: 50, interactive: 250, batch: 2000}
  model_size_thresholds: {edge_mcu: 0.5, edge_gpu: 20, cloud: 500}
  parameter_thresholds: {simple: 20000, medium: 2000000}
edge_mcu: {port: /dev/ttyACM0, baud: 115200, timeout_ms: 40, max_concurrent: 2, health_check_interval: 1}
edge_gpu: {providers: [cuda, cpu], timeout_ms: 150, max_concurrent: 3}
cloud:
  lanes:
    - {name: frankfurt, kind: gpu, broker: 'mqtts://a.example:8883', topic: lanes/f, cost_per_request: 0.002,
       timeout_ms: 900, max_concurrent: 10, username: gw, password: '${credential:lane}', region: eu-central,
       ca_file: '${PEM}', cert_file: '${PEM}', key_file: '${PEM}'}
    - {name: spare, kind: serverless, broker: 'mqtt://b.example', backup: true}
fallback: {cache_ttl: 60, max_cache_size: 10, enable_stale_results: false, stale_ttl: 60}
mqtt: {broker: 'mqtt://[::1]:1884', username: u, password: '${BROKER_PASSWORD}'}
http: {port: 0}
monitoring: {log_level: debug, log_format: text}
sensors:
  press/+/vibration: {model: motion, latency_class: realtime, deadline_ms: 8, format: raw, dtype: int16, scale: 0.001}
"""


@pytest.mark.parametrize("section", DEFAULTS)
def test_defaults_by_name(section: str) -> None:
    part: Any = load_config(None, {})
    for name in section.split("."):
        part = getattr(part, name)
    found = {name: value for name, value in part if not isinstance(value, Section) and name != "id"}
    assert found == DEFAULTS[section]


def test_every_section_is_in_the_table_of_defaults() -> None:
    assert {name.split(".")[0] for name in DEFAULTS} | {"producers", "sensors"} == set(Config.model_fields)
    assert load_config(None, {}).sensors == load_config(None, {}).producers == {}
    assert load_config(None, {}).gateway.id


def test_defaults_of_lanes_and_sensors(tmp_path: Path) -> None:
    config = load(tmp_path, "cloud: {lanes: [{name: a, broker: 'mqtt://h'}]}\nsensors: {t: {model: m}}")
    lane = dict(config.cloud.lanes[0])
    assert (lane.pop("name"), lane.pop("broker")) == ("a", "mqtt://h")
    assert lane.pop("budget") == AmountsSection()
    assert lane == LANE_DEFAULTS
    sensor = dict(config.sensors["t"])
    assert sensor.pop("model") == "m"
    assert sensor == SENSOR_DEFAULTS


def test_a_full_file_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "lane").write_text("s3cret\n")
    (tmp_path / "tls.pem").write_text("-----BEGIN\n")
    pem = str(tmp_path / "tls.pem")
    config = load(tmp_path, FULL, CREDENTIALS_DIRECTORY=str(tmp_path), BROKER_PASSWORD="12345", PEM=pem)
    assert config.gateway.id == "press-7"
    assert config.edge_mcu.ports == ("/dev/ttyACM0",)
    assert config.edge_gpu.providers == ("cuda", "cpu")
    first, spare = config.cloud.lanes
    assert (first.name, first.kind, first.region, first.cost_per_request) == ("frankfurt", "gpu", "eu-central", 0.002)
    assert first.password is not None
    assert first.password.get_secret_value() == "s3cret"
    assert (spare.kind, spare.backup, spare.timeout_ms) == ("serverless", True, 5000)
    assert config.mqtt.password is not None
    assert config.mqtt.password.get_secret_value() == "12345"
    assert config.sensors["press/+/vibration"].dtype == "int16"


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing\n").model_dump(exclude={"gateway"}) == Config().model_dump(exclude={"gateway"})


# --- environment -----------------------------------------------------------------------------------------------------


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    text = "edge_mcu: {timeout_ms: 40}\ncloud: {lanes: [{name: a, broker: 'mqtt://a'}, {name: b, broker: 'mqtt://b'}]}"
    config = load(
        tmp_path,
        text,
        EDGE_AGENT__EDGE_MCU__TIMEOUT_MS="30.5",
        EDGE_AGENT__EDGE_MCU__PORTS="[/dev/ttyACM0, /dev/ttyACM1]",
        EDGE_AGENT__EDGE_GPU__ENABLED="no",
        EDGE_AGENT__CLOUD__LANES__1__BROKER="mqtt://c:1883",
        EDGE_AGENT__ROUTING__BREAKER__FAILURES="7",
        EDGE_AGENT__HTTP__HOST="::1",
        OTHER__HTTP__PORT="1",
    )
    assert config.edge_mcu.timeout_ms == 30.5
    assert config.edge_mcu.ports == ("/dev/ttyACM0", "/dev/ttyACM1")
    assert config.edge_gpu.enabled is False
    assert [lane.broker for lane in config.cloud.lanes] == ["mqtt://a", "mqtt://c:1883"]
    assert config.routing.breaker.failures == 7
    assert config.http.host == "::1"
    assert config.http.port == 8080


def test_a_whole_list_comes_from_one_variable() -> None:
    config = load_config(None, {"EDGE_AGENT__CLOUD__LANES": "[{name: a, broker: 'mqtt://h'}]"})
    assert config.cloud.lanes[0].broker == "mqtt://h"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("EDGE_AGENT__EDGE_MCU__TIMEOUT_MS", "50ms", "edge_mcu.timeout_ms: must be a number without a unit"),
        ("EDGE_AGENT__EDGE_MCU__TIMEOUT", "50", "edge_mcu.timeout: unknown key; did you mean timeout_ms?"),
        ("EDGE_AGENT__CLOUD__LANES__0__BROKER", "mqtt://h", "cloud.lanes: "),
        ("EDGE_AGENT__HTTP__PORT__X", "1", "http.port: "),
        ("EDGE_AGENT__HTTP", "{host: 0.0.0.0}", "http: host '0.0.0.0' is not loopback"),
        ("EDGE_AGENT__HTTP__HOST", "0.0.0.0", "http: host '0.0.0.0' is not loopback"),
        ("EDGE_AGENT__", "1", ": unknown key"),
        ("EDGE_AGENT__" + "A__" * 5000 + "B", "1", "nested too deeply"),
    ],
)
def test_a_fault_from_the_environment_names_the_variable(variable: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {variable: value})
    assert expected in str(caught.value)
    assert variable in str(caught.value) or "nested" in expected


@pytest.mark.parametrize("index", ["1", "-1", "x", "²", ""])
def test_a_list_index_that_is_not_there(tmp_path: Path, index: str) -> None:
    variable = f"EDGE_AGENT__CLOUD__LANES__{index}__NAME"
    text = "cloud: {lanes: [{name: a, broker: 'mqtt://a'}]}"
    assert f"{variable}: cloud.lanes has no item" in refusal(tmp_path, text, **{variable: "b"})


def test_references_are_read_as_what_the_key_takes(tmp_path: Path) -> None:
    text = "http: {port: '${P}', enabled: '${E}'}\nedge_mcu: {port: '/dev/${TTY}', timeout_ms: '${T}'}"
    config = load(tmp_path, text, P="8081", E="true", TTY="ttyS1", T="2.5")
    assert (config.http.port, config.http.enabled, config.edge_mcu.timeout_ms) == (8081, True, 2.5)
    assert config.edge_mcu.ports == ("/dev/ttyS1",)


@pytest.mark.parametrize("name", ["..", ".", "missing", "sub"])
def test_a_credential_is_a_file_in_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="is not set"):
        load(tmp_path, f"mqtt: {{password: '${{credential:{name}}}'}}", CREDENTIALS_DIRECTORY=str(tmp_path))


def test_a_path_is_no_credential_name(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    config = load(tmp_path, "mqtt: {password: '${credential:../outside}'}", CREDENTIALS_DIRECTORY=str(folder))
    assert config.mqtt.password is not None
    assert config.mqtt.password.get_secret_value() == "${credential:../outside}"


def test_the_path_of_a_credential(tmp_path: Path) -> None:
    """As security.md has it: systemd puts them into a folder, and keys that end in _file name files in it."""
    for name in ("gateway.key", "gateway.crt", "audit.key"):
        (tmp_path / name).write_text("x")
    folder = "${CREDENTIALS_DIRECTORY}"
    tls = f"{{cert_file: '{folder}/gateway.crt', key_file: '{folder}/gateway.key'}}"
    text = f"http: {{tls: {tls}}}\nsecurity: {{audit: {{key_file: '{folder}/audit.key'}}}}"
    config = load(tmp_path, text, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert config.http.tls is not None
    assert config.http.tls.key_file == tmp_path / "gateway.key"
    assert config.security.audit.rule("producer") == "pseudonym"


def test_whoever_is_not_the_service_is_told_of_credentials_and_stopped_by_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    (tmp_path / "gateway.crt").write_text("x")
    lane = "{name: a, broker: 'mqtts://h', username: u, password: '${credential:lane}'}"
    tls = f"{{cert_file: {tmp_path}/gateway.crt, key_file: '${{CREDENTIALS_DIRECTORY}}/gateway.key'}}"
    path.write_text(f"gateway: {{state_dir: {tmp_path}}}\nhttp: {{tls: {tls}}}\ncloud: {{lanes: [{lane}]}}\n")
    assert cli.main(["check", str(path)]) == 0
    told = capsys.readouterr().err
    assert "note: cloud.lanes.0.password: ${credential:lane} is known to the service only" in told
    assert "note: http.tls.key_file: ${CREDENTIALS_DIRECTORY} is known to the service only" in told
    with pytest.raises(ConfigError, match="is not set"):
        load_config(path, {})
    with pytest.raises(ConfigError, match="is not set"):  # the service itself, or who stands in for it
        load_config(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)}, unseen=[])
    path.write_text("mqtt: {username: '${NOBODY}', password: '${credential:p}'}")
    with pytest.raises(ConfigError, match=r"^[^\n]*username: \$\{NOBODY\} is not set$"):
        load_config(path, {}, unseen=[])


@pytest.mark.parametrize(
    "text",
    [
        "cloud: {lanes: [{name: a, broker: '${credential:broker}'}]}",
        "cloud: {lanes: [{name: a, broker: 'mqtts://h', username: '${credential:a}-${credential:b}', password: p}]}",
        "security: {tokens: [{name: a, roles: [read], sha256: '${credential:hash}'}]}",
        "http: {port: '${credential:port}'}",
    ],
)
def test_a_credential_that_must_be_of_some_form_stops_nobody_either(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    unseen: list[str] = []
    load_config(path, {}, unseen=unseen)
    assert len(unseen) == 1
    path.write_text(f"{text}\ncache: {{}}")
    with pytest.raises(ConfigError, match=r"^[^\n]*cache[^\n]*$"):
        load_config(path, {}, unseen=[])


def test_tokens_can_come_from_the_environment() -> None:
    tokens = f"[{{name: a, roles: [read], sha256: '{'0' * 64}'}}]"
    assert load_config(None, {"EDGE_AGENT__SECURITY__TOKENS": tokens}).security.tokens[0].name == "a"
