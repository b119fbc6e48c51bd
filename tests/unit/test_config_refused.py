"""What the configuration refuses, in which words, and that no word of it is a secret."""

import os
import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from agent.config import Config, LaneSection, MqttSection
from agent.config_load import MAX_CONFIG_BYTES, cautions, load_config
from agent.core.errors import ConfigError

SECRET = "hunter2-swordfish"


def load(tmp_path: Path, text: str | bytes, **environ: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, environ)


def refusal(tmp_path: Path, text: str | bytes, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return str(caught.value)


# --- refusals --------------------------------------------------------------------------------------------------------

TOKEN = "security: {tokens: [{name: a, %s}]}"
JWT = "security: {jwt: {issuer: i, audience: a, keys: [{kid: k, key_file: /none, %s}]}}"
LANE = "cloud: {lanes: [{name: a, broker: 'mqtts://h', %s}]}"
REFUSED = [
    ("budgets: {usd_per_day: -1}", "budgets.usd_per_day: must be at least 0, found '-1'"),
    ("budgets: {usd_per_week: 5}", "budgets.usd_per_week: unknown key"),
    ("budgets: {usd_per_day: 5 USD}", "budgets.usd_per_day: must be a number without a unit"),
    ("budgets: {bytes_per_day: 1.5}", "budgets.bytes_per_day: must be a whole number"),
    ("budgets: {usd_per_day: true}", "budgets.usd_per_day: must be a number"),
    ("budgets: {burst: 0}", "budgets.burst: must be greater than 0"),
    (LANE % "budget: {burst: 1}", "cloud.lanes.0.budget.burst: unknown key"),
    ("monitoring: {record: traces.jsonl}", "monitoring.record: must be absolute"),
    ("edge_mcu: {timeout: 50}", "edge_mcu.timeout: unknown key; did you mean timeout_ms?"),
    ("edge_mcu: {timeout_ms: 50ms}", "edge_mcu.timeout_ms: must be a number without a unit; the unit is in the name"),
    ("edge_mcu: {timeout_ms: 50ms}", "found '50ms'"),
    ("edge_mcu: {timeout_ms: '50'}", "edge_mcu.timeout_ms: must be a number"),
    ("edge_mcu: {timeout_ms: true}", "edge_mcu.timeout_ms: must be a number"),
    ("edge_mcu: {timeout_ms: 0}", "edge_mcu.timeout_ms: must be greater than 0, found '0'"),
    ("edge_mcu: {timeout_ms: .nan}", "edge_mcu.timeout_ms: must be a finite number, found 'nan'"),
    ("edge_mcu: {timeout_ms: .inf}", "edge_mcu.timeout_ms: must be a finite number"),
    ("edge_mcu: {baud: 9600.5}", "edge_mcu.baud: must be a whole number"),
    ("edge_mcu: {baud: 0x" + "f" * 5000 + "}", "edge_mcu.baud: must be at most 20000000"),
    ("edge_mcu: {timeout_ms: 0x" + "f" * 5000 + "}", "edge_mcu.timeout_ms: "),
    ("edge_mcu: {enabled: 1}", "edge_mcu.enabled: must be true or false, found '1'"),
    ("edge_mcu: {enabled: 'yes'}", "edge_mcu.enabled: must be true or false, found 'yes'"),
    ("edge_mcu: {port: a, ports: [b]}", "edge_mcu: give either port or ports, not both"),
    ("edge_mcu: {ports: [a, a]}", "edge_mcu.ports: names the same port twice"),
    ("edge_mcu: {port: [a]}", "edge_mcu.port: must be text"),
    (
        "edge_mcu: {ports: /dev/ttyACM0}",
        "edge_mcu.ports: must be a list, such as [/dev/ttyACM0]; a single one may be given",
    ),
    ("edge_gpu: {providers: []}", "edge_gpu.providers: must have at least 1 item"),
    ("http: {port: eighty}", "http.port: must be a number, found 'eighty'"),
    ("http: {port: '80'}", "http.port: must be a number without quotes, found '80'"),
    ("edge_mcu: {health_check_interval: 5s}", "health_check_interval: must be a number without a unit, found '5s'"),
    ("gateway: {state_dir: state}", "gateway.state_dir: must be absolute, found 'state'"),
    ("gateway: {state_dir: /dev/null/x}", "must be a folder: it, or what is around it, is a file, found '/dev/null/x'"),
    (
        "mqtt: {broker: 'mqtts://h', ca_file: /none.pem}",
        "mqtt.ca_file: cannot be read: no such file, found '/none.pem'",
    ),
    (LANE % "ca_file: /dev", "cloud.lanes.0.ca_file: cannot be read: not a file, found '/dev'"),
    (
        "gateway: {id: g}\nsensors: {edge/g/x: {model: m}}",
        "sensors.edge/g/x: among the daemon's own topics, edge/{gateway.id}/…",
    ),
    ("sensors: {edge/+/infer/+: {model: m}}", "sensors.edge/+/infer/+: among the daemon's own topics"),
    (
        "edge_gpu: {providers: [rocm]}",
        "edge_gpu.providers.0: must be 'tensorrt', 'cuda' or 'cpu', found 'rocm'",
    ),
    ("nonsense: {}", "nonsense: unknown key; allowed: accuracy, budgets, cloud, drift, edge_gpu, edge_mcu, fallback"),
    ("edge_gpuu: {}", "edge_gpuu: unknown key; did you mean edge_gpu?"),
    ("routing: {breaker: {failure: 1}}", "routing.breaker.failure: unknown key; did you mean failures?"),
    (
        "routing: {edge_preference: 1.1}",
        "routing.edge_preference: must be at most 1, found '1.1'",
    ),
    ("routing: {latency_thresholds: {realtime: 100}}", "routing.latency_thresholds: must ascend: realtime < near_real"),
    ("routing: {model_size_thresholds: {edge_mcu: 11}}", "routing.model_size_thresholds: must ascend"),
    ("routing: {parameter_thresholds: {medium: 9}}", "routing.parameter_thresholds: must ascend: simple <= medium"),
    ("routing: {breaker: {backoff_max_s: 0.1}}", "routing.breaker: backoff_initial_s must not exceed backoff_max_s"),
    ("cloud: {lanes: [{broker: 'mqtt://h'}]}", "cloud.lanes.0.name: is required"),
    (
        "cloud: {lanes: [{name: a, broker: 'mqtt://h', cost: 1}]}",
        "cloud.lanes.0.cost: unknown key; did you mean cost_p",
    ),
    (
        "cloud: {lanes: [{name: a, broker: h}]}",
        "cloud.lanes.0.broker: must be mqtt://HOST[:PORT] or mqtts://HOST[:PORT]",
    ),
    ("cloud: {lanes: [{name: a, broker: 'mqtt://h:99999'}]}", "cloud.lanes.0.broker: must be mqtt://HOST[:PORT]"),
    (
        "cloud: {lanes: [{name: a, broker: 'mqtt://h'}, {name: a, broker: 'mqtt://g'}]}",
        "cloud: two lanes have the same",
    ),
    (LANE % "topic: 'a/#'", "cloud.lanes.0.topic: must be a topic of 1 to 200 characters, without + and #"),
    (LANE % "cost_per_request: -1", "cloud.lanes.0.cost_per_request: "),
    (LANE % "cert_file: c.pem", "cloud.lanes.0: cert_file and key_file go together"),
    ("mqtt: {key_file: k.pem}", "mqtt: cert_file and key_file go together"),
    ("mqtt: {ca_file: ca.pem}", "mqtt: ca_file, cert_file and key_file need an mqtts:// broker"),
    ("mqtt: {cert_file: c, key_file: k}", "mqtt: ca_file, cert_file and key_file need an mqtts:// broker"),
    ("fallback: {stale_ttl: 10}", "fallback: stale_ttl must be at least cache_ttl"),
    (
        "http: {host: 0.0.0.0}",
        "http: host '0.0.0.0' is not loopback: give tls, or allow_plaintext: true if that is meant",
    ),
    (
        "http: {host: 0.0.0.0, allow_plaintext: true}",
        "(whole file): http.host '0.0.0.0' is not loopback: give security.tokens or security.jwt",
    ),
    ("http: {tls: {cert_file: /none.crt, key_file: /none.key}}", "http.tls.cert_file: cannot be read: no such file"),
    (TOKEN % "sha256: abc, roles: [read]", "security.tokens.0.sha256: "),
    (TOKEN % f"sha256: {'a' * 64}, roles: []", "security.tokens.0.roles: must have at least 1 item"),
    (TOKEN % f"sha256: {'a' * 64}, roles: [root]", "security.tokens.0.roles.0: must be 'read', 'infer' or 'admin'"),
    (TOKEN % f"sha256: {'a' * 64}, expires: soon, roles: [read]", "security.tokens.0.expires: "),
    (TOKEN % f"sha256: {'a' * 64}, token: ea_x, roles: [read]", "security.tokens.0.token: unknown key"),
    ("security: {jwt: {issuer: i, audience: a, keys: []}}", "security.jwt.keys: must have at least 1 item"),
    (JWT % "algorithm: none", "security.jwt.keys.0.algorithm: must be 'EdDSA', 'ES256', 'RS256' or 'HS256'"),
    (JWT % "algorithm: HS256", "security.jwt.keys.0.key_file: cannot be read: no such file"),
    (
        "security: {jwt: {issuer: i, audience: a, max_lifetime_s: 3600, keys: []}}",
        "security.jwt.max_lifetime_s: must be at most 900",
    ),
    (
        "security: {audit: {rules: {producer: pseudonym}}}",
        "security.audit: a rule says pseudonym: key_file is required",
    ),
    ("security: {audit: {rules: {payload: keep}}}", "security.audit.rules.payload"),
    ("security: {audit: {dir: audit}}", "security.audit: dir must be absolute"),
    ("producers: {'a b': {}}", "producers.a b"),
    ("producers: {a: {allowed_regions: ['']}}", "producers.a.allowed_regions.0: must be 1 to 64 letters"),
    ("sensors: {'+/+/+/+/+': {model: m}}", "among the daemon's own topics"),
    ("http: {port: 65536}", "http.port: must be at most 65535, found '65536'"),
    ("http: {enabled: false}\nmqtt: {enabled: false}", "(whole file): no door is open: enable http or mqtt"),
    (
        "edge_gpu: {enabled: false}",
        "(whole file): no tier can answer: configure edge_mcu.ports, edge_gpu or cloud.lanes",
    ),
    ("mqtt: {enabled: false}\nsensors: {t: {model: m}}", "(whole file): sensors need mqtt.enabled: true"),
    ("sensors: {'a/#': {model: m}}", "sensors: 'a/#' is not a usable topic: 1 to 200 characters, + allowed, # not"),
    ("sensors: {'a/b+': {model: m}}", "sensors: 'a/b+': + must be a whole level"),
    ("sensors: {t: {model: m, qos: 2}}", "sensors.t.qos: must be 0 or 1, found '2'"),
    ("sensors: {t: {model: m, qos: true}}", "sensors.t.qos: "),
    (
        "sensors: {t: {model: m, priority: 11}}",
        "sensors.t.priority: must be at most 10, found '11'",
    ),
    ("sensors: {t: {model: m, deadline: 1}}", "sensors.t.deadline: unknown key; did you mean deadline_ms?"),
    ("gateway: {id: 'a b'}", "gateway.id: must be 1 to 64 letters, digits, _, . and -, and begin with"),
    ("http: 5", "http: must be a section with keys of its own, found '5'"),
    ("8080: {}", "8080"),
    (
        "edge_mcu: {a: {b: {c: {d: {e: {f: {g: {h: {i: {j: {k: {l: {m: {n: {o: {p: 1}}}}}}}}}}}}}}}}",
        "nested too deeply",
    ),
    ("- a", "must be a mapping of sections, found a list"),
    ("edge_mcu: {timeout_ms: 50", "cannot be read as YAML: line 1"),
    ("http: {port: 1}\nhttp: {port: 2}", "cannot be read as YAML: line 2, column 1: this key is given twice"),
    ("a: &x 1\nb: *x", "cannot be read as YAML: line 2, column 4: aliases are not supported"),
    ("a: !!python/name:os.system", "tags are not supported"),
    ("a: 2024-99-99", "a value cannot be read"),
    (b"\xff\xfe\xfa", "byte 0: not UTF-8"),
    (b"a: \x00", "special characters are not allowed"),
    ("[" * 50_000, "nested too deeply"),
    (b"#" * (MAX_CONFIG_BYTES + 1), "larger than 1000000 bytes"),
    ("edge_mcu: {port: '${PORT}'}", "edge_mcu.port: ${PORT} is not set"),
    ("mqtt: {password: '${credential:none}'}", "mqtt.password: ${credential:none} is not set"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED, ids=[f"{i}-{e[:40]}" for i, (_, e) in enumerate(REFUSED)])
def test_refused_with_file_place_and_remedy(tmp_path: Path, text: str | bytes, expected: str) -> None:
    message = refusal(tmp_path, text)
    assert expected in message
    assert all(line.startswith(f"{tmp_path / 'config.yaml'}: ") for line in message.splitlines())
    assert len(message) < 400


def test_every_fault_gets_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "edge_mcu: {timeout_ms: 50ms, bauds: 1}\nhttp: {port: -1}")
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "edge_mcu.timeout_ms",
        "edge_mcu.bauds",
        "http.port",
    ]


