"""What a connection to a broker is made of: its settings, its messages, and paho-mqtt's client with two short cuts."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.config import BrokerSection
from agent.core.clock import Clock
from agent.core.errors import LinkError, ProtocolError
from agent.wire.mqtt_properties import MessageProperties

for _name in ("_handle_publish", "_handle_pubackcomp", "_do_on_publish", "_sock_recv", "_sock_send"):
    if not hasattr(paho.Client, _name):
        raise ImportError(f"this paho-mqtt has no Client.{_name}: use one of the versions edge-agent depends on")


class LinkFull(LinkError):
    """Connected, but as much is on its way as may be."""


class MessageTooLarge(LinkError):
    """The broker takes no message of this size, now or later."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message from the broker. `received` is monotonic seconds, taken before anything else is done with it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: MessageProperties
    received: float
    mid: int = 0
    """Packet identifier of QoS 1; a message that is sent again in the same session has it again."""
    again: bool = False
    """The broker has sent it before, and does not know whether that arrived."""
    acknowledge: Callable[[], None] | None = None
    """With `LinkOptions.manual_acknowledgement`: sends the PUBACK, which is then owed by who was called."""


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes if this client vanishes without a goodbye."""

    topic: str
    payload: bytes = b""
    qos: int = 1
    retain: bool = True


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How to reach a broker. Every bound has a default that suits a gateway."""

    broker: str
    """`mqtt://host[:port]` or `mqtts://host[:port]`."""
    client_id: str
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    keepalive_s: int = 15
    session_expiry_s: int = 0
    """How long the broker keeps the session, and with it queued messages, after the connection is lost."""
    receive_maximum: int = 1024
    """QoS 1 messages that the broker may send before they are acknowledged."""
    max_unacknowledged: int = 256
    """Own QoS 1 messages on their way; the broker's Receive Maximum may lower it."""
    max_backlog_bytes: int = 8 << 20
    """Bytes accepted for sending while the socket takes none."""
    max_packet_bytes: int = 4 << 20
    """The largest packet the broker may send (MQTT 5 Maximum Packet Size)."""
    connect_timeout_s: float = 10.0
    """For name look-up, TCP, TLS and CONNACK together, and for the subscriptions after them."""
    backoff_initial_s: float = 0.5
    backoff_max_s: float = 60.0
    will: Will | None = None
    manual_acknowledgement: bool = False
    """QoS 1 messages are acknowledged by who takes them, not when the callback returns."""


def link_options(section: BrokerSection, client_id: str, **settings: Any) -> LinkOptions:
    """The options for a broker of the configuration; `settings` are the other fields of `LinkOptions`."""
    return LinkOptions(
        broker=section.broker,
        client_id=client_id,
        username=section.username,
        password=None if section.password is None else section.password.get_secret_value(),
        ca_file=section.ca_file,
        cert_file=section.cert_file,
        key_file=section.key_file,
        **settings,
    )


_UNUSED_REASON = ReasonCode(PacketTypes.PUBACK)
_UNUSED_PROPERTIES = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]


