"""The virtual microcontroller: the firmware on this machine, a pseudo-terminal its UART and a file its flash."""

from .cli import add_arguments, main

__all__ = ["add_arguments", "main"]
