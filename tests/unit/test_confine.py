"""What a process can still do to others that opens models of unknown origin."""

from __future__ import annotations

import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from agent.runtimes import confine

ROOT = Path(__file__).resolve().parents[2]
OWN = 77
X86_64, ARM64 = confine._MACHINES["x86_64"], confine._MACHINES["aarch64"]


def verdict(machine: confine._Machine, number: int, first: int = 0, audit: int | None = None) -> int:
    """Of the filter, as the kernel would come to it."""
    program = confine._program(machine, OWN)
    steps = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    data = {0: number, 4: machine.audit if audit is None else audit, 16: first}
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == confine._RETURN:
            return int(operand)
        if code == confine._LOAD:
            value = data[operand]
            continue
        holds = {
            confine._JUMP_EQUAL: value == operand,
            confine._JUMP_AT_LEAST: value >= operand,
            confine._JUMP_SET: bool(value & operand),
        }
        at += yes if holds[code] else no


@pytest.mark.parametrize("machine", [X86_64, ARM64])
def test_the_filter(machine: confine._Machine) -> None:
    special = {machine.clone, machine.tgkill, confine._CLONE3, *machine.refused}
    assert {verdict(machine, number) for number in machine.refused} == {confine._REFUSE}
    assert {verdict(machine, number) for number in range(470) if number not in special} == {confine._ALLOW}
    assert verdict(machine, 0, audit=1) == verdict(machine, confine._X32) == confine._REFUSE
    assert verdict(machine, confine._CLONE3) == confine._UNKNOWN
    assert verdict(machine, machine.clone, 0x3D_0F00) == confine._ALLOW, "a thread"
    assert verdict(machine, machine.clone, 17) == confine._REFUSE, "a process"
    assert verdict(machine, machine.tgkill, OWN) == confine._ALLOW, "abort(3)"
    assert verdict(machine, machine.tgkill, OWN + 1) == confine._REFUSE


REFUSED = [
    "socket",
    "connect",
    "execve",
    "execveat",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "io_uring_setup",
    "kill",
    "tkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_send_signal",
    "pidfd_getfd",
]


@pytest.mark.parametrize(
    ("machine", "header", "more"),
    [
        (X86_64, Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ["fork", "vfork"]),
        (ARM64, Path("/usr/include/asm-generic/unistd.h"), []),
    ],
)
def test_the_numbers_are_those_of_the_kernel(machine: confine._Machine, header: Path, more: list[str]) -> None:
    """arm64 has the generic table, which Debian's headers bring for every machine."""
    if machine is X86_64 and platform.machine() != "x86_64":
        pytest.skip("these headers are for another processor")
    if not header.exists():
        pytest.skip("linux-libc-dev is not installed")
    found = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())}
    assert machine.refused == tuple(found[name] for name in REFUSED + more)
    assert (machine.seccomp, machine.clone, machine.tgkill) == (found["seccomp"], found["clone"], found["tgkill"])
    assert found["clone3"] == confine._CLONE3
    assert found["landlock_create_ruleset"] == confine._LANDLOCK_CREATE
    assert found["landlock_restrict_self"] == confine._LANDLOCK_RESTRICT


def test_it_starts_no_process_and_leaves_its_parent_alone() -> None:
    attempts = """
import ctypes, errno, os, signal, threading
from agent.runtimes.confine import confine, confined
confine(256, 60)
libc, parent = ctypes.CDLL(None, use_errno=True), os.getppid()
def attempt(act):
    try:
        act()
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
    else:
        print("allowed", flush=True)
def fork():
    if os.fork() == 0:
        os._exit(0)
def steal():
    pidfd = os.pidfd_open(parent)
    if libc.syscall(ctypes.c_long(438), pidfd, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
if not confined():
    print("no seccomp")
attempt(fork)
attempt(steal)
attempt(lambda: os.kill(parent, 0))
thread = threading.Thread(target=lambda: print("thread", flush=True))
thread.start()
thread.join()
if libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)) > 0:
    attempt(lambda: os.open(f"/proc/{parent}/mem", os.O_RDWR))
"""
    done = subprocess.run([sys.executable, "-c", attempts], capture_output=True, text=True, cwd=ROOT, check=False)
    said = done.stdout.split("\n")[:-1]
    if "no seccomp" in said:
        pytest.skip("this kernel or processor has no filter of system calls here")
    assert said[:4] == ["EPERM"] * 3 + ["thread"], done.stderr
    assert set(said[4:]) <= {"EACCES", "EPERM"}, f"it looks into process {os.getpid()}"