def test_a_misspelt_item_is_one_fault(tmp_path: Path) -> None:
    message = refusal(tmp_path, "edge_gpu: {providers: [tensort]}")
    assert message.endswith(": edge_gpu.providers.0: must be 'tensorrt', 'cuda' or 'cpu', found 'tensort'")


@pytest.mark.parametrize(
    ("variable", "right"),
    [
        ("EDGE_AGENT_HTTP_PORT", "EDGE_AGENT__HTTP__PORT"),
        ("EDGE_AGENT_HTTP__PORT", "EDGE_AGENT__HTTP__PORT"),
        ("EDGE_AGENT_ROUTING_BREAKER_ERROR_RATE", "EDGE_AGENT__ROUTING__BREAKER__ERROR_RATE"),
        ("EDGE_AGENT_NONSENSE", "EDGE_AGENT__SECTION__KEY"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_spelling(variable: str, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {variable: "1"})
    assert str(caught.value) == f"{variable}: not a setting: {right} is, with two underscores between its parts"


def test_variables_of_the_scripts_and_of_kubernetes_are_none_of_its_business() -> None:
    names = ("EXTRAS", "NO_APT", "FIRMWARE", "TEST_PORT", "TEST_BAUD", "SERVICE_HOST", "PORT", "PORT_8080_TCP_ADDR")
    load_config(None, {f"EDGE_AGENT_{name}": "1" for name in names})


def test_loading_creates_nothing(tmp_path: Path) -> None:
    load(tmp_path, f"gateway: {{state_dir: {tmp_path}/a/b}}")
    assert not (tmp_path / "a").exists()


def test_what_only_a_start_can_tell(tmp_path: Path) -> None:
    text = f"gateway: {{state_dir: {tmp_path}}}\n"
    assert cautions(load(tmp_path, text)) == []
    for gpu in ("{strict_provider: true}", "{strict_provider: true, accelerator: gpu, providers: [cpu]}"):
        assert "only a start can tell" in cautions(load(tmp_path, f"{text}edge_gpu: {gpu}"))[0]
    assert cautions(load(tmp_path, f"{text}edge_gpu: {{strict_provider: true, providers: [cpu]}}")) == []
    if Path("/sys/kernel").exists() and not os.access("/sys/kernel", os.W_OK):
        assert "cannot be written" in cautions(load(tmp_path, "gateway: {state_dir: /sys/kernel}"))[0]


def test_exactly_the_cap_is_accepted(tmp_path: Path) -> None:
    load(tmp_path, b"#" * MAX_CONFIG_BYTES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path, {})


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 100))
    assert "aliases are not supported" in refusal(tmp_path, bomb)
    merges = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 100))
    assert "aliases are not supported" in refusal(tmp_path, merges)
    assert "merge keys are not supported" in refusal(tmp_path, "a: {<<: {b: c}}")


