"""The rows of `edge-agent mcu bench` that say what of a line's rate arrives."""

from agent.cli_mcu_goodput import NOT_PACED, _shares, line_of

ROW = {"name": "infer, 4 at once", "per_second": 10.0, "payload_bytes": 50, "frame_bytes": 30}


def test_a_paced_line_has_shares() -> None:
    row = ROW | _shares(100, 50, 0.125, 9600)  # 100 bytes take 0.104 s
    assert row["line_share_percent"] == 83.3
    assert "line 83.3 %, goodput 41.7 %" in line_of(row)


def test_a_line_that_is_faster_than_its_rate_is_not_paced() -> None:
    row = ROW | _shares(100, 50, 0.01, 9600)
    assert row["paced"] is False and "goodput_percent" not in row
    assert NOT_PACED in line_of(row) and "%" not in line_of(row)


def test_without_a_rate_there_is_no_floor() -> None:
    assert _shares(100, 50, 0.01, None) == {}
