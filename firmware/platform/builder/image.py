"""What can be done with an image: `-t size` says what each part of it takes, `-t exec` starts it."""

import re
import subprocess
import sys
from pathlib import Path

LIMIT = 24_000
"""Bytes of flash, and of RAM, that the firmware may take besides the library and its arena."""

BESIDES = ("TensorFlow Lite Micro", "tensor arena")
RAM, STORE = 0x2000_0000, 0x2100_0000

# ` .text.name  0xADDRESS 0xSIZE FILE`, where a long name stands on a line of its own.
INPUT = re.compile(r"^ (\.[\w.$]+|COMMON)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+(\S+)$", re.MULTILINE)
# An archive's member, and on the next line who named it first.
PULLED = re.compile(r"^(\S+\.a\(\S+\))\s+(\S+) \(\S+\)$", re.MULTILINE)
# Of the C library, what the firmware needs itself: its own, whoever is named first. (It has no memmove.)
SHARED = re.compile(r"\(lib_a-(?:mem(?:chr|cmp|cpy|set)|str(?:len|nlen))\.o\)$")
STACK = re.compile(r"^\.(?:handler_)?stack\s+0x[0-9a-f]+\s+0x([0-9a-f]+)", re.MULTILINE)


def targets(env, output, run):
    map_file = Path(env.subst("$BUILD_DIR/firmware.map"))

    def size(target, source, env):
        return print_size(map_file)

    def start(target, source, env):
        return subprocess.call([run, str(source[0])])

    env.AddPlatformTarget("size", output, env.VerboseAction(size, " "), "Size", "Flash and RAM by part")
    env.AddPlatformTarget("exec", output, env.VerboseAction(start, " "), "Exec", "Start it")


def pulled_by_library(text):
    """Members of the C library's archives that are there for TensorFlow Lite Micro alone."""
    found = set()
    for member, by in PULLED.findall(text):
        if "libtflm.a(" in by or by.endswith("tflm_engine.o") or by in found:
            found.add(member)
    return {member for member in found if not SHARED.search(member)}


def part_of(section, file, pulled):
    if section.startswith(".arena"):
        return "tensor arena"
    # Its templates are compiled within our engine.
    if "libtflm.a(" in file or file in pulled or "6tflite" in section:
        return "TensorFlow Lite Micro"
    if "/src/engine/" in file:
        return "engine"
    if "/src/" in file or ".ltrans" in file:
        return "core and board"
    return "C and C++ library"


def sizes(text):
    """{part: [flash, RAM]} of a linker map."""
    pulled = pulled_by_library(text)
    text = text.partition("Linker script and memory map")[2]
    parts = {}
    for section, address, size, file in INPUT.findall(text):
        at, size = int(address, 16), int(size, 16)
        if at >= STORE or section.startswith((".debug", ".comment", ".ARM.attributes")):
            continue
        part = parts.setdefault(part_of(section, file, pulled), [0, 0])
        initialised = section.startswith(".data")
        if at < RAM or initialised:
            part[0] += size
        if at >= RAM:
            part[1] += size
    parts["stacks"] = [0, sum(int(size, 16) for size in STACK.findall(text))]
    return parts


def print_size(map_file):
    parts = {name: size for name, size in sorted(sizes(map_file.read_text()).items()) if any(size)}
    ours = [sum(size[k] for name, size in parts.items() if name not in BESIDES) for k in (0, 1)]
    rows = [f"{'part':24}{'flash':>10}{'RAM':>10}"]
    rows += [f"{name:24}{flash:10,}{ram:10,}" for name, (flash, ram) in parts.items()]
    rows += [f"{'the firmware':24}{ours[0]:10,}{ours[1]:10,}   limit {LIMIT:,} each, without {' and '.join(BESIDES)}"]
    sys.stdout.write("\n".join(rows) + "\n")
    return 1 if max(ours) > LIMIT else 0
