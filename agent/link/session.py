"""One conversation with one microcontroller over one opened line (docs/wire-protocol.md, sections 2 and 3).

A `Session` is used once: when its line is lost, or its peer stops making sense, it fails every open call with the first
fatal error and stays failed. Opening a new line is the owner's work.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, TypeVar

from agent.core.clock import Clock
from agent.core.errors import LinkError, ProtocolError
from agent.link.calls import Call, Counters, Incoming, Pinged, RemoteError, Reply, Typical, again, overtaken
from agent.link.inbox import MAX_FRAME, Inbox
from agent.link.timesync import ClockSync
from agent.link.transport import Transport
from agent.link.window import Window
from agent.wire.body import Message
from agent.wire.codes import PROTOCOL_MAJOR, PROTOCOL_MINOR, ErrorCode, MessageType, name_of
from agent.wire.fragments import split
from agent.wire.frame import MIN_MAX_FRAME, OVERHEAD, RETRY, Frame
from agent.wire.messages import Cancel, Error, Hello, HelloReq, Infer, Log, Ping, Pong, Reset, Result, Stats, StatsReq

FIRST_GREETING_S: Final = 0.3
"""Wait for the first HELLO, doubled for each further one: 300 bytes take 26 ms at 115,200 baud."""
LONGEST_GREETING_S: Final = 1.2
"""Up to this: a greeting that the line lost is not waited for until the deadline."""
REGREETING_S: Final = 5.0
"""How long an MCU may take to answer HELLO_REQ after it has been reset under our hands."""
LINGER_S: Final = 0.5
"""How long an abandoned request keeps its place in the window: a cancelled run of a small model is over by then."""
PATIENCE_S: Final = 1.0
"""First wait for an answer until a request is repeated, doubled for each further one: more than a flash sector takes to
be erased and written. Half of the time that the request has, where that is less."""
RESET_POLL_S: Final = 1.0
"""When the HELLO of a reset MCU is overdue and it is asked for one."""
PING_OVERHEAD: Final = 28
"""Bytes of the largest frame that a PONG needs for itself."""
_TYPES: Final = frozenset(int(one) for one in MessageType)
"""Of this version. A later minor one may send others, under an open id as well; they answer nothing."""
HELLO_REQ: Final = HelloReq(PROTOCOL_MAJOR, PROTOCOL_MINOR, MAX_FRAME)

M = TypeVar("M", bound=Message)

Listener = Callable[[Incoming | LinkError, float], None]
"""Called on the loop with what comes under an id after its answer, or with the error that ends it, and with the time.
Must not raise."""


class Session:
    """`max_in_flight` may lower the window that the MCU announces.

    `on_hello` is called with each HELLO that differs from the one before, `on_log` with each LOG line: on the loop,
    and they must not raise. Deadlines are seconds of `clock.monotonic()`.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        *,
        max_in_flight: int | None = None,
        on_hello: Callable[[Hello], None] = lambda hello: None,
        on_log: Callable[[Log], None] = lambda log: None,
    ) -> None:
        self.counters = Counters()
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._on_hello = on_hello
        self._on_log = on_log
        self._inbox = Inbox(self.counters)
        self._window = Window(1)
        self._listeners: dict[int, Listener] = {}
        self.clock_sync = ClockSync()
        self._calls: dict[int, Call] = {}  # in the order of their last sending
        self._abandoned: dict[int, asyncio.TimerHandle] = {}
        self._peer_max_frame = MIN_MAX_FRAME
        self._hello: Hello | None = None
        self._seq = 0
        # Not from 1: a board that was not reset still holds answers to the ids of the session before.
        self._last_id = random.getrandbits(32)
        self._typical = Typical()
        self._greeting: asyncio.Task[None] | None = None
        self._rebooted = asyncio.Event()
        self._mcu_us = 0
        self._error: LinkError | None = None
        self._lost: asyncio.Future[LinkError] = self._loop.create_future()
        self.last_received = clock.monotonic()

    @property
    def hello(self) -> Hello:
        """The newest HELLO. Only after `open` returned."""
        assert self._hello is not None, "the session was not opened"
        return self._hello

    @property
    def error(self) -> LinkError | None:
        """The first fatal error; None while the session is of use."""
        return self._error

    @property
    def open_requests(self) -> int:
        """Places of the window that are taken or waited for."""
        return self._window.used + self._window.waiting

    @property
    def pending_calls(self) -> int:
        """Calls that wait for an answer."""
        return len(self._calls)

    @property
    def window(self) -> int:
        """How many requests may be open now."""
        return min(self.hello.window, self._max_in_flight or self.hello.window)

    def status(self) -> dict[str, int]:
        """All counters by name."""
        return {**self.counters.as_dict(), **self._inbox.faults()}

    async def open(self, deadline: float) -> Hello:
        """Greet the MCU; asks again while the deadline allows.

        Raises `LinkError` (`permanent` if it speaks another major version), or `ProtocolError` if its HELLO is broken.
        """
        self._transport.start(self._on_data, self._fail)
        return await self._greet(deadline)

    async def refresh(self, deadline: float) -> Hello:
        """Ask for HELLO again: which model is active may have changed. Raises as `open`."""
        return await self._greet(deadline)

    async def wait_lost(self) -> LinkError:
        """The first fatal error, when there is one."""
        return await asyncio.shield(self._lost)

    async def infer(self, model: bytes, inputs: bytes, deadline: float) -> Reply[Result]:
        """Run the active model; `model` is the first 8 bytes of the SHA-256 that it must have. Raises as `request`."""
        return await self.request(lambda: Infer(model, self._budget_ms(deadline), inputs), Result, deadline)

    async def ping(self, data: bytes, deadline: float) -> Pinged:
        """Round trip and offset of the MCU's clock. Raises as `request`, and `ProtocolError` on a different echo."""
        hello = self._hello
        reply = await self.request(Ping(data), Pong, deadline, windowed=False, repeat=False)
        pong = reply.message
        if pong.data != data:
            raise ProtocolError(f"{self._transport.name}: PONG carries other bytes than its PING")
        if hello is not None and self._hello is not None and hello.boot_id != self._hello.boot_id:
            raise LinkError(f"{self._transport.name}: the MCU was reset")  # behind this PONG, in the same read
        if pong.t_tx < self._mcu_us:
            self._greet_again()  # its clock went back: it was reset, and the HELLO that says so was lost
        self._mcu_us = pong.t_tx
        offset_s = (pong.t_rx / 1e6 - reply.sent_at + pong.t_tx / 1e6 - reply.received_at) / 2
        pinged = Pinged(reply.round_trip_s, offset_s, (pong.t_tx - pong.t_rx) / 1e6)
        self.clock_sync.note((reply.sent_at + reply.received_at) / 2, offset_s, pinged.round_trip_s - pinged.mcu_s)
        return pinged

    async def stats(self, deadline: float) -> Stats:
        """The MCU's own counters. Raises as `request`."""
        return (await self.request(StatsReq(), Stats, deadline)).message

    async def reset(self, deadline: float) -> Hello:
        """Restart the MCU and wait until it is back. Raises `LinkError`, also if the line goes with the MCU."""
        self._check()
        self._rebooted.clear()
        while not self._rebooted.is_set():
            self._send(Reset.TYPE, 0, self._take_id(), b"")
            try:
                async with asyncio.timeout_at(self._loop_time(min(deadline, self._clock.monotonic() + RESET_POLL_S))):
                    await self._rebooted.wait()
            except TimeoutError:
                # Whether it restarted unheard or never got the RESET is known when it answers; only then send another.
                await self._greet(deadline)
        return await self._greet(deadline)

    async def request(
        self,
        message: Message | Callable[[], Message],
        answer: type[M],
        deadline: float,
        *,
        windowed: bool = True,
        repeat: bool = True,
        listener: Listener | None = None,
    ) -> Reply[M]:
        """Send one request and wait for its answer. `repeat`: it may be sent again; the MCU runs it once. `listener`
        hears what follows under the same id, until `forget_listener`, a reset or the end of the session.

        A message that depends on the time is given as a function. Raises `TimeoutError` at the deadline, `RemoteError`
        (the MCU refused), `LinkError` (line lost, MCU reset, no room to send), `ProtocolError` (a senseless answer).
        """
        make = message if callable(message) else lambda: message
        try:
            return await self._exchange(make, answer, deadline, windowed, repeat, listener)
        except RemoteError as error:
            if error.code != ErrorCode.BAD_FRAGMENT or not repeat:
                raise
        self.counters.repeats += 1
        return await self._exchange(make, answer, deadline, windowed, repeat, listener)

    def tell(self, message: Message) -> None:
        """Send what has no answer; lost without a word if the line has no room."""
        self._send(message.TYPE, 0, 0, message.to_bytes())

    def forget_listener(self, listener: Listener) -> None:
        """It hears nothing more."""
        self._listeners = {id_: other for id_, other in self._listeners.items() if other != listener}

    def close(self) -> None:
        """Release the line; open calls fail. May be called twice."""
        self._fail(LinkError(f"{self._transport.name}: closed"))

    async def _exchange(
        self,
        make: Callable[[], Message],
        answer: type[M],
        deadline: float,
        windowed: bool,
        repeat: bool,
        listener: Listener | None = None,
    ) -> Reply[M]:
        self._check()
        if windowed and not self._window.try_enter():
            try:
                async with asyncio.timeout_at(self._loop_time(deadline)):
                    await self._window.enter()
            except TimeoutError:
                raise TimeoutError(f"{self._transport.name}: its window of {self.window} stayed full") from None
        call = Call(self._take_id(), make, deadline, windowed, repeat, self._loop.create_future())
        self._calls[call.id] = call
        if listener is not None:
            self._listeners[call.id] = listener
        try:
            return await self._answer_to(call, answer)
        except BaseException:
            self._listeners.pop(call.id, None)
            raise

    async def _answer_to(self, call: Call, answer: type[M]) -> Reply[M]:
        try:
            self._begin(call)
            answered = await call.future
        finally:
            self._end(call)
        if not call.repeated:
            self._typical.note(call.type, call.received_at - call.sent_at)
        if answered.type == MessageType.ERROR:
            raise RemoteError(self._transport.name, Error.from_bytes(answered.body))
        if answered.type != answer.TYPE:
            raise ProtocolError(f"{self._transport.name}: {call.type.name} was answered with type {answered.type:#04x}")
        return Reply(
            answer.from_bytes(answered.body), call.sent_at, call.received_at, call.bytes_sent, answered.line_bytes
        )

    def _begin(self, call: Call) -> None:
        message = call.make()
        body = message.to_bytes()
        call.type, call.sent_at = message.TYPE, self._clock.monotonic()
        if call.sent_at >= call.deadline:
            raise TimeoutError(f"{self._transport.name}: no time left for {call.type.name}")
        if self._hello is not None and len(body) > max(self._hello.max_message, self._peer_max_frame - OVERHEAD):
            text = f"body of {len(body)} bytes; the MCU takes {self._hello.max_message}"
            raise RemoteError(self._transport.name, Error(ErrorCode.TOO_LARGE, text))
        call.settled = False
        call.bytes_sent = self._send(call.type, 0, call.id, body)
        left_s = call.deadline - call.sent_at
        call.patience_s = min(left_s / 2, max(PATIENCE_S, 2 * self._typical.of(call.type))) if call.repeat else left_s
        call.timer = self._loop.call_later(call.patience_s, self._overdue, call)
        if not call.bytes_sent:
            call.fail(again(self._error or LinkError(f"{self._transport.name}: stalled: its write buffer is full")))

    def _overdue(self, call: Call) -> None:
        """It has waited for long, or for all of its time."""
        left_s = call.deadline - self._clock.monotonic()
        if call.repeat and left_s > 0:
            call.patience_s *= 2
            call.timer = self._loop.call_later(min(call.patience_s, left_s), self._overdue, call)
            self._repeat(call, left_s)
        elif not call.future.done():
            self.counters.timeouts += 1
            call.future.set_exception(TimeoutError(f"{self._transport.name}: no answer to {call.type.name} in time"))

    def _repeat(self, call: Call, left_s: float) -> None:
        call.repeated = True
        if left_s >= self._typical.of(call.type):
            self.counters.repeats += 1
            self._calls[call.id] = self._calls.pop(call.id)  # now the last that was sent
            call.bytes_sent += self._send(call.type, RETRY, call.id, call.make().to_bytes())

    def _end(self, call: Call) -> None:
        del self._calls[call.id]
        call.discard()
        if call.windowed and call.settled:
            self._window.leave()
        elif call.windowed:
            # The MCU may still hold it: its place is free when the late answer comes, or none is to be expected.
            self.counters.cancels += 1
            self._abandoned[call.id] = self._loop.call_later(LINGER_S, self._release, call.id)
            self._send(Cancel.TYPE, 0, call.id, b"")

    def _release(self, id_: int) -> None:
        self._abandoned.pop(id_).cancel()
        self._window.leave()

    async def _greet(self, deadline: float) -> Hello:
        wait_s = FIRST_GREETING_S
        self._transport.write(b"\0")
        while True:
            until = min(deadline, self._clock.monotonic() + wait_s)
            try:
                return (await self._exchange(lambda: HELLO_REQ, Hello, until, False, False)).message
            except TimeoutError:
                if until >= deadline:
                    raise LinkError(f"{self._transport.name}: {self._inbox.silence()}") from None
                wait_s = min(2 * wait_s, LONGEST_GREETING_S)
            except RemoteError as error:
                raise LinkError(str(error), permanent=error.code == ErrorCode.VERSION) from None

    def _greet_again(self) -> None:
        if self._greeting is None or self._greeting.done():
            self._greeting = self._loop.create_task(self._regreet())

    async def _regreet(self) -> None:
        try:
            await self._greet(self._clock.monotonic() + REGREETING_S)
        except (LinkError, ProtocolError) as error:
            self._fail(error if isinstance(error, LinkError) else LinkError(f"{self._transport.name}: {error}"))

    def _send(self, type_: int, flags: int, id_: int, body: bytes) -> int:
        """Returns bytes written; 0 if there is no room for all of them, or the line is lost."""
        frames = [
            Frame(type_, flags | more, (self._seq + index) & 0xFFFF, id_, payload).encode()
            for index, (more, payload) in enumerate(split(body, self._peer_max_frame))
        ]
        data = b"".join(frames)
        if self._error is not None or not self._transport.write(data):
            return 0
        self._seq += len(frames)
        self.counters.frames_sent += len(frames)
        self.counters.bytes_sent += len(data)
        return len(data)

    def _on_data(self, data: bytes) -> None:
        now = self._clock.monotonic()
        for message in self._inbox.feed(data):
            self.last_received = now
            try:
                self._notice(message)
            except ProtocolError:
                self.counters.malformed += 1
            if message.id and message.type in _TYPES:
                self._deliver(message)

    def _notice(self, message: Incoming) -> None:
        """What concerns the session, whether or not somebody waits for it."""
        if message.type == MessageType.HELLO:
            self._on_hello_body(message.body, message.id)
        elif message.type == MessageType.LOG:
            self._on_log(Log.from_bytes(message.body))
        elif message.id == 0 or message.type not in _TYPES:
            self.counters.unknown += 1

    def _deliver(self, message: Incoming) -> None:
        call, listener = self._calls.get(message.id), self._listeners.get(message.id)
        answered = call is None or call.future.done()  # its waiter may not have run yet
        if listener is not None and (answered or message.type == MessageType.STREAM_RESULT):
            listener(message, self.last_received)
        elif call is not None:
            for lost in overtaken(self._calls, call, message.type):
                self._repeat(lost, lost.deadline - self.last_received)
            call.answer(message, self.last_received)
        else:
            self.counters.late += 1
            if message.id in self._abandoned:
                self._release(message.id)

    def _on_hello_body(self, body: bytes, id_: int) -> None:
        if body and body[0] != PROTOCOL_MAJOR:
            text = f"{self._transport.name}: firmware speaks protocol {body[0]}.x, this gateway {PROTOCOL_MAJOR}.x"
            self._fail(LinkError(text, permanent=True))
            return
        hello, before = Hello.from_bytes(body), self._hello
        reset = before is not None and before.boot_id != hello.boot_id
        if reset:
            self._forget(LinkError(f"{self._transport.name}: the MCU was reset ({name_of(hello.reset_cause)})"))
        self._hello = hello
        if id_:
            self._peer_max_frame = hello.max_frame
        elif reset:
            self._peer_max_frame = MIN_MAX_FRAME  # until it was greeted
        self._window.resize(self.window)
        if hello != before:
            self._on_hello(hello)
        if reset:
            self.counters.resets += 1
            self._rebooted.set()
            if id_ == 0:
                self._greet_again()

    def _forget(self, error: LinkError) -> None:
        """The MCU holds nothing of ours any more."""
        for call in self._calls.values():
            if call.type != MessageType.HELLO_REQ:
                call.fail(again(error))
        self._window.fail(lambda: again(error))
        for id_ in list(self._abandoned):
            self._release(id_)
        for listener in self._listeners.values():
            listener(error, self._clock.monotonic())
        self._listeners.clear()
        self._inbox.clear()
        self.clock_sync.clear()
        self._mcu_us = 0

    def _fail(self, error: LinkError) -> None:
        """The first fatal error wins."""
        if self._error is not None:
            return
        self._error = error
        self._transport.close()
        self._forget(error)
        for call in self._calls.values():
            call.fail(again(error))
        if self._greeting is not None and self._greeting is not asyncio.current_task():
            self._greeting.cancel()
        self._lost.set_result(error)

    def _check(self) -> None:
        if self._error is not None:
            raise again(self._error)

    def _take_id(self) -> int:
        """1 up, without 0 and those that are open."""
        while True:
            self._last_id = self._last_id % 0xFFFFFFFF + 1
            if not any(self._last_id in held for held in (self._calls, self._abandoned, self._listeners)):
                return self._last_id

    def _budget_ms(self, deadline: float) -> int:
        """At least 1: 0 means no deadline."""
        return min(max(1, int((deadline - self._clock.monotonic()) * 1e3)), 0xFFFFFFFF)

    def _loop_time(self, monotonic: float) -> float:
        return self._loop.time() + monotonic - self._clock.monotonic()
