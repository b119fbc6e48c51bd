"""Request and response through the daemon's MQTT door, beside a paho responder on the same broker.

Same client, same broker, same payload sizes, same QoS; the responder answers what the daemon answered once, without
reading the request.
"""

from __future__ import annotations

import itertools
import json
import sys

from agent.registry.catalog import Family, load_catalog
from agent.registry.locate import catalog_path
from agent.wire.mqtt_properties import MessageProperties
from hil.bench import rig
from hil.bench.answers import compute_us
from hil.bench.bare import canonical_inputs
from hil.bench.mqtt_client import OneByOne, publish
from hil.bench.report import Aim, Line
from hil.bench.stats import alternate
from hil.processes import Stage, free_port

AIM = 1.5
ANSWERS = "bench/answers"
PAHO_TOPIC = "bench/paho"
PEER = "paho responder, same bytes"
JSON, RAW = "application/json", "application/octet-stream"


def measure(seconds: float) -> list[Line]:
    catalog = load_catalog(catalog_path(None))
    family = next(iter(catalog.families.values()))
    samples = canonical_inputs(catalog, family)
    name = family.inputs[0].name
    bodies = [json.dumps({"inputs": {name: value.tolist()}, "use_cache": False}).encode() for value in samples]
    raw = [value.tobytes() for value in samples]
    lines = []
    with Stage() as stage:
        port = free_port()
        stage.broker("broker", port)
        rig.start(stage, rig.config(stage.folder, mqtt={"broker": f"mqtt://127.0.0.1:{port}"}))
        _start_peer(stage, port, _client(port, family, bodies[:1], JSON, 1, ours=True))
        for kind, content_type, payloads in (("JSON", JSON, bodies), ("raw", RAW, raw)):
            for qos in (0, 1):
                ours = _client(port, family, payloads, content_type, qos, ours=True)
                peer = _client(port, family, payloads, content_type, qos, ours=False)
                sides = alternate({"ours": ours, "peer": peer}, seconds)
                found = {key: side.scaled(1e6) for key, side in sides.items()}
                invoke = compute_us(ours.bodies)
                aim = Aim(AIM, allowance=invoke, allowance_name="the invoke")
                label = f"{family.name}, {kind} of {len(payloads[0])} bytes, QoS {qos}"
                note = f"{invoke:.0f} us of it are the model"
                lines.append(Line("mqtt", label, "us", found["ours"], PEER, found["peer"], aim, note))
    return lines


def _client(port: int, family: Family, payloads: list[bytes], content_type: str, qos: int, *, ours: bool) -> OneByOne:
    topic = f"edge/{rig.GATEWAY}/infer/{family.name}" if ours else PAHO_TOPIC
    properties = MessageProperties(
        content_type,
        response_topic=ANSWERS,
        correlation_data=b"bench-42",
        user=(("use_cache", "false"),) if content_type == RAW else (),
    )
    requests = itertools.cycle([publish(topic, payload, qos, properties) for payload in payloads])
    return OneByOne(port, "bench-client", ANSWERS, requests)


def _start_peer(stage: Stage, port: int, once: OneByOne) -> None:
    once(0.0)
    answer = stage.folder / "answer.json"
    answer.write_bytes(once.bodies[-1])
    command = [sys.executable, "-m", "hil.bench.peer_mqtt", "--port", str(port), "--topic", PAHO_TOPIC]
    process = stage.start("paho", [*command, "--answer", str(answer)])
    process.wait_for_log("serving")
