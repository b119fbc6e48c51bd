"""Line coverage of firmware/core from the counts of a `host-cov` library: coverage.py BUILD_FOLDER FLOOR_PERCENT.

Uses the compiler's own `gcov`. A header counts once, with the best that any file that includes it did.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def lines_of(build: Path) -> dict[str, dict[int, bool]]:
    """{file: {line: it ran}} of firmware/core."""
    ran: dict[str, dict[int, bool]] = defaultdict(dict)
    for counts in sorted(build.glob("src/core/*.gcda")):
        command = ["gcov", "--json-format", "--stdout", counts.name]
        said = subprocess.run(command, cwd=counts.parent, check=True, capture_output=True, text=True).stdout
        for file in json.loads(said)["files"]:
            name = file["file"].removeprefix("./")
            if "core/" not in name or name.startswith("/usr"):
                continue
            lines = ran[name[name.rindex("core/") :]]
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = lines.get(number, False) or line["count"] > 0
    return ran


def spans(numbers: list[int]) -> str:
    """3, 5 to 7 as "3 5-7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def main() -> int:
    build, floor = Path(sys.argv[1]), float(sys.argv[2])
    ran = lines_of(build)
    if not ran:
        sys.exit(f"{build}: no counts there")
    for name, lines in sorted(ran.items()):
        done = sum(lines.values())
        missed = spans(sorted(number for number, was in lines.items() if not was))
        said = f"{name:28}{done:6} of {len(lines):5}{100 * done / len(lines):7.1f} %  {missed}"
        sys.stdout.write(said.rstrip() + "\n")
    done, total = sum(sum(lines.values()) for lines in ran.values()), sum(map(len, ran.values()))
    share = 100 * done / total
    sys.stdout.write(f"{'firmware/core':28}{done:6} of {total:5}{share:7.1f} %  (floor {floor:g} %)\n")
    return 0 if share >= floor else 1


if __name__ == "__main__":
    sys.exit(main())
