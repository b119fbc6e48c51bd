"""One MQTT 5 connection from CONNECT to its end: paho-mqtt's codec and socket, driven by the event loop itself.

There is no paho thread: a hop between threads costs more than coding a message does. Only what blocks (name look-up,
TCP connect, TLS handshake) happens in a thread, before the loop takes the socket. A connection is used once;
`link.mqtt` opens the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.core.clock import Clock
from agent.core.errors import LinkError
from agent.link.mqtt_client import (
    LinkFull,
    LinkOptions,
    Message,
    MessageTooLarge,
    Packed,
    PahoClient,
    tls_context,
    tls_failure,
)
from agent.wire.mqtt_properties import MessageProperties

log = logging.getLogger(__name__)

HEADER_ROOM = 16
"""Bytes of a PUBLISH packet besides topic, properties and payload, rounded up."""
_QUICKACK: int = getattr(socket, "TCP_QUICKACK", 0)
SILENT_INTERVALS = 1.5
"""Keep-alive intervals without a word from the broker: as many as MQTT has a broker wait for a client (3.1.2.10)."""
SECOND_LOOK_S = 0.05
READS_IN_A_ROW = 64
"""Packets handled before other work of the loop has its turn."""

UNSPECIFIED = 0x80
"""What paho makes of a connection that ended without a DISCONNECT."""
PERMANENT = frozenset({0x81, 0x82, 0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x8E, 0x90, 0x95, 0x9C, 0x9D})
"""Reason codes after which the same CONNECT would fail again, or (0x8E) another client has taken this client's name."""


