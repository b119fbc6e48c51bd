"""How each kind of board is worked."""

from __future__ import annotations

from hil.processes import Stage
from hil.rig.boards import AnyBoard, QemuBoard, VirtualBoard
from hil.rig.protocols import Driver


def open_driver(name: str, board: AnyBoard, stage: Stage) -> Driver:
    """The driver of a board. What it needs is imported only now."""
    if isinstance(board, VirtualBoard):
        from hil.rig.drivers.virtual import VirtualDriver

        return VirtualDriver(name, board, stage)
    if isinstance(board, QemuBoard):
        from hil.rig.drivers.qemu import QemuDriver

        return QemuDriver(name, board, stage)
    from hil.rig.drivers.port import PortDriver

    return PortDriver(name, board)
