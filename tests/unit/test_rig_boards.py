"""rig.yaml: what it may say, and how mistakes in it are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.core.errors import ConfigError
from hil.rig.boards import QemuBoard, RealBoard, VirtualBoard, find, load_boards


def problems(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_boards(path)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return tuple(problem.removeprefix(f"{path}: ") for problem in caught.value.problems)


def test_the_file_that_ships_names_the_virtual_and_the_emulated_board() -> None:
    boards = load_boards()
    assert isinstance(boards["virtual"], VirtualBoard) and isinstance(boards["qemu"], QemuBoard)


def test_a_real_board(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(
        "boards:\n  esp:\n    {driver: port, port: /dev/ttyX, line: uart, reset: esp,\n"
        "     uhubctl: {location: 1-1, port: 2}}\n"
    )
    board = load_boards(path)["esp"]
    assert isinstance(board, RealBoard) and board.uhubctl is not None and board.uhubctl.port == 2
    assert find("/dev/ttyX", {"esp": board}) is board


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("boards: {a: {driver: port}}", "boards.a.port.port: "),
        ("boards: {a: {driver: telepathy}}", "boards.a: "),
        ("boards: {a: {driver: virtual, bauds: 9600}}", "boards.a.virtual.bauds: "),
        ("boards: {a: {driver: virtual, window: 9}}", "boards.a.virtual.window: "),
        ("boards: {a: {driver: port, port: /dev/x, uhubctl: {location: 1-1}}}", "boards.a.port.uhubctl.port: "),
        ("board: {}", "board: "),
        ("- 1", ""),
    ],
)
def test_mistakes_name_the_key(tmp_path: Path, text: str, key: str) -> None:
    assert any(problem.startswith(key) for problem in problems(tmp_path, text))


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    assert "cannot be read as YAML" in problems(tmp_path, "boards: [")[0]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_boards(tmp_path / "none.yaml")


def test_any_port_can_be_named() -> None:
    board = find("/dev/ttyACM7", load_boards())
    assert isinstance(board, RealBoard) and board.port == "/dev/ttyACM7"
    with pytest.raises(ConfigError, match="no board 'toaster'; there are qemu, virtual"):
        find("toaster", load_boards())
