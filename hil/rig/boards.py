"""`rig.yaml`: which boards there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.core.documents import NotYaml, read_yaml
from agent.core.errors import ConfigError

DEFAULT_FILE: Final = Path(__file__).resolve().parents[1] / "rig.yaml"
MAX_BYTES: Final = 100_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Board(_Section):
    baud: int = Field(default=921_600, ge=1200, le=20_000_000)
    """Of the line; where the board's own line is not paced, the rig paces it to this for the throughput checks."""
    about: str = ""
    """For the report."""


class VirtualBoard(_Board):
    """The firmware as a process on this machine."""

    driver: Literal["virtual"]
    window: int = Field(default=4, ge=1, le=8)
    arena: int = Field(default=131_072, ge=1024)


class QemuBoard(_Board):
    """The firmware's image for a Cortex-M on an emulated one."""

    driver: Literal["qemu"]
    machine: str = "mps2-an386"
    image: Path = Path("firmware/.pio/build/qemu/firmware.elf")
    """Relative to the repository."""
    options: tuple[str, ...] = ()
    """Further options of qemu-system-arm."""


class Hub(_Section):
    """A USB hub that can switch its ports: `uhubctl -l HUB -p PORT`."""

    location: str = Field(min_length=1)
    port: int = Field(ge=1, le=64)


class RealBoard(_Board):
    """A board on a serial port of this machine."""

    driver: Literal["port"]
    port: str = Field(min_length=1)
    """A name that stays, such as one under /dev/serial/by-id."""
    line: Literal["uart", "usb"] = "usb"
    """`usb`: the board's own USB; its baud rate means nothing. `uart`: an adapter; its wire limits the rate."""
    reset: Literal["none", "dtr", "rts", "esp"] = "none"
    """Which modem line is wired to the board's reset; `esp`: both, as on boards with an ESP32 and an adapter."""
    uhubctl: Hub | None = None


AnyBoard = VirtualBoard | QemuBoard | RealBoard


class Boards(_Section):
    boards: dict[str, Annotated[AnyBoard, Field(discriminator="driver")]]


def load_boards(path: Path = DEFAULT_FILE) -> dict[str, AnyBoard]:
    """Raises `ConfigError`: one line for each fault, with file and key."""
    try:
        return Boards.model_validate(read_yaml(path, MAX_BYTES) or {}).boards
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except NotYaml as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    raise ConfigError([f"{path}: {'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults])


def find(name: str, boards: dict[str, AnyBoard]) -> AnyBoard:
    """A board by its name in the file, or any serial port by its path. Raises `ConfigError`."""
    if name in boards:
        return boards[name]
    if name.startswith("/"):
        listed = (board for board in boards.values() if isinstance(board, RealBoard) and board.port == name)
        return next(listed, None) or RealBoard(driver="port", port=name)
    raise ConfigError([f"--board: no board {name!r}; there are {', '.join(sorted(boards))}, and any /dev/..."])
