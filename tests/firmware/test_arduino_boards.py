"""What the boards under the Arduino framework bring besides code; no board and no registry is needed for it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

ARDUINO = Path(__file__).parents[2] / "firmware" / "boards" / "arduino"
FLASH_BYTES = 4 << 20
"""The smallest flash of an ESP32-S3 board in the shops."""
TABLE_END = 0x9000
"""Below are the boot loader and the table itself."""
BOOT_APP = 0xE000
"""Where the Arduino core's upload puts boot_app0.bin."""
ALIGNMENT = {"app": 0x10000, "data": 0x1000}
"""ESP-IDF, "Partition Tables": of an application and of data, offsets in bytes."""


class Partition(NamedTuple):
    name: str
    type: str
    subtype: str
    offset: int
    size: int


def partitions() -> list[Partition]:
    lines = [line for line in (ARDUINO / "esp32.csv").read_text().splitlines() if line and not line.startswith("#")]
    rows = [[field.strip() for field in row] for row in csv.reader(lines)]
    return [Partition(row[0], row[1], row[2], *(int(field, 0) for field in row[3:])) for row in rows]


def test_the_partition_table_of_the_esp32_is_one() -> None:
    end = TABLE_END
    for one in partitions():
        assert one.offset >= end, f"{one.name} overlaps what is before it"
        assert one.offset % ALIGNMENT[one.type] == 0 and one.size % ALIGNMENT["data"] == 0, one.name
        end = one.offset + one.size
        assert not one.offset < BOOT_APP + 1 <= end, f"{one.name} is written to at every upload"
    assert end <= FLASH_BYTES
    assert [(one.type, one.subtype) for one in partitions()][:2] == [("data", "nvs"), ("app", "factory")]


def test_the_partition_that_the_code_looks_for_is_there() -> None:
    (wanted,) = re.findall(r'esp_partition_find_first\([^)]*"(\w+)"\)', (ARDUINO / "esp32.cpp").read_text())
    (models,) = [one for one in partitions() if one.name == wanted]
    assert models.type == "data"
    assert models.size >= 512 << 10, "two slots, each with room for the largest model that a board is given"
