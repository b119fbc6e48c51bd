"""A board that is found in trial: nobody confirmed its new model, so the daemon does what the push would have done."""

from __future__ import annotations

import logging

from agent.core.clock import Clock
from agent.core.errors import EdgeAgentError
from agent.link.push import TOLERANCE
from agent.link.session import Session
from agent.link.trial import prove_and_confirm
from agent.registry.catalog import Catalog
from agent.registry.selftest import load_selftest
from agent.wire.codes import Capability
from agent.wire.messages import Slot

log = logging.getLogger(__name__)


async def settle_trial(
    port: str, session: Session, trial: Slot, catalog: Catalog, clock: Clock, *, signed_only: bool
) -> None:
    """Prove the model with the catalogue's self-test and confirm it, or have it taken back. Says in the log what came
    of it, and raises nothing.

    Left to who pushed it, and to the board's own bound of time: a model that the catalogue does not know or has no
    self-test of, and with `signed_only` any on a board that did not check its signature.
    """
    about = {"port": port, "model": trial.sha256.hex()[:12]}
    variant = catalog.by_sha256(trial.sha256.hex())
    if variant is None or variant.selftest is None:
        log.warning("trial left alone", extra={**about, "reason": "the catalogue has no self-test of its model"})
        return
    if signed_only and Capability.ED25519 not in session.hello.capabilities:
        log.warning("trial left alone", extra={**about, "reason": "the board did not check a signature"})
        return
    try:
        samples = load_selftest(catalog.root / variant.selftest)  # a few kilobytes, once for a trial
        await prove_and_confirm(session, trial, samples, TOLERANCE, clock)
    except (EdgeAgentError, TimeoutError) as error:
        log.warning("trial failed", extra={**about, "reason": str(error).removeprefix(f"{port}: ")})
    else:
        log.info("trial confirmed", extra={**about, "samples": len(samples)})
