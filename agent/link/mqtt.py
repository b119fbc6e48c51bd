"""A lasting link to one MQTT 5 broker: connects, subscribes, says so, and does it again when the connection is lost.

    connecting -> CONNACK -> subscriptions granted -> connected -> lost -> back-off -> connecting

Everything happens in the event loop that `start` was awaited in. Callbacks run there, synchronously: whatever takes
long belongs in a task. Publishing while not connected raises at once, so that the caller can choose another way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import topic_matches_sub

from agent.core.clock import Clock, SystemClock
from agent.core.component import Reading
from agent.core.errors import LinkError
from agent.link.backoff import Backoff
from agent.link.mqtt_client import LinkFull, LinkOptions, Message, MessageTooLarge, Will, link_options
from agent.link.mqtt_connection import MqttConnection
from agent.wire.mqtt_properties import MessageProperties

__all__ = [
    "LinkFull",
    "LinkOptions",
    "LinkState",
    "Message",
    "MessageProperties",
    "MessageTooLarge",
    "MqttLink",
    "Will",
    "link_options",
]

log = logging.getLogger(__name__)

STABLE_S = 10.0
"""A connection that lasted this long was a good one: the next back-off starts from the least again."""
STOPPED = "stopped"
SOON_S = 5.0
"""A connection lost this soon after it came up may have been taken over by another client with the same id."""
SOON_LOSSES = 3
"""So many of them in a row, without a refused or failed try between them, and that is the likely cause: the next try
waits for half of `backoff_max_s` to all of it. A broker that looks the same and is back costs that much once."""
RIVAL_GONE_S = 300.0
"""A connection that lasts this long shows that there is no such client, or no longer."""
MAX_ROUTES = 1024
"""Topics whose callback is remembered, so that filters are matched once for each topic."""

OnMessage = Callable[[Message], None]
Acknowledged = Callable[[int | LinkError], None]


@dataclass(frozen=True, slots=True)
class LinkState:
    """`since` is monotonic seconds; `reason` says why it is not connected. `permanent`: somebody has to act."""

    connected: bool
    since: float
    reason: str = ""
    permanent: bool = False


@dataclass(slots=True)
class LinkCounters:
    connects: int = 0
    losses: int = 0
    received: int = 0
    published: int = 0
    unrouted: int = 0
    """Messages that no subscription wanted."""
    callback_errors: int = 0
    refused: int = 0
    """Publishes refused because the link was down or full."""


@dataclass(slots=True)
class _Subscription:
    callback: OnMessage
    qos: int
    no_local: bool
    refusal: int = 0


class Rival:
    """Tells from when connections were lost whether another client with the same id may be connected.

    MQTT gives the connection to the client that comes last, so that two of them take it from each other for ever. Some
    brokers do not say so (mosquitto before 2.0.12 sends no DISCONNECT 0x8E). A broker that is started again and again
    is unlike it: it refuses connections in between. Pure; times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._losses = 0

    @property
    def suspected(self) -> bool:
        return self._losses >= SOON_LOSSES

    def lost(self, up: float, now: float) -> None:
        """A connection that the broker had accepted at `up` was lost."""
        # Once suspected, each of the two has it until the other's back-off ends: not soon any more, and yet the same.
        soon = now - up <= (RIVAL_GONE_S if self.suspected else SOON_S)
        self._losses = self._losses + 1 if soon else 0

    def failed(self) -> None:
        """The broker could not be reached, or did not accept the connection."""
        self._losses = 0


