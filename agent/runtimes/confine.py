"""What a process that opens models of unknown origin gives up, for good: memory and processor time beyond a limit,
files it could fill, sockets, programs and processes it could start, others it could look into, end or stop. All of it
needs Linux.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PR_SET_NO_NEW_PRIVS: Final = 38  # prctl(2)
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1  # seccomp(2)
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF (linux/filter.h)
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
_UNKNOWN = 0x0005_0026  # with ENOSYS: glibc goes on with clone(2)
_NUMBER_AT, _ARCH_AT, _FIRST_AT = 0, 4, 16  # in struct seccomp_data; the low half of the first argument
_CLONE_THREAD: Final = 0x1_0000
_CLONE3: Final = 435
"""Of every machine. Its flags lie in memory, where no filter sees them."""
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # landlock_create_ruleset(2), landlock_restrict_self(2), everywhere
_MAKE_BLOCK: Final = 1 << 11
"""LANDLOCK_ACCESS_FS_MAKE_BLOCK: a right that no process here has anyhow."""
_X32: Final = 0x4000_0000
"""System calls of x86-64's other ABI begin here: the same calls by other numbers."""


@dataclass(frozen=True, slots=True)
class _Machine:
    """`audit`: AUDIT_ARCH of linux/audit.h; `seccomp`, `clone`, `tgkill`: the numbers of those calls; `refused`: of
    those refused."""

    audit: int
    seccomp: int
    clone: int
    tgkill: int
    refused: tuple[int, ...]


# socket, connect, execve, execveat, ptrace, process_vm_readv, process_vm_writev, io_uring_setup; kill, tkill,
# rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, pidfd_getfd; then fork and vfork.
_MACHINES: Final = {
    "x86_64": _Machine(
        0xC000_003E, 317, 56, 234, (41, 42, 59, 322, 101, 310, 311, 425, 62, 200, 129, 297, 424, 438, 57, 58)
    ),
    "aarch64": _Machine(
        0xC000_00B7, 277, 220, 131, (198, 203, 221, 281, 117, 270, 271, 425, 129, 130, 138, 240, 424, 438)
    ),
}


def confine(memory_mb: int, cpu_s: int) -> None:
    """Give it all up. `memory_mb`: more than it has now (RLIMIT_DATA, which Linux counts for private writable mappings
    too); `cpu_s`: processor time of all threads beyond what it has used. 0: no such limit."""
    if memory_mb:
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        _limit(resource.RLIMIT_DATA, used + (memory_mb << 20))
    if cpu_s:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_s)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _keep_apart(libc)
        _refuse_calls(libc)


def _limit(what: int, value: int) -> None:
    """An administrator's lower limit stays."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _keep_apart(libc: ctypes.CDLL) -> None:
    """landlock(7): whoever is in a domain may not look into processes outside of it, neither by ptrace(2) nor by
    /proc/PID/mem and environ, which no filter of calls tells from other files. A kernel without it leaves it alone."""
    head = ctypes.create_string_buffer(struct.pack("=Q", _MAKE_BLOCK))
    rules = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), head, ctypes.c_size_t(8), ctypes.c_uint(0))
    if rules >= 0:
        libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(rules), ctypes.c_uint(0))
        os.close(rules)


def _refuse_calls(libc: ctypes.CDLL) -> None:
    """seccomp(2), for every thread there is. A kernel without it, or another processor, leaves the limits alone."""
    machine = _MACHINES.get(platform.machine())
    if machine is None or struct.calcsize("P") != 8:
        return
    program = _program(machine, os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc.syscall(ctypes.c_long(machine.seccomp), ctypes.c_long(_SET_MODE_FILTER), ctypes.c_long(_FLAG_TSYNC), head)


def _program(machine: _Machine, own: int) -> bytes:
    """Refuse the calls named, all of any other ABI, new processes (threads are none), and signals to threads of other
    processes than `own`; allow the rest. Jumps are relative to the next instruction."""
    count = len(machine.refused)
    steps = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_JUMP_EQUAL, 0, count + 10, machine.audit),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, count + 8, 0, _X32),
    ]
    steps += [(_JUMP_EQUAL, count + 7 - index, 0, number) for index, number in enumerate(machine.refused)]
    steps += [
        (_JUMP_EQUAL, 8, 0, _CLONE3),
        (_JUMP_EQUAL, 0, 2, machine.clone),
        (_LOAD, 0, 0, _FIRST_AT),
        (_JUMP_SET, 3, 4, _CLONE_THREAD),
        (_JUMP_EQUAL, 0, 2, machine.tgkill),
        (_LOAD, 0, 0, _FIRST_AT),
        (_JUMP_EQUAL, 0, 1, own),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def confined() -> bool:
    """Whether the kernel holds the calls back in this process."""
    try:
        status = Path(f"/proc/{os.getpid()}/status").read_text()
    except OSError:
        return False
    return "Seccomp:\t2" in status