class MqttConnection:
    """One connection. Belongs to the loop that `open` was awaited in; not thread-safe."""

    def __init__(self, options: LinkOptions, on_message: Callable[[Message], None], clock: Clock) -> None:
        self.options = options
        self.on_message = on_message
        self.clock = clock
        self.window = options.max_unacknowledged
        self.max_packet_bytes = 268_435_455
        self.peer_certificate: Mapping[str, Any] | None = None
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[LinkError] = self._loop.create_future()
        """Done when the connection has ended, with the reason."""
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._grants: dict[int, asyncio.Future[int]] = {}
        self._unacknowledged: dict[int, Callable[[int | LinkError], None] | None] = {}
        self._backlog_bytes = 0
        self._sent = 0
        """Of `PahoClient.sent`, when the backlog was counted last."""
        self._fd = -1
        self._sock: Any = None
        self._writing = False
        self._corked = False
        self._timer: asyncio.TimerHandle | None = None
        self._client = self._prepare()

    def _prepare(self) -> PahoClient:
        options = self.options
        client = PahoClient(
            options.client_id, self.clock, self.on_message, self.acknowledge, manual=options.manual_acknowledgement
        )
        client.max_inflight_messages = 0  # no queue in paho: `publish` refuses instead
        client.connect_timeout = options.connect_timeout_s
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_granted
        client.on_unsubscribe = self._on_granted
        client.on_socket_close = lambda *_: self._detach()
        client.on_socket_register_write = lambda *_: self._want_write()
        if options.username is not None:
            client.username_pw_set(options.username, options.password)
        if options.will is not None:
            will = options.will
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        return client

    # --- opening -------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Return when the broker has accepted the connection. Raises `LinkError`; the caller then calls `abort`."""
        try:
            async with asyncio.timeout(self.options.connect_timeout_s):
                await self._connect_in_thread()
                self._attach()
                await self._accepted
        except TimeoutError:
            step = "the broker" if self._fd < 0 else "the broker accepts TCP connections but"
            raise LinkError(f"{step} did not answer within {self.options.connect_timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise tls_failure(error) from None
        except OSError as error:
            raise LinkError(f"cannot connect: {error.strerror or error}") from None

    async def _connect_in_thread(self) -> None:
        opened: asyncio.Future[None] = self._loop.create_future()

        def finish(error: Exception | None) -> None:
            if opened.cancelled():  # too late: nobody waits for it any more
                self._close_socket()
            elif error is None:
                opened.set_result(None)
            else:
                opened.set_exception(error)

        def connect() -> None:
            failure: Exception | None = None
            try:
                self._connect_blocking()
            except Exception as error:  # handed over to the loop as it is
                failure = error
            try:
                self._loop.call_soon_threadsafe(finish, failure)
            except RuntimeError:  # the loop has been closed meanwhile
                self._close_socket()

        # Not the loop's executor: that one is waited for at shutdown, and a name look-up can block for a minute.
        threading.Thread(target=connect, name="mqtt-connect", daemon=True).start()
        await opened

    def _connect_blocking(self) -> None:
        options, url = self.options, urlsplit(self.options.broker)
        if url.scheme == "mqtts":
            self._client.tls_set_context(tls_context(options))
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = options.session_expiry_s
        properties.ReceiveMaximum = options.receive_maximum
        properties.MaximumPacketSize = options.max_packet_bytes
        self._client.connect(
            str(url.hostname),
            url.port or (8883 if url.scheme == "mqtts" else 1883),
            options.keepalive_s,
            clean_start=options.session_expiry_s == 0,
            properties=properties,
        )

    def _attach(self) -> None:
        sock: Any = self._client.socket()
        if sock is None:
            raise LinkError("the connection was closed at once")
        # Nagle's algorithm holds a PUBACK and the next PUBLISH back until the peer's delayed ACK: 40 ms each.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self.options.keepalive_s * 1000)
        self._sock, self._fd = sock, sock.fileno()
        if isinstance(sock, ssl.SSLSocket):
            self.peer_certificate = sock.getpeercert()
        self._loop.add_reader(self._fd, self._readable)
        self._tick()
        self._flush()

    def _on_connect(self, _client: object, _data: object, _flags: object, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            code = int(reason.value)
            self._fail(LinkError(f"the broker refused the connection: {reason}", permanent=code in PERMANENT))
            return
        self.window = min(self.window, getattr(properties, "ReceiveMaximum", 65_535))
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", self.max_packet_bytes)
        if not self._accepted.done():
            self._accepted.set_result(None)

    # --- the loop's callbacks ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        client, self._corked = self._client, True
        try:
            for _ in range(READS_IN_A_ROW):
                client.loop_read()
                # What TLS has decrypted already does not make the descriptor readable.
                if self._fd < 0 or not isinstance(self._sock, ssl.SSLSocket) or not self._sock.pending():
                    break
            else:
                self._loop.call_soon(self._readable)
        except Exception as error:  # whatever the bytes of the broker made paho raise
            self._fail(LinkError(f"the broker sent something unusable: {error}"))
            return
        finally:
            self._corked = False
        if _QUICKACK and self._fd >= 0:
            # A broker without TCP_NODELAY keeps its next packet until this one is acknowledged. Not sticky: tcp(7).
            self._sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        self._flush()

    def _flush(self) -> None:
        """Hand to the socket what is queued; have the loop call again if it does not take everything."""
        if self._fd < 0:
            return
        try:
            if self._client.want_write():
                self._client.loop_write()
        except Exception as error:
            self._fail(LinkError(f"cannot write to the broker: {error}"))
            return
        if self._fd < 0:
            return
        if not self._client.want_write():
            self._backlog_bytes = 0
            if self._writing:
                self._loop.remove_writer(self._fd)
                self._writing = False
        elif not self._writing:
            self._loop.add_writer(self._fd, self._flush)
            self._writing = True

    def _want_write(self) -> None:
        if self._fd >= 0 and not self._corked and not self._writing:
            self._loop.call_soon(self._flush)

    def _tick(self) -> None:
        """Keep-alive. A quarter of it, so that a PINGREQ is never late by half an interval."""
        if self._fd < 0:
            return
        if self._is_silent():  # or this process was: then what came meanwhile is read before the second look
            self._timer = self._loop.call_later(SECOND_LOOK_S, self._look_again)
            return
        self._timer = self._loop.call_later(min(1.0, self.options.keepalive_s / 4), self._tick)
        self._client.loop_misc()

    def _is_silent(self) -> bool:
        """Whether not even the answer to a PINGREQ came, which is sent after one interval without traffic."""
        silent_s = self.clock.monotonic() - self._client.heard
        return self._accepted.done() and silent_s > SILENT_INTERVALS * self.options.keepalive_s

    def _look_again(self) -> None:
        if self._is_silent():
            silent_s = self.clock.monotonic() - self._client.heard
            self._fail(LinkError(f"nothing came from the broker for {silent_s:.1f} s, not even an answer to a PINGREQ"))
        else:
            self._tick()

    def _on_disconnect(self, _client: object, _data: object, flags: Any, reason: Any, _properties: object) -> None:
        code = int(reason.value)
        if flags.is_disconnect_packet_from_server:
            self._fail(LinkError(f"the broker closed the connection: {reason}", permanent=code in PERMANENT))
        elif code == 0:
            self._fail(LinkError("disconnected"))
        elif self._client.tls_alert is not None:
            self._fail(tls_failure(self._client.tls_alert))
        elif code == UNSPECIFIED:
            self._fail(LinkError("the connection was lost: the broker closed it, or the network did, without a reason"))
        else:
            self._fail(LinkError(f"the connection was lost: {reason}"))

    # --- messages ------------------------------------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        properties: MessageProperties | None,
        acknowledged: Callable[[int | LinkError], None] | None,
    ) -> None:
        """Send now. `acknowledged` (QoS 1) gets the PUBACK's reason code, or the error that ended the connection."""
        if self.lost.done():
            raise self.lost.result()
        packed = b"\x00" if properties is None else properties.to_bytes()
        size = HEADER_ROOM + len(topic) * 4 + len(packed) + len(payload)
        if size > self.max_packet_bytes:
            raise MessageTooLarge(f"a message of {size} bytes is more than the broker takes ({self.max_packet_bytes})")
        if qos and len(self._unacknowledged) >= self.window:
            raise LinkFull(f"{self.window} messages await the broker's acknowledgement")
        if self._is_full(size):
            raise LinkFull(f"{self._backlog_bytes} bytes wait for the broker to read them")
        corked, self._corked = self._corked, True
        try:
            info = self._client.publish(topic, payload, qos, retain, Packed(packed))
        finally:
            self._corked = corked
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise LinkError(f"cannot publish: {paho.error_string(info.rc)}")
        if qos:
            self._unacknowledged[info.mid] = acknowledged
        self._backlog_bytes += size
        if not self._corked and not self._writing:
            self._flush()

    def _is_full(self, size: int) -> bool:
        """Whether there is no room for `size` bytes more. On a line that is never idle most of what was handed over
        has been sent: then it is counted anew."""
        limit = self.options.max_backlog_bytes
        if self._backlog_bytes + size > limit and self._client.sent != self._sent:
            self._sent, self._backlog_bytes = self._client.sent, self._client.queued_bytes
        return self._backlog_bytes > 0 and self._backlog_bytes + size > limit

    def acknowledge(self, mid: int, reason_code: int) -> None:
        """Called by the client for each PUBACK."""
        callback = self._unacknowledged.pop(mid, None)
        if callback is not None:
            callback(reason_code)

    async def subscribe(self, topic_filter: str, qos: int, no_local: bool) -> int:
        """The SUBACK's reason code: the granted QoS, or 0x80 and above if refused. Raises `LinkError`."""
        options = SubscribeOptions(qos=qos, noLocal=no_local)
        return await self._grant(*self._client.subscribe(topic_filter, options=options))

    async def unsubscribe(self, topic_filter: str) -> int:
        """The UNSUBACK's reason code. Nothing that matched only this filter arrives after it. Raises `LinkError`."""
        return await self._grant(*self._client.unsubscribe(topic_filter))

    async def _grant(self, rc: MQTTErrorCode, mid: int | None) -> int:
        if rc != paho.MQTT_ERR_SUCCESS or mid is None:
            raise LinkError(f"cannot subscribe: {paho.error_string(rc)}")
        granted = self._grants[mid] = self._loop.create_future()
        self._flush()
        try:
            async with asyncio.timeout(self.options.connect_timeout_s):
                reason_code: int = await granted
                return reason_code
        except TimeoutError:
            raise LinkError(f"no SUBACK within {self.options.connect_timeout_s:g} s") from None
        finally:
            self._grants.pop(mid, None)

    def _on_granted(self, _client: object, _data: object, mid: int, reasons: Any, _properties: object) -> None:
        granted = self._grants.get(mid)
        if granted is not None and not granted.done():
            granted.set_result(max((int(reason.value) for reason in reasons), default=0))

    # --- the end -------------------------------------------------------------------------------------------------

    async def close(self, grace_s: float = 1.0) -> None:
        """Say goodbye, so that the broker drops the will, and close. Bounded by `grace_s`."""
        if not self.lost.done() and self._fd >= 0:
            self._client.disconnect()
            self._flush()
            await asyncio.wait([self.lost], timeout=grace_s)
        self.abort()

    def abort(self) -> None:
        """Close without a goodbye. May be called at any time, and again."""
        self._fail(LinkError("disconnected"))

    def _fail(self, error: LinkError) -> None:
        """End the connection: the first error is the one that everybody who waits is told."""
        self._detach()
        if not self.lost.done():
            self.lost.set_result(error)
        error = self.lost.result()
        waiters: list[asyncio.Future[Any]] = [*self._grants.values(), self._accepted]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # somebody may have stopped waiting
        waiting, self._unacknowledged = self._unacknowledged, {}
        for callback in waiting.values():
            if callback is not None:
                callback(error)
        self._close_socket()

    def _detach(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._fd, self._writing = -1, False
        if self._timer is not None:
            self._timer.cancel()

    def _close_socket(self) -> None:
        sock: Any = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()
