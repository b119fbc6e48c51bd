"""Parts of the daemon that are made of a list in the configuration: its tiers, and the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent import __version__
from agent.config import Config
from agent.core.clock import Clock
from agent.core.errors import ConfigError
from agent.core.streamed import Streamed
from agent.registry.catalog import Catalog
from agent.registry.model_structure import check_structure
from agent.registry.trust import SHIPPED, Trust
from agent.runtimes.base import Confinement
from agent.targets.base import Target
from agent.telemetry.trace import TraceFile, trace_header


def build_targets(
    config: Config,
    catalog: Catalog,
    clock: Clock,
    deliver: Callable[[Streamed], None] = lambda sample: None,
    trust: Trust = SHIPPED,
) -> list[Target]:
    """Every configured tier. A new tier is one file in `targets/` and one line here. `deliver` gets what boards sample
    themselves. Raises `ConfigError` for a stream of a model that is not in the catalogue.

    Imports happen here because a tier that is not configured need not take memory.
    """
    sizes = config.routing.model_size_thresholds
    targets: list[Target] = []
    if config.edge_mcu.enabled and config.edge_mcu.ports:
        from agent.targets.mcu import McuTarget

        unknown = [stream for stream in config.edge_mcu.streams if stream.model not in catalog.families]
        if unknown:
            raise ConfigError([f"edge_mcu.streams: {stream.name}: no model {stream.model!r}" for stream in unknown])
        mcu_bytes = sizes.edge_mcu * 1e6
        targets.append(McuTarget(config.edge_mcu, catalog, clock, max_bytes=mcu_bytes, deliver=deliver))
    if config.edge_gpu.enabled:
        from agent.targets.gateway import GatewayTarget

        most, confinement = sizes.edge_gpu * 1e6, confinement_of(config, trust)
        targets.append(GatewayTarget(config.edge_gpu, catalog, clock, max_bytes=most, confinement=confinement))
    for lane in config.cloud.lanes:
        from agent.targets.cloud import CloudLane

        targets.append(CloudLane(lane, config.gateway.id, catalog, clock, max_bytes=sizes.cloud * 1e6))
    return targets


def confinement_of(config: Config, trust: Trust) -> Confinement | None:
    """Of models that nobody vouches for; None: somebody does."""
    models = config.models
    if trust.trusted:
        return None
    passed = config.gateway.state_dir / "models-passed.json"
    return Confinement(models.trial_memory_mb, models.trial_s, check_structure, passed)


def build_trace(config: Config, catalog: Catalog, targets: Sequence[Target], clock: Clock) -> TraceFile | None:
    """Where requests are recorded; None: nowhere."""
    section = config.monitoring
    if section.record is None:
        return None
    header = {"gateway": config.gateway.id, "version": __version__, "started": clock.wall()}
    return TraceFile(
        section.record,
        header | trace_header(catalog, (target.traits for target in targets)),
        started=clock.monotonic(),
        payload=section.record_payload,
        max_bytes=section.record_max_bytes,
        files=section.record_files,
    )
