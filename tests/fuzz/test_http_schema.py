"""Every operation of the daemon's own OpenAPI document, asked with what schemathesis makes of its schemas and against
them: no answer is a server's fault, and each is one that the document announces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from hil.processes import Stage, free_port
from tests.fuzz.payloads import SOME

load_all_checks()
PORT = free_port()
WANTED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Stage(tmp_path_factory.mktemp("schema")) as stage:
        process = stage.daemon(
            {
                "gateway": {"id": "fuzz", "state_dir": str(stage.folder / "state")},
                "mqtt": {"enabled": False},
                "http": {"port": PORT, "max_body_bytes": 100_000},
            }
        )
        yield f"http://127.0.0.1:{PORT}"
        assert process.alive()
        assert "Traceback" not in process.tail(1 << 20)
        assert process.terminate() == 0


MODES = {"fitting": GenerationMode.POSITIVE, "not fitting": GenerationMode.NEGATIVE}


@pytest.mark.parametrize("mode", MODES)
def test_no_answer_is_one_that_the_document_does_not_know(daemon: str, mode: str) -> None:
    schema = schemathesis.openapi.from_url(f"{daemon}/openapi.json")
    checks = CHECKS.get_by_names(list(WANTED))
    asked = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            cases = operation.as_strategy(generation_mode=MODES[mode])
        except schemathesis.errors.Unsatisfiable:  # nothing can be wrong about a question without parameters
            continue

        @SOME
        @hypothesis.given(case=cases)
        def ask(case: schemathesis.Case) -> None:
            asked[case.operation.label] += 1
            case.call_and_validate(base_url=daemon, checks=checks)

        with suppress(hypothesis.errors.Unsatisfiable):
            ask()
    assert asked["POST /infer"] >= 10
    if mode == "fitting":
        assert set(asked) == {found.ok().label for found in schema.get_all_operations()}
