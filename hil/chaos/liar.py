"""A cloud worker that says that it serves the models, takes its share of the requests and answers nonsense: not JSON,
another shape, numbers that are none, another model's digest, an empty message, or nothing at all.

    python -m hil.chaos.liar --broker-port 1883 --topic lanes/gpu --group chaos --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.wire import lane

NAME = "liar"


def lies(model: str, sha256: str) -> list[bytes | None]:
    """Answers that are none."""

    def answer(data: Any, shape: list[int], digest: str = sha256) -> bytes:
        execution = lane.Execution(digest, "onnxruntime", NAME, 0.0, 0.001).to_parameters()
        output = {"name": "probabilities", "datatype": "FP32", "shape": shape, "data": data}
        return json.dumps({"model_name": model, "outputs": [output], "parameters": execution}).encode()

    return [
        b"",
        b"\x00\xff not JSON",
        b"[" * 5000,
        b'{"outputs": []}',
        answer([0.5, 0.5], [1, 2]),
        answer([0.1] * 10, [10, 1]),
        answer([float("nan")] * 10, [1, 10]),
        answer([1e40] * 10, [1, 10]),
        answer([0.1] * 10, [1, 10], "0" * 64),
        answer(["0.1"] * 10, [1, 10]),
        None,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker-port", type=int, required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    catalog = load_catalog(catalog_path(None))
    variants = [
        (family.name, variant)
        for family in catalog.families.values()
        for variant in family.variants.values()
        if "cloud" in variant.targets
    ]
    served = tuple(lane.ServedModel(model, variant.id, variant.sha256, "onnxruntime") for model, variant in variants)
    presence = lane.presence_topic(args.topic, NAME)

    def on_connect(client: mqtt.Client, *_: object) -> None:
        for model, variant in variants:
            client.subscribe(f"$share/{args.group}/{lane.request_topic(args.topic, model, variant.sha256)}", qos=1)
        client.publish(presence, lane.Presence(NAME, 4, served).to_bytes(), qos=1, retain=True)
        print("link up", flush=True)

    def on_message(client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        model, sha256 = message.topic.split("/")[-2:]
        lie = chance.choice(lies(model, sha256))
        asked = message.properties
        if lie is None or asked is None or not hasattr(asked, "ResponseTopic"):
            return
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.CorrelationData = asked.CorrelationData  # type: ignore[attr-defined]
        properties.UserProperty = [(lane.STATUS, lane.OK)]
        client.publish(asked.ResponseTopic, lie, qos=1, properties=properties)

    client = mqtt.Client(CallbackAPIVersion.VERSION2, NAME, protocol=mqtt.MQTTv5)
    will = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
    client.will_set(presence, b"", qos=1, retain=True, properties=will)
    client.on_connect = on_connect
    client.on_message = on_message
    client.connect("127.0.0.1", args.broker_port)
    client.loop_forever()


if __name__ == "__main__":
    main()
