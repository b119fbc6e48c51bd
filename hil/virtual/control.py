"""Client of the virtual MCU's control socket: what a hand does to a board.

python -m hil.virtual.control SOCKET reset
python -m hil.virtual.control SOCKET noise rate=1e-4 seed=7
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# The virtual MCU answers between two inferences.
ANSWER_LIMIT_S = 30.0


class ControlError(Exception):
    """The virtual MCU refused a command."""


class Control:
    """One connection. Every call returns when the virtual MCU has done it."""

    def __init__(self, path: Path | str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_LIMIT_S)
        self._socket.connect(str(path))
        self._answers = self._socket.makefile("rb")

    def call(self, command: str, **parameters: Any) -> dict[str, Any]:
        self._socket.sendall(json.dumps({"command": command, **parameters}).encode() + b"\n")
        line = self._answers.readline()
        if not line:
            raise ControlError("the virtual MCU closed the control socket")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ControlError(answer["error"])
        return answer

    def reset(self, cause: int = 2) -> None:
        """Presses the reset button; `cause` as in HELLO.reset_cause."""
        self.call("reset", cause=cause)

    def unplug(self) -> None:
        """Pulls the cable, which also carries the board's power."""
        self.call("unplug")

    def plug(self) -> None:
        self.call("plug")

    def noise(self, rate: float, seed: int = 0) -> None:
        """Bit errors in both directions from now on; rate 0 ends them."""
        self.call("noise", rate=rate, seed=seed)

    def stall(self) -> None:
        """The board stops reading and computing."""
        self.call("stall")

    def resume(self) -> None:
        self.call("resume")

    def stats(self) -> dict[str, Any]:
        return self.call("stats")

    def clock(self, **parameters: float) -> tuple[float, float]:
        """One moment on the board's clock and on this machine's monotonic one, seconds; `drift_ppm` from now on."""
        answer = self.call("clock", **parameters)
        return answer["board_s"], answer["monotonic_s"]

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def main(argv: list[str]) -> int:
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    parameters = {name: json.loads(value) for name, _, value in (word.partition("=") for word in argv[2:])}
    try:
        with Control(argv[0]) as control:
            print(json.dumps(control.call(argv[1], **parameters)))
    except (OSError, ControlError) as err:
        print(f"{argv[0]}: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