class PahoClient(paho.Client):
    """paho's client with two short cuts. Its own property codec takes several times what the rest of a message does,
    so PUBLISH and PUBACK are decoded here."""

    def __init__(
        self,
        client_id: str,
        clock: Clock,
        deliver: Callable[[Message], None],
        acknowledge: Callable[[int, int], None],
        *,
        manual: bool = False,
    ) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._clock = clock
        self._deliver = deliver
        self._acknowledge = acknowledge
        self._manual = manual
        self.heard = clock.monotonic()
        """When the last bytes came from the broker."""
        self.sent = 0
        """Bytes that the socket took."""
        self.tls_alert: ssl.SSLError | None = None
        """What the broker's TLS said before it closed: with TLS 1.3 it refuses a client's certificate only after the
        client has finished its own part of the handshake."""

    def _sock_recv(self, bufsize: int) -> bytes:
        try:
            data = super()._sock_recv(bufsize)
        except ssl.SSLError as error:
            self.tls_alert = error
            raise
        self.heard = self._clock.monotonic()
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            taken = super()._sock_send(buf)
        except OSError as error:
            if not isinstance(error, BlockingIOError) and isinstance(self._sock, ssl.SSLSocket):
                # Closed already. Why may still be there to be read.
                with contextlib.suppress(OSError):
                    self._sock_recv(1)
            raise
        self.sent += taken
        return taken

    @property
    def queued_bytes(self) -> int:
        """What the socket has not taken yet."""
        return sum(packet["to_process"] for packet in self._out_packet)

    def _handle_publish(self) -> MQTTErrorCode:
        received = self._clock.monotonic()
        header, packet = self._in_packet["command"], self._in_packet["packet"]
        qos = header >> 1 & 3
        start = 2 + int.from_bytes(packet[:2], "big")
        topic = packet[2:start].decode()
        offset = start + (2 if qos else 0)
        if qos > 1 or not topic or offset > len(packet):
            raise ProtocolError(f"a PUBLISH packet with QoS {qos} and topic {topic[:64]!r}")
        properties, offset = MessageProperties.from_bytes(packet, offset)
        payload = bytes(packet[offset:])
        if not qos:
            self._deliver(Message(topic, payload, qos, bool(header & 1), properties, received))
            return paho.MQTT_ERR_SUCCESS
        mid, again = int.from_bytes(packet[start : start + 2], "big"), bool(header & 8)
        owed = partial(self._puback, mid) if self._manual else None
        self._deliver(Message(topic, payload, qos, bool(header & 1), properties, received, mid, again, owed))
        return paho.MQTT_ERR_SUCCESS if self._manual else self._send_puback(mid)

    def _puback(self, mid: int) -> None:
        if self._sock is not None:  # else the broker sends the message again, to the next connection
            self._send_puback(mid)

    def _handle_pubackcomp(self, cmd: Any) -> MQTTErrorCode:
        packet = self._in_packet["packet"]
        mid = int.from_bytes(packet[:2], "big")
        if cmd != "PUBACK" or mid not in self._out_messages:
            return paho.MQTT_ERR_SUCCESS
        self._acknowledge(mid, packet[2] if len(packet) > 2 else 0)
        return self._do_on_publish(mid, _UNUSED_REASON, _UNUSED_PROPERTIES)


class Packed(Properties):
    """Properties that are bytes already, as `paho.Client.publish` asks for them."""

    def __init__(self, packed: bytes) -> None:
        object.__setattr__(self, "packed", packed)

    def pack(self) -> bytes:
        packed: bytes = self.__dict__["packed"]
        return packed

    def __str__(self) -> str:
        return "(packed)"


def tls_context(options: LinkOptions) -> ssl.SSLContext:
    """TLS 1.3, checking the broker's name and certificate. Raises `LinkError`."""
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if options.cert_file is not None:
            context.load_cert_chain(options.cert_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise LinkError(f"cannot use the TLS files: {error}", permanent=True) from None
    return context


_ALERTS = {
    "CERTIFICATE_REQUIRED": "the broker wants a client certificate: give cert_file and key_file",
    "CERTIFICATE_EXPIRED": "the broker says that the client certificate has expired",
    "CERTIFICATE_REVOKED": "the broker says that the client certificate was revoked",
    "UNKNOWN_CA": "the broker does not know the authority that signed the client certificate",
    "BAD_CERTIFICATE": "the broker refuses the client certificate",
    "UNSUPPORTED_CERTIFICATE": "the broker says that the client certificate is for something else than clients",
    "CERTIFICATE_UNKNOWN": "the broker refuses the client certificate",
    "ACCESS_DENIED": "the broker refuses the client certificate",
    "HANDSHAKE_FAILURE": "the broker and this gateway have no way of TLS 1.3 in common",
    "PROTOCOL_VERSION": "the broker does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "the broker does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "the broker does not speak TLS on this port",
    "RECORD_LAYER_FAILURE": "the broker does not speak TLS on this port",
}
"""By the end of OpenSSL's name of the alert. All of them stay until somebody acts."""


def tls_failure(error: ssl.SSLError) -> LinkError:
    """What went wrong with TLS, in words; permanent where trying again would not help."""
    if isinstance(error, ssl.SSLCertVerificationError):
        message = error.verify_message.rstrip(".")
        return LinkError(f"the broker's certificate is not trusted: {message}", permanent=True)
    reason = error.reason or ""
    for ending, message in _ALERTS.items():
        if reason.endswith(ending):
            return LinkError(message, permanent=True)
    return LinkError(f"TLS failed: {reason or error}")
