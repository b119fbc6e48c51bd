"""The wall clock of one process, moved from outside while it runs. Its other clocks, and other processes, notice
nothing."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
BUILD_LIMIT_S = 60.0


def compiler() -> str | None:
    """A C compiler; None if this machine has none."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


class WallClock:
    """Builds the library in `folder`; a process started with `environ` has a wall clock that `set` moves. Its children
    have it too. Raises `OSError` if it cannot be built.

    libfaketime does the same for more programs, and locks a mutex at every look at the clock: a process that forks
    while another of its threads looks, leaves a child that waits for that mutex for ever.
    """

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "wallclock.offset"
        self._library = folder / "wallclock.so"
        self.set(0)
        command = [compiler() or "cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE), "-ldl"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
        if done.returncode:
            raise OSError(f"{SOURCE.name} cannot be built: {done.stderr}")

    @property
    def environ(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "WALLCLOCK_OFFSET": str(self._offset)}

    def set(self, offset_s: int) -> None:
        """Against the machine's own."""
        file = os.open(self._offset, os.O_WRONLY | os.O_CREAT, 0o600)  # In place: it is mapped.
        try:
            os.pwrite(file, struct.pack("=q", offset_s), 0)
        finally:
            os.close(file)
