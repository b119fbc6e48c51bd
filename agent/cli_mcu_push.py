"""`edge-agent mcu push`: which model, under whose signature, and what the board made of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from agent.cli_image import Chosen, choose
from agent.core.clock import Clock
from agent.core.errors import EdgeAgentError
from agent.link.calls import RemoteError
from agent.link.push import ModelImage, push_model
from agent.link.session import Session
from agent.registry.model_validator import ModelInvalid, validate_model
from agent.registry.signing import PrivateKey, PublicKey, SignedManifest, SigningError, load_public
from agent.wire.codes import Capability, ErrorCode, SlotState, name_of
from agent.wire.update import ALLOW_LOWER_COUNTER

MAX_COUNTER: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What of the configuration decides about an update."""

    require_signed: bool
    trusted: tuple[PublicKey, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before the board is asked. `signed` and `key`: at most one of them."""

    chosen: Chosen
    policy: Policy
    signed: SignedManifest | None
    key: PrivateKey | None

    @property
    def key_id(self) -> str:
        """Of the signature; empty if there is none."""
        if self.key is not None:
            return self.key.public.id
        return self.signed.key_id if self.signed is not None else ""


def prepare(args: argparse.Namespace) -> Plan:
    """Read all files that the command line names. Raises `ConfigError`, `UnknownModel`, `SigningError`."""
    policy = _policy(args)
    chosen = choose(args)
    key = PrivateKey.load(args.key) if args.key is not None else None
    path = args.signature
    if path is None and key is None and not args.unsigned and chosen.signature_path.exists():
        path = chosen.signature_path
    signed = SignedManifest.load(path) if path is not None else None
    if signed is not None:
        for option, given in (("--counter", args.counter is not None), ("--allow-downgrade", args.allow_downgrade)):
            if given:
                raise SigningError(f"{option}: is part of what {path} signed, and cannot be given with it")
        signed.check_image(chosen.model, chosen.selftest)
    if policy.trusted:
        if signed is not None:
            signed.check(chosen.model, chosen.selftest, policy.trusted)
        elif key is not None and key.public not in policy.trusted:
            raise SigningError(f"{args.key}: is not among models.trusted_keys")
    return Plan(chosen, policy, signed, key)


def _policy(args: argparse.Namespace) -> Policy:
    if args.config is None:
        return Policy(args.require_signed, ())
    from agent.config_load import load_config

    config = load_config(args.config, unseen=[])
    if args.catalog is None:
        args.catalog = config.models.catalog
    trusted = tuple(load_public(text) for text in config.models.trusted_keys)
    return Policy(args.require_signed or config.edge_mcu.require_signed_updates, trusted)


async def push(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    """Send `args.plan`, unless it is active already. Raises as `push_model`, and `SigningError` where the policy or the
    board wants a signature that is not there."""
    plan: Plan = args.plan
    name = plan.chosen.name
    active = session.hello.active
    image = _image(session, args, plan)
    # Pushing would overwrite the model to go back to. A counter is another only if the command line says so.
    same = active is not None and active.state == SlotState.ACTIVE and active.sha256 == image.model_sha256
    if active is not None and same and args.counter in (None, active.counter) and not args.force:
        print(f"{name}: already active in slot {active.index}, nothing was written; --force sends it again")
        return
    _allowed(session, plan)
    _validated(session, image, name)
    print(f"{name}: {len(image.model)} bytes, self-test {len(image.selftest)} bytes, counter {image.counter}", end="")
    print(f", signed with key {plan.key_id}" if plan.key_id else ", not signed")
    began = clock.monotonic()
    progress = _Progress()
    try:
        status = await push_model(session, image, clock, progress.show, _then(progress.end, print))
    except RemoteError as error:
        raise _explained(error, plan) from None
    finally:
        progress.end()
    took_s = clock.monotonic() - began
    how = "verified by the board" if session.hello.trial_s == 0 else "verified by the board, proved and confirmed"
    print(f"slot {status.slot} {name_of(status.state).lower()}, {how} after {took_s:.2f} s", end="")
    print(f" ({progress.resumed_at} bytes were there already)" if progress.resumed_at else "")


def _image(session: Session, args: argparse.Namespace, plan: Plan) -> ModelImage:
    chosen, active = plan.chosen, session.hello.active
    if plan.signed is not None:
        manifest = plan.signed.manifest
        image = chosen.image(
            manifest.counter,
            allow_lower_counter=bool(manifest.flags & ALLOW_LOWER_COUNTER),
            board=manifest.board,
        )
        return replace(
            image,
            arena=manifest.arena,
            tolerance=manifest.selftest_tolerance,
            operators=manifest.operators,
            sign=plan.signed.sign,
        )
    running = chosen.catalog.by_sha256(active.sha256.hex()) if active is not None else None
    if args.counter is not None:
        counter = args.counter
    elif chosen.variant is not None:
        counter = chosen.variant.version
    else:
        counter = active.counter + 1 if active is not None else 1
        if counter > MAX_COUNTER:
            raise EdgeAgentError(
                f"{chosen.name}: the active model has the highest counter: give --counter N, and with it "
                "--allow-downgrade"
            )
    # Versions are comparable within one variant only: another one replaces it whatever its number.
    other = chosen.variant is not None and running is not None and running.name != chosen.variant.name
    image = chosen.image(counter, allow_lower_counter=args.allow_downgrade or other)
    return replace(image, sign=plan.key.sign) if plan.key is not None else image


def _allowed(session: Session, plan: Plan) -> None:
    """Raises `SigningError` for what the gateway's policy forbids, and for what the board would refuse anyway."""
    verifies = Capability.ED25519 in session.hello.capabilities
    if plan.policy.require_signed and not verifies:
        raise SigningError(
            "this board does not verify signatures, and edge_mcu.require_signed_updates is set: it is not updated"
        )
    if not plan.key_id and (verifies or plan.policy.require_signed):
        why = "this board takes signed models only" if verifies else "edge_mcu.require_signed_updates is set"
        raise SigningError(f"{why}: sign it with edge-agent models sign, or give --key FILE")
    board = plan.signed.manifest.board if plan.signed is not None else ""
    if board and board != session.hello.board:
        raise SigningError(f"not sent: signed for boards named {board}, this one is {session.hello.board}")
    if plan.key_id and not verifies:
        print("note: this board does not verify signatures, and takes the model unchecked")


def _validated(session: Session, image: ModelImage, name: str) -> None:
    """Raises `ModelInvalid` for what the board would refuse once it had received all of it."""
    hello = session.hello
    if not hello.operators:
        return  # it has no engine, and says so itself
    try:
        validate_model(image.model, hello.operators, hello.max_message)
    except ModelInvalid as refused:
        raise ModelInvalid(f"{name}: not sent, the board would refuse it: {refused}", refused.code) from None


def _explained(error: RemoteError, plan: Plan) -> EdgeAgentError:
    """With what a person may do about it."""
    if error.code == ErrorCode.DOWNGRADE and plan.signed is not None:
        return SigningError(
            f"{error}: the signature does not allow it; sign it with a higher --counter, or with --allow-downgrade"
        )
    if error.code == ErrorCode.SIGNATURE and plan.key_id:
        return SigningError(f"{error}: the board trusts another key than {plan.key_id}")
    return error


def _then(first: Callable[[], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def both(text: str) -> None:
        first()
        second(text)

    return both


class _Progress:
    """One line on a terminal; nothing where nobody watches."""

    def __init__(self) -> None:
        self.resumed_at: int | None = None
        self._open = False

    def show(self, received: int, total: int) -> None:
        if self.resumed_at is None:
            self.resumed_at = received
        if sys.stderr.isatty():
            self._open = True
            print(f"\r{received * 100 // total:3} % of {total} bytes", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._open:
            self._open = False
            print(file=sys.stderr)
