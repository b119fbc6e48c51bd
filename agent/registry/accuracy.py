"""How right a variant is now, from how often the most accurate variant agrees with it on what really comes in.

Agreement is not accuracy. It is turned into one under an assumption: an answer that the reference shares, or does not
share, is as often right as it was on the held-out data. With g the share that agrees in the window,

    observed = g x right_if_agreed + (1 - g) x right_if_not

which is the catalogue's accuracy when g is the held-out agreement; it is never taken to be above the reference's own,
for agreeing with it cannot show that. n samples move the catalogue's figure, which stands
on n0 (at most the window), towards the observed one: (n0 x catalogue + n x observed) / (n0 + n). While there is an
alarm the catalogue's figure no longer counts.

The alarm: the 99 % interval of g (Wilson) lies wholly below the band, which begins at the lower end of the 95 %
interval of the held-out agreement less `margin`. It ends when g itself is back in the band. More agreement than
expected is no alarm.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.config import DriftSection
from agent.registry.calibration import Z99, Calibration, Cascade, wilson
from agent.registry.catalog import Catalog, Variant

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Alarm:
    """A variant's agreement left its band (`active`), or came back."""

    variant: Variant
    active: bool
    agreement: float
    low: float
    high: float
    samples: int
    expected: float
    band_low: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.variant.model,
            "variant": self.variant.id,
            "sha256": self.variant.sha256,
            "active": self.active,
            "agreement": round(self.agreement, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "samples": self.samples,
            "expected": self.expected,
            "band_low": round(self.band_low, 4),
        }


@dataclass(slots=True)
class _Watched:
    variant: Variant
    calibration: Calibration
    cascade: Cascade
    agreed: deque[bool]
    limit: float
    """The reference's accuracy."""
    alarm: bool = False
    accuracy: float = 0.0
    band_low: float = field(default=0.0)


