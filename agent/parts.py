"""The states of what is no supervised task: the targets and what they are made of, links, stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.core.component import ComponentState, Reading
from agent.durable.desk import Desk
from agent.ingress.mqtt import MqttDoor
from agent.registry.accuracy import Accuracies
from agent.security.audit import Audit
from agent.store.cache import ResultCache
from agent.targets.base import Target
from agent.telemetry.trace import TraceFile


def read_parts(
    standings: Mapping[str, tuple[bool, str]],
    targets: Sequence[Target],
    mqtt: MqttDoor | None,
    desk: Desk | None,
    *,
    cache: ResultCache,
    audit: Audit | None,
    trace: TraceFile | None,
    accuracies: Accuracies | None,
) -> dict[str, Reading]:
    """By name. `standings`: of each target whether it is asked, and why not; `accuracies`: None where no answer is
    asked again of the cloud."""
    found: dict[str, Reading] = {}
    for target in targets:
        found |= _of_target(target, *standings[target.traits.name])
    if mqtt:
        found["mqtt door"] = mqtt.link.reading()
    if desk:
        found |= desk.parts()
    troubles = {"cache": cache.problem()}
    if accuracies:
        adrift = [alarm.variant.name for alarm in accuracies.states() if alarm.active]
        troubles["drift"] = f"{', '.join(adrift)}: agree less with the cloud than they did" if adrift else ""
    if audit:
        troubles["audit"] = audit.problem()
    if trace:
        troubles["recorder"] = trace.problem
    return found | {name: Reading.working(trouble) for name, trouble in troubles.items()}


def _of_target(target: Target, asked: bool, reason: str) -> dict[str, Reading]:
    """The target, degraded where it is asked although a part of it is down, and its parts."""
    parts = target.parts()
    if asked:
        reason = "; ".join(f"{name}: {one.reason}" for name, one in parts.items() if one.state is ComponentState.DOWN)
    return {target.traits.name: Reading.there(asked, reason), **parts}
