"""Frames: what is encoded is decoded, and whatever else arrives is refused with WorkerError and nothing else."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import WorkerError
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.framing import MAGIC, PREFIX, Frame, receive_frame, send_frame
from hecompile.runtime.wire.protocol import (
    CircuitInfo,
    ErrorReply,
    EvaluateReply,
    EvaluateRequest,
    HelloRequest,
    HintRequest,
    WorkerInfo,
    decode_reply,
    decode_request,
    encode,
)

PLANES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def through_a_socket(data: bytes, max_bytes: int = framing.MAX_MESSAGE_BYTES) -> Frame | None:
    """What `receive_frame` makes of `data` followed by the end of the stream."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)

    with ours, theirs:
        theirs.settimeout(10)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            return receive_frame(theirs, max_bytes)
        finally:
            sender.join()


def whole(frame: Frame) -> bytes:
    return frame.prefix() + frame.header + bytes(frame.payload)


def test_hint_round_trip() -> None:
    request = HintRequest("a.forward")
    frame = encode(request, 7)
    assert decode_request(frame) == (7, request) and not frame.payload
    file = np.arange(300, dtype=np.uint16).view(np.uint8)
    _, reply = decode_reply(encode(EvaluateReply(file[None, None], 0.0), 7))
    assert isinstance(reply, EvaluateReply) and np.array_equal(reply.planes.reshape(-1), file)


def test_hello_round_trip() -> None:
    request = HelloRequest("abcdef01")
    assert decode_request(encode(request, 7)) == (7, request)
    info = WorkerInfo("abcdef01", "torch", {"a.forward": CircuitInfo(22, 4, 12, 5)})
    assert decode_reply(encode(info, 7)) == (7, info)


def test_evaluate_round_trip_through_a_socket() -> None:
    frame = encode(EvaluateRequest("a.forward", PLANES), 3)
    assert len(whole(frame)) == frame.size
    received = through_a_socket(whole(frame))
    assert received is not None
    request_id, request = decode_request(received)
    assert isinstance(request, EvaluateRequest) and (request_id, request.circuit) == (3, "a.forward")
    np.testing.assert_array_equal(request.planes, PLANES)
    request_id, reply = decode_reply(encode(EvaluateReply(PLANES[::-1], 0.25), 4))
    assert isinstance(reply, EvaluateReply) and (request_id, reply.compute_seconds) == (4, 0.25)
    np.testing.assert_array_equal(reply.planes, PLANES[::-1])


def test_payload_is_not_copied() -> None:
    frame = encode(EvaluateRequest("a.forward", PLANES), 1)
    assert np.shares_memory(np.frombuffer(frame.payload, dtype=np.uint8), PLANES)


def test_send_frame_writes_what_receive_frame_reads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in (HelloRequest("abcdef01"), EvaluateRequest("a.forward", PLANES)):
            frame = encode(message, 1)
            send_frame(ours, frame)
            received = receive_frame(theirs)
            assert received is not None and whole(received) == whole(frame)
        ours.close()
        assert receive_frame(theirs) is None


def test_error_text_of_a_worker_is_cut_and_made_printable() -> None:
    _, reply = decode_reply(encode(ErrorReply("red \x1b[31m\n" + "x" * 5000), 0))
    assert reply == ErrorReply("red ?[31m?" + "x" * (protocol.MAX_ERROR_CHARACTERS - 10))


