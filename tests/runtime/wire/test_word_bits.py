"""Words of any number of bits: what is packed is unpacked, and the message is what the definition says."""

from __future__ import annotations

import numpy as np
import pytest

from hecompile.errors import WorkerError
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.protocol import EvaluateReply, EvaluateRequest, decode_reply, decode_request, encode
from hecompile.runtime.wire.word_bits import pack, unpack
from hecompile.word_sizes import bytes_of, unused_bits, wire_bytes

BITS = [8, 9, 10, 12, 15, 16, 19, 21, 22, 24, 31, 32]


def words_of(bits: int, tokens: int, features: int) -> np.ndarray:
    planes = np.random.default_rng(bits).integers(0, 256, (bytes_of(bits), tokens, features), dtype=np.uint8)
    planes[0] &= 255 << unused_bits(bits) & 255
    return planes


def packed_by_hand(plane: np.ndarray, kept: int) -> bytes:
    """By Python's integers: a column is eight values, one from each lane."""
    length = 8 * -(-plane.size // 64)
    lanes = np.concatenate([plane.reshape(-1), np.zeros(8 * length - plane.size, np.uint8)]).reshape(8, length)
    columns = [sum(int(value) >> 8 - kept << kept * lane for lane, value in enumerate(column)) for column in lanes.T]
    return b"".join(bytes(column >> 8 * place & 255 for column in columns) for place in range(kept))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (3, 7), (2, 32), (5, 96), (9, 300), (40, 480)])
def test_round_trip(bits: int, tokens: int, features: int) -> None:
    planes = words_of(bits, tokens, features)
    whole, packed = pack(planes, bits)
    assert whole.size + packed.size == wire_bytes(bits, tokens * features)
    if bits % 8:
        assert bytes(whole) == planes[1:].tobytes() and bytes(packed) == packed_by_hand(planes[0], bits % 8)
    np.testing.assert_array_equal(unpack(whole, packed, bits, (tokens, features)), planes)
    message = np.frombuffer(b"x" + whole.tobytes() + packed.tobytes(), dtype=np.uint8)[1:]  # at an odd address
    again = unpack(message[: whole.size], message[whole.size :], bits, (tokens, features))
    np.testing.assert_array_equal(again, planes)


@pytest.mark.parametrize("bits", [9, 22, 32])
def test_what_a_word_has_no_bits_for_is_not_sent(bits: int) -> None:
    """Nor is what comes in place of the zeros after the last byte looked at."""
    planes = words_of(bits, 3, 7)
    below = planes.copy()
    below[0] |= (1 << unused_bits(bits)) - 1
    whole, packed = pack(below, bits)
    np.testing.assert_array_equal(unpack(whole, packed, bits, (3, 7)), planes)
    with_noise = packed.copy()
    with_noise[-8:] ^= 0x80  # the top bits of lane 7, whose bytes are all beyond the last
    np.testing.assert_array_equal(unpack(whole, with_noise, bits, (3, 7)), planes)


@pytest.mark.parametrize("bits", BITS)
def test_messages_carry_words_of_any_number_of_bits(bits: int) -> None:
    planes = words_of(bits, 5, 11)
    frame = encode(EvaluateRequest("a.forward", planes, bits), 1)
    received = Frame(frame.header, bytes(frame.joined()))
    for each in (frame, received):  # a worker in this process gets the first
        _, request = decode_request(each)
        assert isinstance(request, EvaluateRequest) and request.bits == bits
        np.testing.assert_array_equal(request.planes, planes)
    assert received.size == frame.size == len(frame.prefix() + received.header) + wire_bytes(bits, 55)
    _, reply = decode_reply(encode(EvaluateReply(planes, 0.5, bits), 1))
    assert isinstance(reply, EvaluateReply) and reply.bits == bits
    np.testing.assert_array_equal(reply.planes, planes)


def test_planes_that_are_not_those_of_the_bits_are_not_sent() -> None:
    with pytest.raises(WorkerError, match="words of 22 bits are 3 planes of bytes, not 2"):
        encode(EvaluateRequest("a.forward", words_of(16, 3, 4), 22), 1)
