"""When certificates end: those in files, and those that peers showed.

A certificate that has ended takes the whole lane with it, at a moment that was known for years.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agent.config import Config
from agent.core.clock import Clock
from agent.core.errors import ConfigError

log = logging.getLogger(__name__)

DAY_S = 86_400.0
MAX_FILE = 1 << 20
LOOK_S = 60.0
"""Between two looks."""
SOON_S = 5.0
"""After the first one: brokers will have shown theirs."""
_KEYS = ("cert_file", "ca_file")


class Certificate(NamedTuple):
    """`name` is where it comes from, `http.tls` or `mqtt peer`; `not_after` is Unix time, None if it cannot be read."""

    name: str
    not_after: float | None
    problem: str = ""


def certificate_files(config: Config) -> dict[str, Path]:
    """Every file with a certificate that the configuration names, by its key."""
    sections: dict[str, Any] = {f"cloud.lanes.{lane.name}": lane for lane in config.cloud.lanes}
    if config.mqtt.enabled:
        sections["mqtt"] = config.mqtt
    if config.http.enabled and config.http.tls is not None:
        sections["http.tls"] = config.http.tls
    named = {(at, key): getattr(section, key, None) for at, section in sections.items() for key in _KEYS}
    return {f"{at}.{key}": path for (at, key), path in named.items() if path is not None}


def read_certificate(name: str, path: Path) -> Certificate:
    """The one in a PEM file that counts. Of a chain, the one that ends first, which breaks it; of a file of
    authorities (`ca_file`), the one that ends last, for one that holds is enough."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        with path.open("rb") as file:
            found = load_pem_x509_certificates(file.read(MAX_FILE))
    except OSError as error:
        return Certificate(name, None, f"{path} cannot be read: {error.strerror or error}")
    except ValueError:
        return Certificate(name, None, f"{path} holds no certificate in PEM")
    ends = [one.not_valid_after_utc.timestamp() for one in found]
    return Certificate(name, max(ends) if name.endswith("ca_file") else min(ends))


def peer_certificate(name: str, decoded: Mapping[str, Any] | None) -> Certificate | None:
    """The one that a peer showed, as `ssl.SSLSocket.getpeercert` gives it; None if it showed none."""
    if not decoded or "notAfter" not in decoded:
        return None
    return Certificate(name, float(ssl.cert_time_to_seconds(str(decoded["notAfter"]))))


def days_left(certificate: Certificate, now_wall: float) -> float | None:
    """None if that is not known; negative once it has ended."""
    return None if certificate.not_after is None else (certificate.not_after - now_wall) / DAY_S


def alarm(certificate: Certificate, now_wall: float, warn_days: int) -> str:
    """What somebody has to be told about it; empty while all is well."""
    left = days_left(certificate, now_wall)
    if left is None:
        return f"{certificate.name}: {certificate.problem}"
    if left <= 0:
        return f"{certificate.name}: the certificate ended {-left:.1f} days ago"
    return f"{certificate.name}: the certificate ends in {left:.1f} days" if left <= warn_days else ""


class Watch:
    """Looks at all of them, says once a day what is wrong, and keeps what it saw for `/status`."""

    def __init__(self, files: Mapping[str, Path], warn_days: int) -> None:
        self._files = files
        self._warn_days = warn_days
        self._seen: list[tuple[Certificate, float | None, str]] = []
        self._told: dict[str, float] = {}

    def look(self, peers: Iterable[Certificate], now: float, now_wall: float) -> list[str]:
        """Read the files and take in the peers' (`now` monotonic). Returns the alarms. Blocks on the disk."""
        certificates = [*(read_certificate(name, path) for name, path in self._files.items()), *peers]
        self._seen = [(one, days_left(one, now_wall), alarm(one, now_wall, self._warn_days)) for one in certificates]
        for certificate, left, text in self._seen:
            if text and now - self._told.get(certificate.name, -DAY_S) >= DAY_S:
                self._told[certificate.name] = now
                level = logging.ERROR if left is None or left <= 0 else logging.WARNING
                log.log(level, "certificate needs renewal", extra={"certificate": certificate.name, "reason": text})
        return self.alarms()

    async def keep(self, links: Mapping[str, Any], renew: Callable[[], bool], clock: Clock) -> AsyncIterator[list[str]]:
        """Look again and again; gives the alarms after each look. Of `links`, those to brokers have a
        `peer_certificate`; `renew` takes a renewed certificate of one's own, and raises `ConfigError`."""
        pause_s = SOON_S
        while True:
            shown = [
                peer_certificate(f"{name} broker", getattr(link, "peer_certificate", None))
                for name, link in links.items()
            ]
            peers = [certificate for certificate in shown if certificate is not None]
            alarms = await asyncio.to_thread(self.look, peers, clock.monotonic(), clock.wall())
            try:
                if renew():
                    log.info("certificate renewed", extra={"certificate": "http.tls"})
            except ConfigError as error:
                alarms.append(str(error))
            yield alarms
            await asyncio.sleep(pause_s)
            pause_s = LOOK_S

    def alarms(self) -> list[str]:
        return [text for _, _, text in self._seen if text]

    def status(self) -> list[dict[str, Any]]:
        """For `/status`."""
        return [
            {"name": one.name, "days_left": None if left is None else round(left, 2), "alarm": text}
            for one, left, text in self._seen
        ]
