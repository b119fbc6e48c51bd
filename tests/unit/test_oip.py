"""The Open Inference Protocol codec: what it writes it reads, and nothing else gets past it."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.wire import oip


def test_request_survives_the_way() -> None:
    inputs = {"pixels": np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1), "mask": np.array([1, -2], np.int8)}
    data, length = oip.encode_request(inputs, parameters={"trace": 7})
    request = oip.decode_request(data, length)
    assert list(request.inputs) == ["pixels", "mask"]
    for name, value in inputs.items():
        np.testing.assert_array_equal(request.inputs[name], value)
        assert request.inputs[name].dtype == value.dtype
    assert request.binary_output
    assert request.parameters["trace"] == 7


def test_header_is_what_the_extension_describes() -> None:
    data, length = oip.encode_request({"x": np.zeros((1, 3), np.float16)})
    assert json.loads(data[:length]) == {
        "parameters": {"binary_data_output": True},
        "inputs": [{"name": "x", "datatype": "FP16", "shape": [1, 3], "parameters": {"binary_data_size": 6}}],
    }
    assert len(data) == length + 6


@pytest.mark.parametrize("binary", [True, False])
def test_response_survives_the_way(binary: bool) -> None:
    sent = oip.OipResponse("digits", {"probabilities": np.array([[0.25, 0.75]], np.float32)}, "1", "id-1", {"a": 1.5})
    received = oip.decode_response(*oip.encode_response(sent, binary=binary))
    assert (received.model_name, received.model_version, received.id) == ("digits", "1", "id-1")
    assert received.parameters == {"a": 1.5}
    np.testing.assert_array_equal(received.outputs["probabilities"], sent.outputs["probabilities"])


def test_json_request_as_triton_clients_send_it() -> None:
    body = b"""{"id": "7", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}],
                "outputs": [{"name": "y", "parameters": {"binary_data": true}}, {"name": "z"}]}"""
    request = oip.decode_request(body)
    np.testing.assert_array_equal(request.inputs["x"], [[1, 2], [3, 4]])
    assert request.outputs == (oip.RequestedOutput("y", True), oip.RequestedOutput("z", False))
    assert request.id == "7"


def tensor(**changes: object) -> bytes:
    entry = {"name": "x", "datatype": "INT8", "shape": [2], "data": [1, 2]} | changes
    return json.dumps({"inputs": [{key: value for key, value in entry.items() if value != "absent"}]}).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "JSON object"),
        (b"{}", "inputs must hold"),
        (b'{"inputs": 3}', "inputs must be a list"),
        (b'{"inputs": [3]}', "must hold objects"),
        (b"[" * 100_000, "not JSON"),
        (tensor(name=""), "name"),
        (tensor(datatype="BYTES"), "datatype"),
        (tensor(datatype=["FP32"]), "datatype"),
        (tensor(shape=[3]), "shape"),
        (tensor(shape=[]), "shape"),
        (tensor(shape=[-1]), "shape"),
        (tensor(shape=[1 << 31, 1 << 31]), "2^31"),
        (tensor(shape=[True, 2]), "shape"),
        (tensor(data=[1, 300]), "int8 cannot"),
        (tensor(data=[1, 2.5]), "values of int8"),
        (tensor(data=[1, "a"]), "values of int8"),
        (tensor(data=[[1], [2, 3]]), "rows differ"),
        (tensor(data="absent"), "must be a list"),
        (tensor(parameters={"binary_data_size": 2}), "both"),
        (tensor(data="absent", parameters={"binary_data_size": 3}), "must be 2"),
        (tensor(data="absent", parameters={"binary_data_size": 2}), "2 bytes too early"),
        (tensor(data="absent", parameters=[]), "parameters"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', "not JSON"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says.replace("^", r"\^")):
        oip.decode_request(body)


@pytest.mark.parametrize("length", [0, -1, 10_000_000])
def test_header_length_out_of_range(length: int) -> None:
    with pytest.raises(ProtocolError, match="header-content-length"):
        oip.decode_request(tensor(), length)


def test_trailing_bytes_and_doubled_names() -> None:
    data, length = oip.encode_request({"x": np.zeros(2, np.float32)})
    with pytest.raises(ProtocolError, match="1 bytes follow"):
        oip.decode_request(data + b"\0", length)
    twice = json.dumps({"outputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}] * 2}).encode()
    with pytest.raises(ProtocolError, match="twice"):
        oip.decode_response(twice)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "one", "9" * 10, "٣"])
def test_header_length_property(text: str) -> None:
    with pytest.raises(ProtocolError):
        oip.header_length(text)


@given(st.binary(max_size=300), st.none() | st.integers(-5, 400))
def test_random_bytes_raise_protocol_errors_only(data: bytes, length: int | None) -> None:
    for decode in (oip.decode_request, oip.decode_response):
        with contextlib.suppress(ProtocolError):
            decode(data, length)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("FP32"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "binary_data_size", "id"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(st.fixed_dictionaries({"inputs": st.lists(_json, max_size=3), "outputs": _json}), st.binary(max_size=16))
def test_random_documents_raise_protocol_errors_only(document: object, tail: bytes) -> None:
    header = json.dumps(document).encode()
    for decode in (oip.decode_request, oip.decode_response):
        with contextlib.suppress(ProtocolError):
            decode(header + tail, len(header))


@pytest.mark.parametrize("data", [["x" * 20_000, *[""] * 2_000], [[1, 2], ["x"]], [True, 2], [None], [[[{}]]]])
def test_what_are_no_numbers_is_refused_before_an_array_is_made_of_it(
    data: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 28 kB numpy would make 160 MB."""
    monkeypatch.setattr(oip.np, "asarray", lambda *_: pytest.fail("made"))
    entry = {"name": "y", "datatype": "INT32", "shape": [2], "data": data}
    with pytest.raises(ProtocolError, match=r"outputs\[0\].data must hold values of int32"):
        oip.decode_response(json.dumps({"model_name": "m", "outputs": [entry]}).encode())