class Accuracies:
    """Of all variants of a catalogue; those without a calibrated cascade keep the catalogue's. `path` None: nothing is
    kept over a restart. `listeners` hear of alarms that begin and end, and of those that a restart finds."""

    def __init__(self, catalog: Catalog, settings: DriftSection, path: Path | None = None) -> None:
        self._settings = settings
        self._path = path
        self._watched: dict[str, _Watched] = {}
        self._changed = False
        self.listeners: list[Callable[[Alarm], None]] = []
        for family in catalog.families.values():
            for variant in family.variants.values():
                calibration = variant.calibration
                if calibration is not None and calibration.cascade is not None:
                    reference = family.variants[calibration.cascade.reference]
                    self._watch(variant, calibration, calibration.cascade, reference.accuracy.value)

    def _watch(self, variant: Variant, calibration: Calibration, cascade: Cascade, limit: float) -> None:
        low, _ = wilson(cascade.agreement * calibration.samples, calibration.samples)
        self._watched[variant.name] = _Watched(
            variant,
            calibration,
            cascade,
            deque(maxlen=self._settings.window),
            limit,
            accuracy=variant.accuracy.value,
            band_low=max(0.0, low - self._settings.margin),
        )

    def accuracy_of(self, variant: Variant) -> float:
        """Share of the variant's answers that are taken to be right now."""
        watched = self._watched.get(variant.name)
        return variant.accuracy.value if watched is None else watched.accuracy

    def observe(self, variant: Variant, agreed: bool) -> None:
        """Whether the reference gave the class that the variant gave. Nothing for a variant that is not watched."""
        watched = self._watched.get(variant.name)
        if watched is None:
            return
        watched.agreed.append(agreed)
        self._changed = True
        self._update(watched)
        alarm = self._judge(watched)
        if alarm.active != watched.alarm:
            watched.alarm = alarm.active
            self._update(watched)
            self._tell(alarm)

    def _update(self, watched: _Watched) -> None:
        samples, cascade = len(watched.agreed), watched.cascade
        if not samples:
            return
        agreement = sum(watched.agreed) / samples
        observed = agreement * cascade.right_if_agreed + (1.0 - agreement) * cascade.right_if_not
        observed = min(observed, max(watched.limit, watched.variant.accuracy.value))
        prior = 0 if watched.alarm else min(watched.calibration.samples, self._settings.window)
        recorded = watched.variant.accuracy.value
        watched.accuracy = (prior * recorded + samples * observed) / (prior + samples)

    def _judge(self, watched: _Watched) -> Alarm:
        samples, agreed = len(watched.agreed), sum(watched.agreed)
        low, high = wilson(agreed, samples, Z99)
        agreement = agreed / samples if samples else watched.cascade.agreement
        if watched.alarm:
            active = agreement < watched.band_low
        else:
            active = samples >= self._settings.min_samples and high < watched.band_low
        expected = watched.cascade.agreement
        return Alarm(watched.variant, active, agreement, low, high, samples, expected, watched.band_low)

    def _tell(self, alarm: Alarm) -> None:
        extra = {**alarm.to_dict(), "model": alarm.variant.name}
        if alarm.active:
            log.warning("drift: the edge agrees less with the cloud than it did on the held-out data", extra=extra)
        else:
            log.info("drift: the edge agrees with the cloud again as it should", extra=extra)
        for listener in self.listeners:
            listener(alarm)

    def states(self) -> list[Alarm]:
        """Of every watched variant: whether there is an alarm, and why."""
        return [replace(self._judge(watched), active=watched.alarm) for watched in self._watched.values()]

    def status(self) -> dict[str, dict[str, Any]]:
        """For `/status`, by `family/variant`."""
        shown = {}
        for name, watched in self._watched.items():
            found = self._judge(watched)
            shown[name] = {
                "samples": found.samples,
                "agreement": round(found.agreement, 4) if found.samples else None,
                "interval": [round(found.low, 4), round(found.high, 4)] if found.samples else None,
                "expected": found.expected,
                "band_low": round(found.band_low, 4),
                "accuracy": round(watched.accuracy, 4),
                "alarm": watched.alarm,
            }
        return shown

    # --- over a restart ------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Take up what was kept of files that are still the same. Never raises: what cannot be read is begun anew."""
        if self._path is None:
            return
        try:
            if self._path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("is too large")
            kept = json.loads(self._path.read_bytes())
            for watched in self._watched.values():
                self._take_up(watched, kept.get(self._key(watched)))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            log.warning("running accuracies begin anew", extra={"path": str(self._path), "reason": str(error)})

    def _take_up(self, watched: _Watched, kept: Any) -> None:
        if kept is None:
            return
        agreed, alarm = kept["agreed"], kept["alarm"]
        if not isinstance(agreed, str) or set(agreed) - {"0", "1"} or not isinstance(alarm, bool):
            raise ValueError("is damaged")
        watched.agreed.extend(bit == "1" for bit in agreed)
        watched.alarm = alarm and bool(watched.agreed)
        self._update(watched)

    def pending(self) -> bytes | None:
        """What is to be written, or None if nothing has changed."""
        if self._path is None or not self._changed:
            return None
        self._changed = False
        kept = {
            self._key(watched): {"agreed": "".join("01"[bit] for bit in watched.agreed), "alarm": watched.alarm}
            for watched in self._watched.values()
            if watched.agreed
        }
        return json.dumps(kept).encode()

    def write(self, kept: bytes) -> None:
        """Blocking, for some kilobytes. Never raises."""
        if self._path is None:
            return
        aside = self._path.with_suffix(".new")
        try:
            aside.write_bytes(kept)
            aside.replace(self._path)
        except OSError as error:
            log.warning("running accuracies are not kept", extra={"path": str(self._path), "reason": str(error)})

    @staticmethod
    def _key(watched: _Watched) -> str:
        """Of both files: agreement with another reference is another figure."""
        return f"{watched.variant.sha256}:{watched.cascade.reference_sha256}"