class MqttLink:
    """See the module. One for each broker and role."""

    def __init__(self, options: LinkOptions, clock: Clock | None = None, *, name: str = "mqtt") -> None:
        self.options = options
        self.name = name
        self.counters = LinkCounters()
        self._clock = clock or SystemClock()
        self._state = LinkState(False, self._clock.monotonic(), "not started")
        self._listeners: list[Callable[[LinkState], None]] = []
        self._subscriptions: dict[str, _Subscription] = {}
        self._routes: dict[str, OnMessage | None] = {}
        self.unrouted: OnMessage | None = None
        """Gets what no subscription of ours is for; else that is acknowledged at once."""
        self._connection: MqttConnection | None = None
        self._task: asyncio.Task[None] | None = None

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        return self._state

    @property
    def alive(self) -> bool:
        """Whether somebody keeps the connection, or tries to have one."""
        return self._task is not None and not self._task.done()

    @property
    def connected(self) -> bool:
        """True only after a good CONNACK and an answer to every subscription."""
        return self._state.connected

    def reading(self) -> Reading:
        """As a component: degraded where the broker refused a subscription."""
        refused = self.refused_filters
        trouble = f"the broker refused: {', '.join(refused)}" if refused else ""
        return Reading.there(self.connected, trouble if self.connected else self._state.reason)

    @property
    def peer_certificate(self) -> Mapping[str, Any] | None:
        """The broker's, as `ssl.SSLSocket.getpeercert` gives it; None without TLS or a connection."""
        return None if self._connection is None else self._connection.peer_certificate

    @property
    def refused_filters(self) -> list[str]:
        """Subscriptions that the broker refused (an access list, most often)."""
        return [topic_filter for topic_filter, wanted in self._subscriptions.items() if wanted.refusal]

    def on_state(self, listener: Callable[[LinkState], None]) -> None:
        """Call `listener` in the loop at each change."""
        self._listeners.append(listener)

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types, no secrets."""
        status: dict[str, Any] = {
            "broker": self.options.broker,
            "connected": self.connected,
            "for_s": round(self._clock.monotonic() - self._state.since, 1),
            **{key: getattr(self.counters, key) for key in LinkCounters.__slots__},
        }
        if self._state.reason:
            status["reason"] = self._state.reason
        if self.refused_filters:
            status["refused_filters"] = self.refused_filters
        return status

    def _set_state(self, connected: bool, reason: str = "", permanent: bool = False) -> None:
        before = self._state
        if (connected, reason, permanent) == (before.connected, before.reason, before.permanent):
            return
        since = before.since if connected == before.connected else self._clock.monotonic()
        self._state = LinkState(connected, since, reason, permanent)
        fields = {"link": self.name, "broker": self.options.broker}
        if connected:
            log.info("link up", extra=fields)
        elif reason != STOPPED:
            log.warning("link down", extra={**fields, "reason": reason, "permanent": permanent})
        for listener in self._listeners:
            self._guard(listener, self._state)

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"link {self.name}")

    async def stop(self, grace_s: float = 1.0) -> None:
        """Say goodbye to the broker and end. Afterwards nothing of this link is left."""
        task, self._task = self._task, None
        connection, self._connection = self._connection, None
        self._set_state(False, STOPPED)
        if connection is not None:
            await connection.close(grace_s)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        backoff = Backoff(self.options.backoff_initial_s, self.options.backoff_max_s, random.random)
        rival = Rival()
        while True:
            try:
                error = await self._one_connection(backoff, rival)
            except Exception as defect:  # of whoever is told that the connection has ended, for example
                log.exception("a link failed in an unforeseen way", extra={"link": self.name})
                error = LinkError(f"{type(defect).__name__}: {defect}")
            if self._task is None:  # stopping: not a loss
                return
            now = self._clock.monotonic()
            delay_s = backoff.failed(now, permanent=error.permanent)
            if rival.suspected and not error.permanent:
                # Jitter, so that of two that lost at once one is first; never short, so that they do not fight.
                delay_s = self.options.backoff_max_s * random.uniform(0.5, 1.0)
                also = f"another client with the id {self.options.client_id} may be connected"
                error = LinkError(f"{error}; {also}", permanent=True)
            reason = f"{error}; next try in {delay_s:.0f} s" if error.permanent else str(error)
            self._set_state(False, reason, error.permanent)
            await asyncio.sleep(delay_s)

    async def _one_connection(self, backoff: Backoff, rival: Rival) -> LinkError:
        """Open, use and lose one connection. Returns why it ended."""
        connection = MqttConnection(self.options, self._dispatch, self._clock)
        accepted: float | None = None
        try:
            await connection.open()
            accepted = self._clock.monotonic()
            await self._subscribe_all(connection)
            self._connection = connection
            self.counters.connects += 1
            opened = self._clock.monotonic()
            self._set_state(True)
            error = await asyncio.shield(connection.lost)
            self.counters.losses += 1
            if self._clock.monotonic() - opened >= STABLE_S:
                backoff.succeeded()
            return error
        except LinkError as error:
            return error
        except Exception as error:  # a host name that cannot be one, for example: the link must outlive it
            log.exception("a connection failed in an unforeseen way", extra={"link": self.name})
            return LinkError(f"cannot connect: {error}", permanent=True)
        finally:
            self._connection = None
            connection.abort()
            if accepted is None:
                rival.failed()
            else:
                rival.lost(accepted, self._clock.monotonic())

    # --- messages ------------------------------------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: MessageProperties | None = None,
        acknowledged: Acknowledged | None = None,
    ) -> None:
        """Hand a message to the socket now.

        `acknowledged` (QoS 1 only) is called once, with the PUBACK's reason code or the `LinkError` that came first.
        Raises `LinkError` when not connected, `LinkFull` when too much is on its way, `ValueError` on a wrong topic.
        """
        connection = self._connection
        try:
            if connection is None:
                raise LinkError(f"not connected to {self.options.broker}: {self._state.reason}")
            connection.publish(topic, payload, qos, retain, properties, acknowledged)
        except LinkError:
            self.counters.refused += 1
            raise
        self.counters.published += 1

    async def publish_acknowledged(
        self, topic: str, payload: bytes, *, retain: bool = False, properties: MessageProperties | None = None
    ) -> int:
        """Publish at QoS 1 and wait for the PUBACK; returns its reason code. Raises as `publish` does."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def acknowledged(result: int | LinkError) -> None:
            if done.done():
                return
            if isinstance(result, LinkError):
                done.set_exception(result)
            else:
                done.set_result(result)

        self.publish(topic, payload, qos=1, retain=retain, properties=properties, acknowledged=acknowledged)
        return await done

    async def subscribe(self, topic_filter: str, callback: OnMessage, *, qos: int = 1, no_local: bool = False) -> None:
        """Have `callback` called for what matches, now and after each reconnect.

        Of several filters that match a topic, the one subscribed first gets it. A refusal by the broker is logged and
        kept in `refused_filters`; it does not end the link. Filters may begin with `$share/GROUP/`.
        """
        wanted = _Subscription(callback, qos, no_local)
        self._subscriptions[topic_filter] = wanted
        self._routes.clear()
        if self._connection is not None:
            # Lost meanwhile: the next connection subscribes.
            with contextlib.suppress(LinkError):
                await self._subscribe_one(self._connection, topic_filter, wanted)

    async def unsubscribe(self, topic_filter: str) -> None:
        """Returns when the broker sends no more of it. Messages that come before are still delivered."""
        connection = self._connection
        try:
            if connection is not None and topic_filter in self._subscriptions:
                with contextlib.suppress(LinkError):
                    await connection.unsubscribe(topic_filter)
        finally:  # also for whoever stops waiting for a broker that hangs
            self._subscriptions.pop(topic_filter, None)
            self._routes.clear()

    async def _subscribe_all(self, connection: MqttConnection) -> None:
        done: set[str] = set()
        while missing := [item for item in self._subscriptions.items() if item[0] not in done]:
            for topic_filter, wanted in missing:
                done.add(topic_filter)
                await self._subscribe_one(connection, topic_filter, wanted)

    async def _subscribe_one(self, connection: MqttConnection, topic_filter: str, wanted: _Subscription) -> None:
        reason_code = await connection.subscribe(topic_filter, wanted.qos, wanted.no_local)
        wanted.refusal = reason_code if reason_code >= 0x80 else 0
        if wanted.refusal:
            fields = {"link": self.name, "filter": topic_filter, "reason_code": reason_code}
            log.error("the broker refused a subscription", extra=fields)

    def _dispatch(self, message: Message) -> None:
        self.counters.received += 1
        try:
            callback = self._routes[message.topic]
        except KeyError:
            callback = self._route(message.topic)
        if callback is None:
            self.counters.unrouted += 1
            if self.unrouted is not None:
                self._guard(self.unrouted, message)
            elif message.acknowledge is not None:  # or it holds its place in the broker's window for ever
                message.acknowledge()
        else:
            self._guard(callback, message)

    def _route(self, topic: str) -> OnMessage | None:
        callback = None
        for topic_filter, wanted in self._subscriptions.items():
            plain = topic_filter.split("/", 2)[2] if topic_filter.startswith("$share/") else topic_filter
            if topic_matches_sub(plain, topic):
                callback = wanted.callback
                break
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[topic] = callback
        return callback

    def _guard(self, callback: Callable[[Any], None], argument: object) -> None:
        """One callback's mistake must not end the connection for all others."""
        try:
            callback(argument)
        except Exception:
            self.counters.callback_errors += 1
            log.exception("a callback failed", extra={"link": self.name})
