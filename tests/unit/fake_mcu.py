"""A microcontroller made of Python, lines to it of four kinds, and an event loop whose time passes at once."""

from __future__ import annotations

import asyncio
import functools
import random
import selectors
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from fake_update import EMPTY_SLOT as EMPTY_SLOT
from fake_update import INPUTS as INPUTS
from fake_update import KEY as KEY
from fake_update import MODEL_SHA256 as MODEL_SHA256
from fake_update import ModelUpdates
from fake_update import active_slot as active_slot

from agent.core.errors import LinkError
from agent.link.session import Session
from agent.wire.codes import Capability, ErrorCode, MessageType, ResetCause, Rollback, SlotState
from agent.wire.fragments import Reassembler, split
from agent.wire.frame import FRAGMENT, MIN_MAX_FRAME, RETRY, Frame, FrameDecoder
from agent.wire.messages import Error, Hello, HelloReq, Infer, Log, Pong, Result, Stats


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Waits for nothing: when only timers are left, time jumps to the next. Waiting for ever is an error at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("the test waits for something that will never happen")
            self._loop.now += max(0.0, timeout)
        return events


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a `VirtualTimeLoop`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


class LoopClock:
    """The running loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return 1_700_000_000.0 + self.monotonic()

    def boot(self) -> str:
        return ""


HELLO = Hello(
    major=1,
    minor=0,
    max_frame=1088,
    max_message=32768,
    window=4,
    reset_cause=ResetCause.POWER_ON,
    boot_id=1,
    capabilities=Capability.ENGINE,
    arena=131072,
    slot_size=65536,
    uid=99,
    board="fake",
    build="0.1.0",
    engine="none-of-yours 1.0",
    operators=(9, 25),
    slots=(active_slot(), EMPTY_SLOT),
)

HELLO_1_1 = replace(HELLO, minor=1, trial_s=300)
"""Of a board that keeps a new model in trial until it is confirmed."""


class FakeMcu(ModelUpdates):
    """Follows the protocol page. What a test wants otherwise it sets: `mute`, `compute_s`, `model`, `hello`."""

    def __init__(self, hello: Hello = HELLO, compute_s: float = 0.001) -> None:
        self.hello = hello
        self.compute_s = compute_s
        self.model: Callable[[bytes], bytes] = lambda inputs: inputs[:4]
        self.mute: set[int] = set()
        """Types that are not answered."""
        self.fails = False
        """INFER fails, which ends a trial."""
        self.seen: list[Frame] = []
        self.most_open = 0
        self.runs = 0
        self.image = bytearray()
        self.flashed = []
        self._send: Callable[[bytes], None] = lambda data: None
        self._restart(hello.boot_id)

    def attach(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def boot(self, cause: ResetCause = ResetCause.POWER_ON, *, say: bool = True) -> None:
        """Reset; with `say`, HELLO goes out by itself. A trial ends: that of a first model by a crash only."""
        self.hello = replace(self.hello, reset_cause=cause)
        crash = cause in (ResetCause.WATCHDOG, ResetCause.FAULT)
        if self.hello.trial is not None and (crash or self.hello.slots[0].state == SlotState.STORED):
            self.roll_back(Rollback.CRASH if crash else Rollback.RESET)
        self._restart(self.hello.boot_id + 1)
        if say:
            self.say(MessageType.HELLO, 0, self.hello.to_bytes())

    def _restart(self, boot_id: int) -> None:
        self.hello = replace(self.hello, boot_id=boot_id)
        self._decoder = FrameDecoder(self.hello.max_frame)
        self._reassembler = Reassembler(self.hello.max_message)
        self._peer_max_frame = MIN_MAX_FRAME
        self._seq = 0
        self._booted_at = -1.0
        self._waiting: OrderedDict[int, Infer] = OrderedDict()
        self._running: asyncio.TimerHandle | None = None
        self._remembered: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self._begin = None
        self._received = set()

    @property
    def _us(self) -> int:
        now = asyncio.get_running_loop().time()
        if self._booted_at < 0:
            self._booted_at = now
        return int((now - self._booted_at) * 1e6)

    def say(self, type_: int, id_: int, body: bytes, flags: int = 0) -> None:
        if type_ in self.mute:
            return
        line = b""
        for more, payload in split(body, self._peer_max_frame):
            line += Frame(type_, flags | more, self._seq & 0xFFFF, id_, payload).encode()
            self._seq += 1
        self._send(line)

    def log(self, text: str) -> None:
        self.say(MessageType.LOG, 0, Log(1, text).to_bytes())

    def refuse(self, id_: int, code: ErrorCode, text: str = "") -> None:
        self.say(MessageType.ERROR, id_, Error(code, text).to_bytes())

    def complete(self, id_: int, type_: int, body: bytes) -> None:
        self._remembered[id_] = (type_, body)
        while len(self._remembered) > self.hello.window:
            self._remembered.popitem(last=False)
        self.say(type_, id_, body)

    def receive(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            if isinstance(frame, Frame):
                self._on_frame(frame)

    def _on_frame(self, frame: Frame) -> None:
        body: bytes | None = frame.payload
        if frame.flags & FRAGMENT:
            try:
                body = self._reassembler.add(frame)
            except Exception:
                self.refuse(frame.id, ErrorCode.BAD_FRAGMENT)
                return
        if body is None:
            return
        self.seen.append(frame)
        if frame.flags & RETRY:
            if frame.id in self._waiting:
                return
            if frame.id in self._remembered:
                self.say(frame.id and self._remembered[frame.id][0], frame.id, self._remembered[frame.id][1])
                return
        handler = getattr(self, f"_on_{MessageType(frame.type).name.lower()}", None)
        if handler is None:
            self.refuse(frame.id, ErrorCode.UNKNOWN_TYPE)
        else:
            handler(frame.id, body)

    def _on_hello_req(self, id_: int, body: bytes) -> None:
        request = HelloReq.from_bytes(body)
        if request.major != self.hello.major:
            self.refuse(id_, ErrorCode.VERSION, f"{self.hello.major}.{self.hello.minor}")
            return
        self._peer_max_frame = request.max_frame
        self.say(MessageType.HELLO, id_, self.hello.to_bytes())

    def _on_ping(self, id_: int, body: bytes) -> None:
        self.say(MessageType.PONG, id_, Pong(self._us, self._us, body).to_bytes())

    def _on_stats_req(self, id_: int, body: bytes) -> None:
        self.complete(id_, MessageType.STATS, Stats(((1, self._us), (7, self.runs))).to_bytes())

    def _on_reset(self, id_: int, body: bytes) -> None:
        self.boot(ResetCause.SOFTWARE)

    def _on_infer(self, id_: int, body: bytes) -> None:
        request, active = Infer.from_bytes(body), self.hello.active
        if len(self._waiting) >= self.hello.window:
            self.refuse(id_, ErrorCode.BUSY)
        elif active is None:
            self.refuse(id_, ErrorCode.NO_MODEL)
        elif request.model != active.sha256[:8]:
            self.refuse(id_, ErrorCode.MODEL_MISMATCH)
        else:
            self._waiting[id_] = request
            self.most_open = max(self.most_open, len(self._waiting))
            self._run_next()

    def _run_next(self) -> None:
        if self._running is None and self._waiting:
            self._running = asyncio.get_running_loop().call_later(self.compute_s, self._ran, self._waiting)

    def _ran(self, waiting: OrderedDict[int, Infer]) -> None:
        if waiting is not self._waiting:
            return  # of an earlier boot
        self._running = None
        id_, request = self._waiting.popitem(last=False)
        self.runs += 1
        if self.fails:
            self.refuse(id_, ErrorCode.INVOKE, "an operator gave up")
            if self.hello.trial is not None:
                self.roll_back(Rollback.INVOKE)
                self.say(MessageType.HELLO, 0, self.hello.to_bytes())
            return
        result = Result(request.model, 10, int(self.compute_s * 1e6), self.model(request.inputs))
        self.complete(id_, MessageType.RESULT, result.to_bytes())
        self._run_next()

    def _on_cancel(self, id_: int, body: bytes) -> None:
        if id_ in self._waiting and next(iter(self._waiting)) != id_:
            del self._waiting[id_]
            self.refuse(id_, ErrorCode.CANCELLED)


class Line:
    """A transport to a `FakeMcu`, whole and at once. `sent` keeps what the gateway wrote."""

    def __init__(self, mcu: FakeMcu, name: str = "line") -> None:
        self.name = name
        self.mcu = mcu
        self.sent = bytearray()
        self.closed = False
        self.full = False
        self._loop = asyncio.get_running_loop()
        self._on_data: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[LinkError], None] | None = None
        mcu.attach(lambda data: self.carry(data, self._deliver))

    def start(self, on_data: Callable[[bytes], None], on_lost: Callable[[LinkError], None]) -> None:
        self._on_data, self._on_lost = on_data, on_lost

    def write(self, data: bytes) -> bool:
        if self.closed or self.full:
            return False
        self.sent += data
        self.carry(bytes(data), self.mcu.receive)
        return True

    def close(self) -> None:
        self.closed = True
        self._on_data = self._on_lost = None

    def unplug(self, reason: str = "unplugged: test") -> None:
        lost = self._on_lost
        self.close()
        if lost is not None:
            lost(LinkError(f"{self.name}: {reason}"))

    def carry(self, data: bytes, deliver: Callable[[bytes], None]) -> None:
        self._loop.call_soon(deliver, data)

    def _deliver(self, data: bytes) -> None:
        if self._on_data is not None:
            self._on_data(data)


class ByteByByte(Line):
    def carry(self, data: bytes, deliver: Callable[[bytes], None]) -> None:
        for at in range(len(data)):
            self._loop.call_soon(deliver, data[at : at + 1])


class Lossy(Line):
    """One frame in five is lost, either way."""

    share = 0.2

    def __init__(self, mcu: FakeMcu, name: str = "line") -> None:
        super().__init__(mcu, name)
        self._rng = random.Random(11)

    def carry(self, data: bytes, deliver: Callable[[bytes], None]) -> None:
        for frame in data.split(b"\0")[:-1]:
            if self._rng.random() >= self.share:
                self._loop.call_soon(deliver, frame + b"\0")


class Delayed(Line):
    """80 ms each way. Timers of one moment fire in any order; a line keeps its own."""

    delay_s = 0.08

    def __init__(self, mcu: FakeMcu, name: str = "line") -> None:
        super().__init__(mcu, name)
        self._under_way: deque[tuple[Callable[[bytes], None], bytes]] = deque()

    def carry(self, data: bytes, deliver: Callable[[bytes], None]) -> None:
        self._under_way.append((deliver, data))
        self._loop.call_later(self.delay_s, self._arrive)

    def _arrive(self) -> None:
        deliver, data = self._under_way.popleft()
        deliver(data)


LINES = [Line, ByteByByte, Lossy, Delayed]


def soon(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def opened(mcu: FakeMcu, kind: type[Line] = Line, **options: object) -> tuple[Session, Line]:
    line = kind(mcu)
    session = Session(line, LoopClock(), **options)  # type: ignore[arg-type]
    await session.open(soon(60))
    return session, line


async def pass_time(seconds: float) -> None:
    """Virtual time only."""
    await asyncio.sleep(seconds)


def assert_clean(session: Session) -> None:
    assert session.pending_calls == 0
    assert session.open_requests == 0
