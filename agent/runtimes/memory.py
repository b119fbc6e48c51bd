"""Give memory back to the system after a model was loaded: parsing leaves the allocator with pages that nobody uses."""

from __future__ import annotations

import ctypes
import sys


def release_unused() -> None:
    """glibc's malloc_trim(3): takes about a millisecond. Does nothing with another C library."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
