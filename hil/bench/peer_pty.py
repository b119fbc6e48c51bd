"""What the serial link is held against: a process behind a pseudo-terminal that answers a number of bytes for each
number of bytes, whatever they are."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hil.virtual.port import Port

READ_BYTES = 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--link", type=Path, required=True)
    parser.add_argument("--take", type=int, required=True, help="bytes of a request")
    parser.add_argument("--give", type=int, required=True, help="bytes of an answer")
    args = parser.parse_args()
    port = Port(args.link)
    os.set_blocking(port.master, True)
    answer = bytes(args.give)
    print("serving", flush=True)
    waiting = 0
    while True:
        waiting += len(os.read(port.master, READ_BYTES))
        while waiting >= args.take:
            waiting -= args.take
            sent = 0
            while sent < len(answer):
                sent += os.write(port.master, answer[sent:])


if __name__ == "__main__":
    main()
