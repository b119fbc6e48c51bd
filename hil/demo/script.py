"""What happens when: the three outages, as parts of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from hil.linkcut import LinkCut
from hil.virtual.control import Control

CLOUDS = ("cloud_gpu", "cloud_serverless")


@dataclass(frozen=True)
class Outage:
    """A span of the run, monotonic seconds."""

    name: str
    start_s: float
    end_s: float
    back_s: float
    """When the parts came back: later than `end_s` where the next outage follows at once."""
    tiers: tuple[str, ...]
    """What was taken away and is asked again when it is back."""


class Script:
    """Cuts the cloud link and mends it; hangs the gateway's runtime; then unplugs the microcontroller and cuts the
    cloud link as well, so that nothing can be asked; then brings everything back.

    The runtime hangs as a broken accelerator does: the process that runs it is stopped (SIGSTOP), and so is every new
    one that the daemon starts in its place. `runtime_pid` tells which process that is now.
    """

    def __init__(self, link: LinkCut, control: Control, runtime_pid: Callable[[], int | None]) -> None:
        self._link = link
        self._control = control
        self._runtime_pid = runtime_pid
        self._held: int | None = None
        self._holding = False
        self._at: dict[str, float] = {}
        # The last part is long: a lane that was slow is asked again only now and then, until it is known to be well.
        self._scenes: list[tuple[float, Callable[[], str]]] = [
            (0.15, self._cut),
            (0.28, self._mend),
            (0.36, self._hang),
            (0.48, self._all_away),
            (0.60, self._all_back),
        ]

    def advance(self, part: float, say: Callable[[str], None]) -> None:
        """Play what is due when this part (0 to 1) of the run is over."""
        while self._scenes and part >= self._scenes[0][0]:
            _, scene = self._scenes.pop(0)
            event = scene()
            self._at[scene.__name__] = time.monotonic()
            say(event)
        if self._holding:
            self._hold()

    def outages(self) -> list[Outage]:
        """After the run."""
        at = self._at
        cut, mended, hung = at["_cut"], at["_mend"], at["_hang"]
        away, back = at["_all_away"], at["_all_back"]
        return [
            Outage("cloud link cut", cut, mended, mended, CLOUDS),
            Outage("gateway runtime hung", hung, away, back, ("edge_gpu",)),
            Outage("microcontroller unplugged and cloud link cut as well", away, back, back, ("edge_gpu", *CLOUDS)),
        ]

    def _cut(self) -> str:
        self._link.cut()
        return "the cloud link is CUT"

    def _mend(self) -> str:
        self._link.mend()
        return "the cloud link is back"

    def _hang(self) -> str:
        self._holding = True
        self._hold()
        return "the gateway's runtime HANGS"

    def _all_away(self) -> str:
        self._control.unplug()
        self._link.cut()
        return "the microcontroller is UNPLUGGED and the cloud link CUT as well: nothing can be asked"

    def _all_back(self) -> str:
        self._holding = False
        if self._held is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._held, signal.SIGCONT)
        self._link.mend()
        self._control.plug()
        return "everything is back"

    def _hold(self) -> None:
        pid = self._runtime_pid()
        if pid is not None and pid != self._held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self._held = pid
