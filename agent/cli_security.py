"""`edge-agent token` and `edge-agent audit`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, get_args

from agent.config import NAME_PATTERN, Role

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
DEFAULT_TRAIL = Path("/var/lib/edge-agent/audit")


def add_parsers(commands: Any) -> None:
    token = commands.add_parser("token", help="tokens of services").add_subparsers(dest="action", required=True)
    new = token.add_parser("new", help="make a token; it is shown this once, and its hash goes into the configuration")
    new.add_argument("--name", required=True, help="whose it is, as the audit trail calls it")
    new.add_argument(
        "--role", action="append", required=True, choices=get_args(Role), help="may be given several times"
    )
    new.add_argument("--producer", metavar="NAME", help="requests with it are this producer's and no other's")
    new.add_argument("--expires", metavar="YYYY-MM-DD", help="the last day on which it is taken")
    new.set_defaults(run=_new_token)

    audit = commands.add_parser("audit", help="the audit trail").add_subparsers(dest="action", required=True)
    verify = audit.add_parser("verify", help="follow the chain through all files; name the first line that is broken")
    verify.add_argument("folder", type=Path, nargs="?", default=DEFAULT_TRAIL, help=f"(default {DEFAULT_TRAIL})")
    verify.add_argument(
        "--anchor", metavar="N:HASH", help="a head noted before, from /status or MQTT: the chain must go through it"
    )
    verify.set_defaults(run=_verify)
    name = audit.add_parser("pseudonym", help="what a value is called in the trail")
    name.add_argument("value", help="for example the id of a producer")
    name.add_argument("--key-file", type=Path, required=True, help="security.audit.key_file")
    name.set_defaults(run=_pseudonym)


def _new_token(args: argparse.Namespace) -> int:
    from datetime import date

    from agent.security.tokens import hashed, new_token

    for option, value in (("--name", args.name), ("--producer", args.producer)):
        if value is not None and not re.fullmatch(NAME_PATTERN, value):
            return _usage(f"{option}: must be 1 to 64 letters, digits, _, . and -, and begin with a letter or a digit")
    if args.expires is not None:
        try:
            args.expires = date.fromisoformat(args.expires)
        except ValueError:
            return _usage(f"--expires: must be a day such as 2027-12-31, found {args.expires!r}")
    made = new_token()
    rest = f', producer: "{args.producer}"' if args.producer else ""
    rest += f", expires: {args.expires}" if args.expires else ""
    roles = ", ".join(dict.fromkeys(args.role))
    print("The token, which is not kept anywhere:", file=sys.stderr)
    print(made)
    print(
        f"In the configuration, under security.tokens:\n  - {_entry(args.name, roles, hashed(made), rest)}",
        file=sys.stderr,
    )
    return EXIT_OK


def _entry(name: str, roles: str, sha256: str, rest: str) -> str:
    """Quoted where YAML would take a name such as 07 or yes for something else."""
    return f'{{name: "{name}", roles: [{roles}], sha256: "{sha256}"{rest}}}'


def _verify(args: argparse.Namespace) -> int:
    from agent.security.audit_file import audit_files, read_lines
    from agent.security.chain import Head, check

    anchor = None
    if args.anchor is not None:
        match = re.fullmatch(r"([0-9]{1,15}):([0-9a-f]{64})", args.anchor)
        if match is None:
            return _usage("--anchor: must be N:HASH, as `security.audit.head` of /status")
        anchor = Head(int(match[1]), match[2])
    try:
        files = audit_files(args.folder)
        if not files:
            return _failed(f"{args.folder}: no audit trail (audit-*.jsonl) is here")
        report = check(((path.name, read_lines(path)) for path in files), anchor)
    except OSError as error:
        return _failed(f"{error.filename or args.folder}: {error.strerror or error}")
    if report.broken is not None:
        found = report.broken
        return _failed(f"{args.folder / found.file}: line {found.line}: {found.reason}")
    if anchor is not None and not report.anchored:
        beyond = "; the end was cut off" if anchor.seq > report.head.seq else ""
        return _failed(f"{args.folder}: the chain does not go through the anchor: it ends with {report.head}{beyond}")
    first = f"; begins with line {report.first}, older files are gone" if report.first not in (None, 1) else ""
    print(f"{args.folder}: {report.lines} lines in {len(files)} files are whole{first}; the head is {report.head}")
    return EXIT_OK


def _pseudonym(args: argparse.Namespace) -> int:
    from agent.security.audit import pseudonym
    from agent.security.jwts import read_key_file, require_secret

    key = require_secret(read_key_file(args.key_file, "--key-file"), "--key-file")
    print(pseudonym(key, args.value))
    return EXIT_OK


def _usage(text: str) -> int:
    print(f"edge-agent: {text}", file=sys.stderr)
    return EXIT_USAGE


def _failed(text: str) -> int:
    print(f"edge-agent: {text}", file=sys.stderr)
    return EXIT_FAILED
