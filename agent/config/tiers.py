"""The tiers: boards, the gateway's own runtimes, cloud lanes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from agent.config.base import Name, Section, Topic
from agent.config.broker import BrokerSection
from agent.config.budgets import AmountsSection
from agent.config.streams import StreamSection


class McuSection(Section):
    enabled: bool = True
    ports: tuple[str, ...] = ()
    """Serial ports, one microcontroller each; empty: the tier is off. `port` is accepted for a single one."""
    baud: int = Field(default=921_600, ge=1200, le=20_000_000)
    timeout_ms: float = Field(default=50, gt=0, le=60_000)
    max_concurrent: int = Field(default=4, ge=1, le=64)
    """Open requests for each microcontroller; the window it advertises may lower it."""
    health_check_interval: float = Field(default=5, gt=0, le=3600)
    """Seconds between PINGs."""
    require_signed_updates: bool = False
    """Boards that do not verify Ed25519 are not updated, and a trial of theirs is not confirmed."""
    streams: tuple[StreamSection, ...] = Field(default=(), max_length=64)
    """One for each board that samples a sensor of its own."""

    @model_validator(mode="before")
    @classmethod
    def _single_port(cls, data: object) -> object:
        if isinstance(data, dict) and "port" in data:
            if "ports" in data:
                raise ValueError("give either port or ports, not both")
            data = {**data, "ports": [data["port"]]}
            del data["port"]
        return data

    @field_validator("ports", mode="after")
    @classmethod
    def _distinct(cls, ports: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ports)) != len(ports):
            raise ValueError("names the same port twice")
        return ports

    @model_validator(mode="after")
    def _streams(self) -> Self:
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError("streams: two have the same name")
        boards = [(stream.port, stream.uid) for stream in self.streams]
        if len(set(boards)) != len(boards):
            raise ValueError("streams: two are of the same board, which has one at a time")
        for stream in self.streams:
            if stream.port is not None and stream.port not in self.ports:
                raise ValueError(f"streams: port {stream.port} of {stream.name} is none of ports")
            if stream.port is None and stream.uid is None and len(self.ports) != 1:
                raise ValueError(f"streams: {stream.name} needs port or uid, as there is not exactly one port")
        return self


class GpuSection(Section):
    """The gateway's own runtime; called `edge_gpu` also where it runs on the CPU."""

    enabled: bool = True
    providers: tuple[Literal["tensorrt", "cuda", "cpu"], ...] = Field(default=("tensorrt", "cuda", "cpu"), min_length=1)
    """ONNX Runtime execution providers, in order of preference."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """For LiteRT models: `auto` takes the GPU accelerator where it loads, else XNNPACK on the CPU."""
    strict_provider: bool = False
    """Refuse to start rather than run on another provider than the first one named."""
    timeout_ms: float = Field(default=200, gt=0, le=600_000)
    max_concurrent: int = Field(default=5, ge=1, le=256)
    threads: int = Field(default=1, ge=1, le=64)
    """XNNPACK / ONNX Runtime threads for each inference."""
    workers: int = Field(default=2, ge=1, le=64)
    """Threads that run inferences at once."""
    inline_below_ms: float = Field(default=0.5, ge=0, le=5)
    """Inferences that measure faster than this run on the event loop: a hand-over to a thread costs more. 0: never."""
    isolation: Literal["thread", "process"] = "thread"
    """`process`: run the runtime in a child process, so that an accelerator that hangs takes nothing else along."""


class LaneSection(BrokerSection):
    """One way into the cloud."""

    name: Name
    kind: Literal["gpu", "serverless"] = "gpu"
    topic: Topic = "edge-agent/lanes/default"
    cost_per_request: float = Field(default=0.001, ge=0, le=1000)
    timeout_ms: float = Field(default=5000, gt=0, le=600_000)
    max_concurrent: int = Field(default=100, ge=1, le=10_000)
    region: Name | None = None
    metered: bool | None = None
    """Whether what goes over it is paid for by what is sent; None: if a request costs anything."""
    backup: bool = False
    """Asked only after the lanes that are not backups."""
    budget: AmountsSection = AmountsSection()
    """What this lane may use; `budgets` has what all of them may use together."""

    @property
    def target(self) -> str:
        """The name of the target that asks this lane."""
        return f"cloud:{self.name}"


class CloudSection(Section):
    lanes: tuple[LaneSection, ...] = Field(default=(), max_length=16)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [lane.name for lane in self.lanes]
        if len(set(names)) != len(names):
            raise ValueError("two lanes have the same name")
        return self
