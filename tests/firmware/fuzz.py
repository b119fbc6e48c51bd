"""Random and mutated bytes into everything that reads bytes from outside. Run by the tests, also under sanitizers.

EDGE_AGENT_FIRMWARE=... python tests/firmware/fuzz.py SEED COUNT
"""

from __future__ import annotations

import random
import struct
import sys

from board import VECTORS, Board, Image, infer, line, model, pieces

from hil.virtual.library import FrameDecoder, known_operators, validate_model


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(4), rng.randrange(len(out) + 1)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del out[at : at + rng.randint(1, 8)]
        else:
            out[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    return bytes(out)


def lines(rng: random.Random, count: int) -> list[bytes]:
    """Broken lines, and good frames with broken bodies, which get further."""
    image = Image(model(1), counter=2)
    good = [(f["type"], bytes.fromhex(f["payload_hex"])) for f in VECTORS["frames"]]
    good += [(0x03, infer(Image(model()))), (0x10, image.begin(256)), (0x11, struct.pack("<I", 256) + bytes(256))]
    made = []
    for _ in range(count):
        type_, body = rng.choice(good)
        if type_ == 0x05:  # RESET would end the session
            continue
        kind = rng.randrange(5)
        if kind == 0:
            made.append(rng.randbytes(rng.randrange(1, 300)))
        elif kind == 1:
            made.append(mutated(line(type_, body, rng.randrange(9), rng.randrange(4)), rng))
        elif kind == 2 and body:
            made.append(line(type_, mutated(body, rng)[:1076], rng.randrange(9), rng.randrange(4)))
        elif kind == 3:
            made.append(line(rng.choice([t for t in range(256) if t != 5]), body[:1076], rng.randrange(9)))
        else:
            parts = pieces("INFER", body + bytes(30), rng.randrange(9), rng.randrange(10, 40))
            made += rng.sample(parts, min(len(parts), rng.randrange(1, 5)))
    return made


def fuzz_decoder(rng: random.Random, count: int) -> None:
    decoder = FrameDecoder(256)
    for data in lines(rng, count):
        decoder.push(data)
        found = decoder.push(b"\0" + line("PING", b"still here", 3))
        assert getattr(found[-1], "payload", None) == b"still here", data.hex()
    decoder.close()


def fuzz_session(rng: random.Random, count: int) -> None:
    board = Board()
    assert board.push(Image(model())).code == 0
    for number, data in enumerate(lines(rng, count)):
        board.feed(data)
        if rng.random() < 0.3:
            board.poll()
        board.feed(b"\0" + line("PING", b"still here", 0xABCDEF))
        pong = [m for m in board.take() if m.id == 0xABCDEF][-1]
        assert pong.type == "PONG", data.hex()
        assert pong.body[16:] == b"still here", data.hex()
        if number % 500 == 0:
            board.boot()
    board.ask("HELLO_REQ", struct.pack("<BBH", 1, 0, 1088))
    board.poll()
    assert board.active() is not None
    assert board.flash.breaches == []
    board.close()


def fuzz_validator(rng: random.Random, count: int) -> None:
    operators = known_operators()
    for _ in range(count):
        data = rng.randbytes(rng.randrange(200)) if rng.random() < 0.1 else mutated(model(), rng)
        code, _, inputs, outputs = validate_model(data, operators)
        assert code in (0, 19, 20)
        if code == 0:
            assert 0 < inputs <= 32768
            assert 0 < outputs <= 32768


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    for fuzz in (fuzz_decoder, fuzz_session, fuzz_validator):
        fuzz(random.Random(seed), count)
        print(fuzz.__name__, count, "ok")


if __name__ == "__main__":
    main()
