"""`edge-agent mcu`: numbers that no field of the protocol holds are refused in words."""

from __future__ import annotations

import argparse

import pytest

from agent.cli_mcu import add_parser


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["mcu", *arguments, "--port", "/dev/null"])


@pytest.mark.parametrize(
    ("action", "option", "most"),
    [
        (("push", "digits"), "--counter", (1 << 32) - 1),
        (("stream",), "--source", 255),
        (("stream",), "--interval-ms", 3_600_000),
    ],
)
def test_a_number_over_its_field_is_a_usage_error(
    action: tuple[str, ...], option: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert most in vars(parse(*action, option, str(most))).values()
    with pytest.raises(SystemExit):
        parse(*action, option, str(most + 1))
    assert f"{option}: must be" in capsys.readouterr().err