@pytest.mark.parametrize("endless", ["/dev/zero", "/dev/urandom"])
def test_a_file_without_an_end_is_read_up_to_the_cap(endless: str) -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load_config(Path(endless), {})


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_not_shown_by_a_loaded_tree(tmp_path: Path) -> None:
    text = "mqtt: {password: '${PW}'}\n" + LANE % f"password: {SECRET}"
    config = load(tmp_path, text, PW=SECRET)
    for shown in (repr(config), str(config), str(config.model_dump()), config.model_dump_json(), repr(dict(config))):
        assert SECRET not in shown
    assert isinstance(config.mqtt.password, SecretStr)


@pytest.mark.parametrize(
    "text",
    [
        f"mqtt: {{password: [{SECRET}]}}",
        f"mqtt: {{password: {{x: {SECRET}}}}}",
        f"mqtt: {{passwort: {SECRET}}}",
        f"mqtt: {{broker: 'mqtt://u:{SECRET}@h'}}",
        f"mqtt: {{broker: 'mqtt://u:{SECRET}@h:99999'}}",
        f"mqtt: {{broker: 'amqp://u:{SECRET}@h'}}",
        "mqtt: {broker: '${PW}'}",
        "mqtt: {broker: 'mqtt://u:${PW}@h'}",
        "mqtt: {keepalive_s: '${PW}'}",
        "mqtt: {keepalive_s: '${credential:pw}'}",
        "http: {host: '${PW}x', port: '${PW}'}\nedge_mcu: {port: '${PW}', baud: 1}",
        "http: {enabled: '${PW}'}",
        "gateway: {id: 'a ${PW}'}",
        "gateway: {state_dir: '/dev/null/${PW}'}",
        "mqtt: {broker: 'mqtts://h', ca_file: '/${PW}'}",
        "gateway: {id: '${PW}'}\nsensors: {+/+/infer/+: {model: m}}",
        "sensors: {t: {model: m, format: '${PW}'}}",
        LANE % f"password: {SECRET}, cert_file: c.pem",
        f"mqtt: {{password: *{SECRET}}}",
        f"mqtt: {{password: !{SECRET} x}}",
        f"mqtt: {{password: !{SECRET}!x y}}",
        f"mqtt: {{password: '{SECRET}}}",
        f'mqtt: {{password: "{SECRET}\\q"}}',
        f"mqtt: {{password: @{SECRET}}}",
        f"mqtt: {{password: %{SECRET}}}",
        f"mqtt: {{password: a: {SECRET}}}",
        f"mqtt: {{password: {SECRET}, password: {SECRET}}}",
        f"%{SECRET}",
        f"mqtt:\n  password: {SECRET}\n bad",
    ],
)
def test_secrets_are_not_shown_by_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "pw").write_text(SECRET)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, PW=SECRET, CREDENTIALS_DIRECTORY=str(tmp_path))
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("value", [SECRET, "1234", "no", "~", "[a", "a: b", "# x", "'quoted'", "", "2024-01-01", " x "])
def test_a_secret_variable_is_taken_as_it_is(value: str) -> None:
    config = load_config(None, {"EDGE_AGENT__MQTT__PASSWORD": value})
    assert config.mqtt.password is not None
    assert config.mqtt.password.get_secret_value() == value