BAD_STREAMS = {
    "other protocol": (b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n", "wrong magic number"),
    "header too large": (PREFIX.pack(MAGIC, 1 << 31, 0), "header of 2147483648 bytes"),
    "payload too large": (PREFIX.pack(MAGIC, 2, 1 << 60), "at most 1000 are accepted"),
    "ends in the prefix": (PREFIX.pack(MAGIC, 2, 3)[:9], "closed in mid-message: 8 of 15 bytes"),
    "ends in the header": (PREFIX.pack(MAGIC, 5, 0) + b"{", "closed in mid-message: 1 of 5 bytes"),
    "ends in the payload": (PREFIX.pack(MAGIC, 2, 9) + b"{}abc", "closed in mid-message: 3 of 9 bytes"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_stream_that_cannot_be_read_on_is_refused(case: str) -> None:
    data, message = BAD_STREAMS[case]
    with pytest.raises(WorkerError, match=message):
        through_a_socket(data, max_bytes=1000)


def frame_of(header: object, payload: bytes = b"") -> Frame:
    return Frame(json.dumps(header).encode(), payload)


EVALUATE: dict[str, Any] = {"kind": "evaluate", "id": 1, "circuit": "a", "shape": [8, 2, 3]}
BAD_REQUESTS = {
    "not JSON": (Frame(b"\xff\xfe{"), "the header is not JSON"),
    "deep JSON": (Frame(b"[" * 100_000), "the header is not JSON"),
    "long number": (Frame(b'{"id": ' + b"9" * 5000 + b"}"), "the header is not JSON"),
    "not an object": (frame_of([1]), "not a JSON object"),
    "unknown kind": (frame_of({"kind": "decrypt", "id": 1}), "unknown request kind 'decrypt'"),
    "no id": (frame_of({"kind": "hello"}), "id is NoneType; needs int"),
    "id is true": (frame_of({"kind": "hello", "id": True}), "id is bool; needs int"),
    "no plan_id": (frame_of({"kind": "hello", "id": 1, "protocol": 1}), "plan_id is NoneType"),
    "control characters": (frame_of({"kind": "hello", "id": 1, "protocol": 1, "plan_id": "a\nb"}), "plan_id is not"),
    "long name": (frame_of(EVALUATE | {"circuit": "a" * 300}, b"123456"), "circuit is not 1 to 256 printable"),
    "shape of rank 2": (frame_of(EVALUATE | {"shape": [2, 3]}, b"123456"), "shape is not a list of 3 integers"),
    "shape with zero": (frame_of(EVALUATE | {"shape": [0, 2, 3]}), "shape holds something else"),
    "negative shape": (frame_of(EVALUATE | {"shape": [-1, -2, 3]}, b"123456"), "shape holds something else"),
    "fractional shape": (frame_of(EVALUATE | {"shape": [1.0, 2, 3]}, b"123456"), "shape holds something else"),
    "huge shape": (frame_of(EVALUATE | {"shape": [8, 1 << 31, 1 << 31]}, b"1"), "the payload 1"),
    "huge shape of bits": (frame_of(EVALUATE | {"shape": [9, 1 << 31, 1 << 31]}, b"1"), "the payload 1"),
    "shape in bytes": (frame_of(EVALUATE | {"shape": [1, 2, 3]}, b"123456"), "words of 1 bits; needs 8 to 32"),
    "too many bits": (frame_of(EVALUATE | {"shape": [33, 2, 3]}, b"123456"), "words of 33 bits; needs 8 to 32"),
    "a packed part too short": (frame_of(EVALUATE | {"shape": [22, 2, 3]}, b"1" * 59), "is 60 bytes, the payload 59"),
    "shape of another size": (frame_of(EVALUATE, b"12345"), "is 6 bytes, the payload 5"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_malformed_request_is_refused(case: str) -> None:
    frame, message = BAD_REQUESTS[case]
    with pytest.raises(WorkerError, match=message):
        decode_request(frame)


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1.0", '"fast"', "1e999"])
def test_reply_with_impossible_seconds_is_refused(seconds: str) -> None:
    header = f'{{"kind": "evaluate", "id": 1, "shape": [8, 1, 1], "seconds": {seconds}}}'
    with pytest.raises(WorkerError, match="seconds"):
        decode_reply(Frame(header.encode(), b"x"))


def test_only_byte_planes_are_encoded() -> None:
    with pytest.raises(WorkerError, match="planes are int8 of rank 3; needs uint8"):
        encode(EvaluateRequest("a", PLANES.view(np.int8)), 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["id", "circuit", "shape", "plan_id", "protocol", "circuits", "engine", "seconds", "message"]
KINDS = st.sampled_from(["hello", "evaluate", "error", "?"])
headers = st.builds(
    lambda kind, fields: {"kind": kind, "id": 1} | fields,
    KINDS,
    st.dictionaries(st.sampled_from(FIELDS), json_values),
)


@settings(max_examples=100, deadline=None)
@given(headers, st.binary(max_size=16))
def test_any_header_is_decoded_or_refused(header: dict[str, Any], payload: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            request_id, message = decode(frame_of(header, payload))
        except WorkerError:
            continue
        # What was accepted is a message: it can be encoded again and means the same.
        again_id, again = decode(encode(message, request_id))
        assert (again_id, type(again)) == (request_id, type(message))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_a_frame_or_refused(data: bytes, with_magic: bool) -> None:
    if with_magic:
        data = PREFIX.pack(MAGIC, len(data) // 2, len(data) - len(data) // 2) + data
    try:
        frame = through_a_socket(data)
    except WorkerError:
        return
    assert frame is None if not data else frame is not None and whole(frame) == data[: frame.size]
