"""`edge-agent`: argv to one of its commands. Each command's own imports happen when it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.argv[1:2] == ["run"]:  # A reload that is asked for while the daemon starts is none, and no reason to end.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

from agent import __version__, cli_client, cli_explain, cli_mcu, cli_models, cli_security, cli_sim, cli_worker
from agent.core.errors import ConfigError, EdgeAgentError, is_misuse, plain_words

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ok, 1 failed, 2 usage or configuration."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return EXIT_USAGE
    except EdgeAgentError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone (`| head`): nothing more to say, and nowhere to say it
        return EXIT_OK
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"edge-agent: {where}{plain_words(error)}", file=sys.stderr)
        return EXIT_USAGE if is_misuse(error) else EXIT_FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="One inference request path across a microcontroller, the gateway and the cloud.",
    )
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the daemon")
    run.add_argument("--config", type=Path, metavar="FILE", help="YAML file; default: settings from the environment")
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="check a configuration file and the catalogue it names; change nothing")
    check.add_argument("config", type=Path, metavar="FILE")
    check.set_defaults(run=_check)

    cli_client.add_parsers(commands)
    cli_explain.add_parser(commands)
    cli_mcu.add_parser(commands)
    cli_worker.add_parser(commands)
    cli_security.add_parsers(commands)

    cli_models.add_parser(commands)

    demo = commands.add_parser("demo", help="a whole gateway at work on this machine, with three outages")
    demo.set_defaults(run=_later("hil.demo.main"))
    demo.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long (20 to 3600; default 60)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the summary here as well")
    demo.add_argument("--keep", type=Path, metavar="FOLDER", help="keep configuration, logs and databases here")
    demo.add_argument("--http-port", type=int, default=8080, help="of the status page; another one if it is taken")

    bench = commands.add_parser("bench", help="measure the daemon's own cost beside the floor, in one run")
    bench.set_defaults(run=_later("hil.bench.main"))
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    bench.add_argument("--seconds", type=float, default=3.0, metavar="N", help="for each measurement (default 3)")
    cli_sim.add_benches(bench, _later)
    cli_sim.add_parsers(commands, _later)
    bench.add_argument(
        "--only", action="append", metavar="NAME", help="pipeline, decide, mqtt, http, mcu, wire, outbox or start"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    from agent.serve import run

    return run(args.config)


def _check(args: argparse.Namespace) -> int:
    from agent.config_load import cautions
    from agent.settings import load_settings

    unseen: list[str] = []
    config = load_settings(args.config, unseen=unseen).config
    for caution in [*unseen, *cautions(config)]:
        print(f"{args.config}: note: {caution}", file=sys.stderr)
    parts = (
        (len(config.edge_mcu.ports), "microcontroller"),
        (len(config.cloud.lanes), "cloud lane"),
        (len(config.sensors), "sensor"),
    )
    counted = ", ".join(f"{count} {name}" + ("" if count == 1 else "s") for count, name in parts)
    print(f"{args.config}: ok: {counted}")
    return EXIT_OK


def _later(module: str) -> object:
    """A command of the rig: imported only when it runs, and only where the rig is installed."""

    def run(args: argparse.Namespace) -> int:
        import importlib

        try:
            command = importlib.import_module(module)
        except ModuleNotFoundError as error:
            print(f"edge-agent: needs the extra `hil`: {error}", file=sys.stderr)
            return EXIT_FAILED
        code: int = command.main(args)
        return code

    return run


if __name__ == "__main__":
    sys.exit(main())
