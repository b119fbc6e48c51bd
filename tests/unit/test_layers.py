"""The floors of the house: who may import whom, what may do no I/O, and that no file grows beyond reading.

`docs/architecture.md` says why. The sources are parsed, not imported.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 450
GENERATED = ("tests/vectors/frames.json", "docs/routing-proof.json", "LICENSE")
BINARY = {".npz", ".tflite", ".onnx", ".png", ".gz", ".ico", ".bin"}

FLOORS: tuple[tuple[str, ...], ...] = (
    ("agent.__version__", "agent.core"),
    ("agent.config", "agent.sdnotify"),
    ("agent.config_load", "agent.telemetry"),
    ("agent.wire",),
    ("agent.registry", "agent.runtimes", "agent.store", "agent.link", "agent.security"),
    ("agent.settings", "agent.supervisor", "agent.targets"),
    ("agent.routing", "agent.build"),
    ("agent.pipeline", "agent.durable"),
    ("agent.ingress", "agent.worker"),
    ("agent.parts",),
    ("agent.app",),
    ("agent.serve",),
    ("agent.cli",),
)
"""From the ground up. A part imports from floors below its own, and within itself; parts of one floor are strangers."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importer, imported): why. Empty is best."""

NO_IO = (
    "agent.wire",
    "agent.routing.decision",
    "agent.routing.policy",
    "agent.routing.scorecard",
    "agent.routing.utility",
    "agent.routing.breaker",
    "agent.routing.budget",
    "agent.routing.estimate",
    "agent.routing.limits",
    "agent.routing.line",
    "agent.routing.meter",
    "agent.routing.retry_budget",
    "agent.link.backoff",
    "agent.link.timesync",
    "agent.registry.tensors",
    "agent.registry.calibration",
    "agent.registry.fitting",
    "agent.registry.confidence",
    "agent.core.types",
    "agent.core.errors",
    "agent.security.chain",
    "agent.security.identity",
    "agent.security.limits",
    "agent.security.repeats",
)
"""Pure: what they need of the world, time and chance included, is an argument."""

IO_MODULES = """
aiohttp asyncio concurrent ctypes datetime fastapi glob http httpx importlib io logging mmap multiprocessing os paho
pathlib prometheus_client psutil pty queue secrets select selectors serial shutil signal socket sqlite3 ssl subprocess
sys tempfile termios threading time urllib uuid uvicorn uvloop yaml
"""
PURE_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("agent.routing.breaker", "random"): "the default of its random source, which is an argument",
}


class Import(NamedTuple):
    importer: str
    imported: str
    lazy: bool
    """Inside a function: done when needed, if at all."""
    typing_only: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    return {module_name(path): path for folder in ("agent", "hil") for path in sorted((ROOT / folder).rglob("*.py"))}


MODULES = frozenset(sources())
PACKAGES = frozenset(name for name, path in sources().items() if path.name == "__init__.py")


def imports_of(name: str, text: str) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, lazy, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name.split(".")[: len(name.split(".")) - child.level + (name in PACKAGES)]
                    base = ".".join([*package, *filter(None, [base])])
                for alias in child.names:  # `from agent import cli_mcu` imports a module, `import __version__` a value
                    whole = f"{base}.{alias.name}"
                    inner = whole in MODULES or base == "agent"
                    yield Import(name, whole if inner else base, lazy, typing_only)
            else:
                guarded = isinstance(child, ast.If) and ast.unparse(child.test) in (
                    "TYPE_CHECKING",
                    "typing.TYPE_CHECKING",
                )
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, lazy or function, typing_only or guarded)

    yield from visit(ast.parse(text), False, False)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for name, path in sources().items() for found in imports_of(name, path.read_text("utf-8")))


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def part_of(name: str) -> tuple[int, str]:
    """Floor and part that a module belongs to. `cli_mcu` and its like belong to `cli`."""
    if name.startswith("agent.cli_"):
        name = "agent.cli"
    for floor, parts in enumerate(FLOORS):
        for part in parts:
            if within(name, part):
                return floor, part
    raise AssertionError(f"{name} has no floor: say in FLOORS where it belongs")


def crossings(imports: Iterator[Import] | tuple[Import, ...]) -> list[str]:
    """Imports of `agent` that do not go down, nor stay within their part."""
    found = []
    for importer, imported, _, typing_only in imports:
        if not importer.startswith("agent.") or not imported.startswith("agent.") or typing_only:
            continue
        (floor, part), (below, other) = part_of(importer), part_of(imported)
        if part != other and below >= floor and (importer, imported) not in EXCEPTIONS:
            found.append(f"{importer} (floor {floor}) imports {imported} (floor {below})")
    return found


# --- imports ---------------------------------------------------------------------------------------------------------


def test_imports_go_down_only() -> None:
    assert crossings(all_imports()) == []


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    parts = {part_of(name)[1] for name in MODULES if name.startswith("agent.")}
    assert parts == {part for floor in FLOORS for part in floor} - {"agent.__version__"}


def test_every_exception_is_still_needed() -> None:
    real = {(importer, imported) for importer, imported, *_ in all_imports()}
    assert set(EXCEPTIONS) | set(PURE_EXCEPTIONS) <= real
    assert all([*EXCEPTIONS.values(), *PURE_EXCEPTIONS.values()])