def test_a_refused_section_does_not_show_its_input() -> None:
    with pytest.raises(ValidationError) as caught:
        LaneSection(name="a", broker="mqtt://h", password=SecretStr(SECRET), cert_file=Path("x"))
    assert "cert_file and key_file go together" in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        MqttSection.model_validate({"password": SECRET, "ca_file": "x"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["918273645", "918273.645", "2091-08-27"])
def test_a_secret_of_another_type_is_not_shown_either(tmp_path: Path, value: str) -> None:
    message = refusal(tmp_path, f"mqtt: {{password: {value}}}")
    assert message.endswith("mqtt.password: must be text")


def test_a_value_that_came_by_reference_is_named_by_its_reference(tmp_path: Path) -> None:
    message = refusal(tmp_path, "mqtt: {keepalive_s: '${PW}'}", PW=SECRET)
    assert message.endswith("found the value of ${PW}")


def test_a_budget_that_lets_nothing_through_is_noted(tmp_path: Path) -> None:
    text = "cloud: {lanes: [{name: a, broker: 'mqtt://h', cost_per_request: 0.01, budget: {usd_per_hour: 0.005}}]}"
    state = f"gateway: {{state_dir: {tmp_path}}}"
    (note,) = cautions(load(tmp_path, f"{state}\n{text}\nbudgets: {{usd_per_day: 5, usd_per_minute: 0}}"))
    assert note == "cloud.lanes.0.budget.usd_per_hour: 0.005 USD let nothing through: a request of lane a costs 0.01"


def test_notes_of_a_board_that_is_not_there_and_of_a_burst_of_one(tmp_path: Path) -> None:
    state = f"gateway: {{state_dir: {tmp_path}}}"
    ports = f"edge_mcu: {{ports: [{tmp_path}/ttyNO, {tmp_path}]}}"
    assert cautions(load(tmp_path, f"{state}\n{ports}")) == [f"edge_mcu: {tmp_path}/ttyNO is not there now"]
    (note,) = cautions(load(tmp_path, f"{state}\nbudgets: {{requests_per_minute: 4, requests_per_hour: 40}}"))
    assert note == (
        "budgets.requests_per_minute: 4 with budgets.burst 0.25 let one through at once, and the next after 15 s"
    )
    assert cautions(load(tmp_path, f"{state}\nbudgets: {{requests_per_minute: 4, burst: 1}}")) == []


@pytest.mark.parametrize("variable", ["EDGE_AGENT__PRODUCERS____", "EDGE_AGENT__PRODUCERS__-X__RATE"])
def test_a_variable_is_named_for_a_name_that_may_not_be_one(variable: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {variable: ""})
    assert all(problem.startswith(f"{variable}: producers.") for problem in caught.value.problems)


def test_an_index_of_more_digits_than_python_reads() -> None:
    index = "9" * 5000
    with pytest.raises(ConfigError, match=r"has no item '9{32}'$"):
        load_config(None, {"EDGE_AGENT__CLOUD__LANES": "[{}]", f"EDGE_AGENT__CLOUD__LANES__{index}": ""})


@pytest.mark.parametrize("password", [f"a/{SECRET}", f"a@{SECRET}", f"a/b@{SECRET}"])
def test_a_password_in_a_brokers_address_is_not_shown_whatever_is_in_it(tmp_path: Path, password: str) -> None:
    text = f"cloud: {{lanes: [{{name: a, broker: 'mqtts://user:{password}@host:8883'}}]}}"
    shown = refusal(tmp_path, text)
    assert "cloud.lanes.0.broker" in shown and SECRET not in shown


@pytest.mark.parametrize("region", ["''", "eu west", "x" * 65])
@pytest.mark.parametrize("where", ["sensors: {a: {model: m, %s}}", "edge_mcu: {streams: [{name: a, model: m, %s}]}"])
def test_a_region_that_no_request_may_name_is_refused(tmp_path: Path, region: str, where: str) -> None:
    assert "allowed_regions.0: must be 1 to 64" in refusal(tmp_path, where % f"allowed_regions: [{region}]")


def test_an_alarm_that_could_never_begin_is_refused(tmp_path: Path) -> None:
    """The window holds no more than `window` samples."""
    assert "drift: min_samples must not exceed window" in refusal(tmp_path, "drift: {window: 20}")
    assert load(tmp_path, "drift: {window: 20, min_samples: 20}").drift.min_samples == 20
