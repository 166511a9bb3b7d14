"""Count the bytes of words that have any number of bits: in memory, where they are whole, and on the wire."""

from __future__ import annotations


def bytes_of(bits: int) -> int:
    """Return how many whole bytes hold a word of so many bits."""
    return -(-bits // 8)


def unused_bits(bits: int) -> int:
    """Return how many of the lowest bits of those bytes are 0: a word has the highest."""
    return -bits % 8


def wire_bytes(bits: int, values: int) -> int:
    """Return the bytes that so many words take on the wire: whole ones, and packed bits in multiples of 64 words.

    See `hecompile.runtime.wire.word_bits`.
    """
    return bits // 8 * values + bits % 8 * 8 * -(-values // 64)
