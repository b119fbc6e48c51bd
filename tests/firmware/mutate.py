"""Broken models, for the validators: bits, cuts, and changes made where the schema has an index, a size or an offset.

The same seed makes the same mutations. `python tests/firmware/mutate.py SEED COUNT` runs them through the firmware's
validator and the gateway's, which must agree on each; under sanitizers it is the firmware's library that is judged.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MAX_MESSAGE = 32768

# Fields of the schema's tables: number -> the table or scalar vector behind it, or the width of the scalar.
TABLES: dict[str, dict[int, str | int]] = {
    "Model": {0: 4, 1: "[OperatorCode]", 2: "[SubGraph]", 3: "*1", 4: "[Buffer]", 5: "*4", 6: "[Metadata]"},
    "OperatorCode": {0: 1, 1: "*1", 2: 4, 3: 4},
    "SubGraph": {0: "[Tensor]", 1: "*4", 2: "*4", 3: "[Operator]", 4: "*1"},
    "Tensor": {0: "*4", 1: 1, 2: 4, 3: "*1", 4: "Quantization", 5: 1, 7: "*4", 8: 1},
    "Quantization": {0: "*4", 1: "*4", 2: "*4", 3: "*8", 6: 4},
    "Operator": {0: 4, 1: "*4", 2: "*4", 3: 1, 4: "Options", 5: "*1", 6: 1, 7: "*1", 8: "*4"},
    "Options": {0: 4, 1: 4, 2: 4},
    "Buffer": {0: "*1", 1: 8, 2: 8},
    "Metadata": {0: "*1", 1: 4},
}
INTERESTING = (0, 1, 2, 3, 7, 8, 9, 22, 25, 64, 127, 128, 255, 256, 1023, 1024, 32767, 65535, 65536, 1 << 24, 1 << 30)


class Place(NamedTuple):
    """Where a number of `width` bytes stands, and what it is."""

    at: int
    width: int
    what: str


def places(model: bytes) -> list[Place]:
    """Every scalar, offset, vector length, vector item and vtable entry that the schema names, without bulk data."""
    found = [Place(0, 4, "root")]
    open_tables = [("Model", _u(model, 0, 4))]
    while open_tables:
        kind, table = open_tables.pop()
        vtable = table - struct.unpack_from("<i", model, table)[0]
        found += [
            Place(table, 4, f"{kind} vtable"),
            Place(vtable, 2, "vtable size"),
            Place(vtable + 2, 2, "table size"),
        ]
        fields = (_u(model, vtable, 2) - 4) // 2
        for number in range(fields):
            found.append(Place(vtable + 4 + 2 * number, 2, f"{kind}.{number} place"))
            offset = _u(model, vtable + 4 + 2 * number, 2)
            what = TABLES[kind].get(number)
            if offset == 0 or what is None:
                continue
            at = table + offset
            if isinstance(what, int):
                found += _fits(model, at, what, f"{kind}.{number}")
                continue
            if kind == "Options" and _u(model, at, 4) > len(model):
                continue
            found.append(Place(at, 4, f"{kind}.{number} offset"))
            target = at + _u(model, at, 4)
            if what.startswith("["):
                found.append(Place(target, 4, f"{kind}.{number} length"))
                for i in range(_u(model, target, 4)):
                    item = target + 4 + 4 * i
                    found.append(Place(item, 4, f"{kind}.{number} item"))
                    open_tables.append((what[1:-1], item + _u(model, item, 4)))
            elif what.startswith("*"):
                found.append(Place(target, 4, f"{kind}.{number} length"))
                width = int(what[1:])
                for i in range(min(_u(model, target, 4), 16)):
                    found.append(Place(target + 4 + width * i, width, f"{kind}.{number} item"))
            else:
                open_tables.append((what, target))
    return found


def mutations(model: bytes, seed: str, count: int) -> Iterator[bytes]:
    """A fifth bits, a tenth cuts, the rest through the schema; one change in two comes with more of them."""
    rng = random.Random(seed)
    numbers = places(model)
    for _ in range(count):
        broken = bytearray(model)
        kind = rng.random()
        for _ in range(rng.choice((1, 1, 2, 4))):
            if kind < 0.2:
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            elif kind < 0.3:
                del broken[rng.randrange(len(broken)) :]
                break
            else:
                _edit(broken, rng.choice(numbers), rng)
        yield bytes(broken)


def _edit(model: bytearray, place: Place, rng: random.Random) -> None:
    limit = (1 << 8 * place.width) - 1
    now = _u(model, place.at, place.width)
    new = rng.choice(
        (
            rng.choice(INTERESTING),
            -rng.choice(INTERESTING[:8]),
            now + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8)),
            limit >> 1,
            (limit >> 1) + 1,
            len(model) - place.at + rng.randrange(-4, 5),
            rng.randrange(12),
            rng.getrandbits(8 * place.width),
        )
    )
    model[place.at : place.at + place.width] = (new & limit).to_bytes(place.width, "little")


def _fits(model: bytes, at: int, width: int, what: str) -> list[Place]:
    return [Place(at, width, what)] if at + width <= len(model) else []


def _u(data: bytes | bytearray, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def verdicts(broken: bytes, operators: bytes) -> tuple[tuple[int, str, int, int], tuple[int, str, int, int]]:
    """What the firmware says, and what the gateway says: (code or 0, why, input bytes, output bytes)."""
    from agent.registry.model_validator import ModelInvalid
    from agent.registry.model_validator import validate_model as on_the_gateway
    from hil.virtual.library import validate_model as on_the_board

    board = on_the_board(broken, operators)
    try:
        shape = on_the_gateway(broken, operators, MAX_MESSAGE)
    except ModelInvalid as refused:
        return (board if board[0] == 0 else (*board[:2], 0, 0)), (int(refused.code), str(refused), 0, 0)
    return board, (0, "", shape.input_bytes, shape.output_bytes)


def main() -> None:
    from hil.virtual.library import known_operators

    seed, count = sys.argv[1], int(sys.argv[2])
    operators = known_operators()
    for path in sorted(ROOT.glob("models/**/*.tflite")):
        accepted = 0
        for number, broken in enumerate(mutations(path.read_bytes(), seed + path.as_posix()[-40:], count)):
            board, gateway = verdicts(broken, operators)
            assert board == gateway, f"{path} seed {seed} mutation {number}: board {board}, gateway {gateway}"
            accepted += board[0] == 0
        print(f"{path.relative_to(ROOT)}: {count} mutations, {accepted} accepted, the rest refused; ok")


if __name__ == "__main__":
    main()