STRANGERS = [
    ("agent.routing", "agent.store", ()),
    ("agent.store", "agent.routing", ()),
    ("agent.ingress", "agent.targets", ()),
    ("agent.ingress", "agent.pipeline", ()),  # a door knows `ingress.base.Core`
    ("agent.routing", "agent.targets", ("agent.targets.base",)),
    ("agent.targets", "agent.store", ()),
    ("agent.core", "agent", ("agent.core",)),
    ("agent", "hil", ()),
    ("agent", "tests", ()),
    ("agent", "models", ()),
    ("hil", "tests", ()),
]


@pytest.mark.parametrize(("importer", "imported", "allowed"), STRANGERS, ids=lambda value: str(value))
def test_strangers(importer: str, imported: str, allowed: tuple[str, ...]) -> None:
    found = [
        one
        for one in all_imports()
        if within(one.importer, importer)
        and within(one.imported, imported)
        and not any(within(one.imported, part) for part in allowed)
        and not (imported == "hil" and one.lazy and part_of(one.importer)[1] == "agent.cli")
    ]
    assert found == []


def test_the_rig_is_named_in_the_command_line_only() -> None:
    """`importlib.import_module("hil.demo.main")` is an import too."""
    for name, path in sources().items():
        if name.startswith("agent.") and part_of(name)[1] != "agent.cli":
            strings = [
                node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)
            ]
            assert [text for text in strings if isinstance(text, str) and within(text, "hil")] == [], name


@pytest.mark.parametrize("part", NO_IO)
def test_what_is_pure_does_no_io_and_asks_no_clock(part: str) -> None:
    impure = {*IO_MODULES.split(), "random"}
    assert any(within(name, part) for name in MODULES)
    found = [
        (one.importer, one.imported)
        for one in all_imports()
        if within(one.importer, part)
        and one.imported.split(".")[0] in impure
        and (one.importer, one.imported) not in PURE_EXCEPTIONS
    ]
    assert found == []


def test_only_the_wiring_builds_targets() -> None:
    builders = {
        one.importer
        for one in all_imports()
        if one.imported in ("agent.targets.mcu", "agent.targets.gateway", "agent.targets.cloud")
    }
    assert {name for name in builders if name.startswith("agent.")} == {"agent.build"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("agent.core.clock", "from agent.config import Config"),
        ("agent.store.cache", "import agent.routing.policy"),
        ("agent.wire.lane", "from ..link import mqtt"),
        ("agent.wire", "from .. import link"),
        ("agent.wire.frame", "def f():\n    from agent.link import session"),
        ("agent.link.session", "from agent import app"),
        ("agent.runtimes.pool", "if True:\n    import agent.registry.catalog"),
    ],
)
def test_a_crossing_would_be_seen(name: str, text: str) -> None:
    assert len(crossings(tuple(imports_of(name, text)))) == 1


# --- the plan --------------------------------------------------------------------------------------------------------

PLAN = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def named_in_the_plan() -> set[str]:
    """Paths of files, and of folders of the rig that are described as a whole."""
    paths = set(re.findall(r"`([a-z_/]+\.py|hil/[a-z_]+/)`", PLAN)) - {"tests/unit/test_layers.py"}
    return {path if path.startswith("hil/") else f"agent/{path.removeprefix('agent/')}" for path in paths}


def test_every_module_is_in_the_plan() -> None:
    named = named_in_the_plan()
    folders = tuple(path for path in named if path.endswith("/"))
    modules = {str(path.relative_to(ROOT)) for path in tracked() if path.suffix == ".py" and path.name != "__init__.py"}
    modules = {path for path in modules if path.startswith(("agent/", "hil/"))}
    assert {path for path in modules - named if not path.startswith(folders)} == set(), (
        "add them to docs/architecture.md"
    )


def test_the_plan_names_nothing_that_is_not_there() -> None:
    assert [path for path in named_in_the_plan() if not (ROOT / path).exists()] == []


def test_the_plan_has_the_floors_that_are_enforced() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PLAN, re.MULTILINE)
    told = {int(floor): {f"agent.{part}" for part in re.findall(r"`(\w+)`", parts)} for floor, parts in rows}
    assert told == {floor: set(parts) - {"agent.__version__"} for floor, parts in enumerate(FLOORS)}


# --- files -----------------------------------------------------------------------------------------------------------


@cache
def tracked() -> tuple[Path, ...]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    paths = (ROOT / name for name in listed.decode().split("\0") if name)
    return tuple(path for path in paths if path.is_file() and path.suffix not in BINARY)


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them by their name alone."""
    names = [path.name for path in tracked() if path.match("tests/**/test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_file_is_longer_than_can_be_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if str(path.relative_to(ROOT)) not in GENERATED and (lines := path.read_bytes().count(b"\n")) > MAX_LINES
    }
    assert long == {}


def test_no_file_knows_the_machine_it_was_made_on() -> None:
    folders = [
        b"/".join((b"", *parts, b""))
        for parts in ((b"work", b"main"), (b"work", b"shared"), (b"tmp", b"pw"), (b"root",))
    ]
    found = [(str(path), folder) for path in tracked() for folder in folders if folder in path.read_bytes()]
    assert found == []
