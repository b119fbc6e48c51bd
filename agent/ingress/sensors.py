"""A sensor's messages to requests, as the `sensors` section of the configuration has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from agent.config import SensorSection
from agent.core.errors import InvalidRequest
from agent.core.types import InferenceRequest
from agent.ingress.payload import decode_json
from agent.routing.admission import Admission
from agent.wire.oip import holds_only

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.-]")


class Sensor:
    """One entry of the configuration: a topic filter and how to read what comes on it."""

    def __init__(self, topic_filter: str, section: SensorSection) -> None:
        self.topic_filter = topic_filter
        self.section = section
        self._wild = [at for at, level in enumerate(topic_filter.split("/")) if level == "+"]
        self._options: dict[str, Any] = {
            "latency_class": section.latency_class,
            "priority": section.priority,
            "use_cache": section.use_cache,
            "accuracy": section.accuracy,
            "shadow": section.shadow,
        }
        if section.durable:
            self._options |= {"delivery": "durable", "latency_class": "batch"}
        if section.deadline_ms is not None:
            self._options["deadline_ms"] = section.deadline_ms
        if section.allowed_regions:
            self._options["allowed_regions"] = list(section.allowed_regions)

    def name(self, topic: str) -> str:
        """The configured name, else what the wildcards matched, else the last level; fit for a topic of its own."""
        if self.section.name is not None:
            return self.section.name
        levels = topic.split("/")
        chosen = "-".join(levels[at] for at in self._wild) if self._wild else levels[-1]
        return _UNUSUAL.sub("-", chosen)[:64] or "sensor"

    def request(self, admission: Admission, payload: bytes, name: str, received: float) -> InferenceRequest:
        """Raises `InvalidRequest` and `UnknownModel`."""
        request = self._request(admission, payload, name, received)
        return replace(request, uplink=True) if self.section.uplink else request

    def _request(self, admission: Admission, payload: bytes, name: str, received: float) -> InferenceRequest:
        section = self.section
        if section.format == "raw":
            return admission.from_bytes(
                payload,
                model=section.model,
                options=self._options,
                dtype=section.dtype,
                scale=section.scale,
                producer=name,
                received=received,
                asked_by=f"sensor:{name}",
            )
        decoded = decode_json(payload)
        document = {"inputs": _scaled(self._values(decoded), section.scale), **self._options}
        if isinstance(decoded, Mapping):
            # What a sensor says of a reading, to know its answer again; how it is to be answered, the gateway decides.
            document |= {key: decoded[key] for key in ("request_id", "idempotency_key") if key in decoded}
        return admission.from_document(
            document, model=section.model, producer=name, received=received, asked_by=f"sensor:{name}"
        )

    def _values(self, decoded: Any) -> Any:
        field = self.section.field
        if field is not None:
            if not isinstance(decoded, Mapping) or field not in decoded:
                raise InvalidRequest(f"{field}: is missing from the reading", field=field)
            return decoded[field]
        if isinstance(decoded, Mapping):
            if "inputs" not in decoded:
                raise InvalidRequest("inputs: is missing; the reading must be an array or have inputs", field="inputs")
            return decoded["inputs"]
        return decoded


def _scaled(values: Any, scale: float) -> Any:
    """Numbers times `scale`. What are no numbers stays as it is, for admission to refuse by name."""
    if scale == 1.0:
        return values
    if isinstance(values, Mapping):
        return {key: _scaled(value, scale) for key, value in values.items()}
    if not holds_only(values, int, float):
        return values
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        return values
    return array.astype(np.float32) * np.float32(scale) if array.dtype.kind in "fiu" else values
