"""What is written is read, and nothing else is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import FederationError
from hecompile.runtime.federation.protocol import messages
from hecompile.runtime.federation.protocol.messages import (
    VERSION,
    Advert,
    Confirmation,
    Contribution,
    Contributors,
    Finished,
    Opening,
    Refusal,
    Start,
    SumShare,
    expect,
    from_bytes,
    read_header,
    to_bytes,
)

_bytes, _names = st.binary(max_size=40), st.text(max_size=8)
_adverts = st.builds(Advert, name=_names, public=_bytes, signature=_bytes)
_MESSAGES = st.one_of(
    _adverts,
    st.builds(
        Start, header=st.dictionaries(_names, st.integers()), adverts=st.lists(_adverts, max_size=3), adapter=_bytes
    ),
    st.builds(Contribution, name=_names, update=_bytes, shares=st.dictionaries(_names, _bytes, max_size=3)),
    st.builds(Contributors, header=st.just({}), adverts=st.just([]), names=st.lists(_names, max_size=3)),
    st.builds(Confirmation, name=_names, signature=_bytes),
    st.builds(
        Opening,
        header=st.just({}),
        adverts=st.just([]),
        shares=st.dictionaries(_names, _bytes, max_size=3),
        confirmations=st.dictionaries(_names, _bytes, max_size=3),
    ),
    st.builds(SumShare, name=_names, share=_bytes),
    st.builds(Finished, adapter=_bytes, rounds=st.integers(0, 9)),
)


@settings(max_examples=100, deadline=None)
@given(message=_MESSAGES)
def test_messages_survive_the_wire(message: Advert) -> None:
    assert from_bytes(to_bytes(message)) == message


@settings(max_examples=300, deadline=None)
@given(message=_MESSAGES, at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_messages_are_one_error_or_another_message(message: Advert, at: float, bit: int, cut: bool) -> None:
    data = bytearray(to_bytes(message))
    place = min(int(at * len(data)), len(data) - 1)
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    try:
        read = from_bytes(bytes(data))
    except FederationError as error:
        assert "malformed or cut short" in str(error) or ("of version" in str(error) and not cut)
    else:
        assert not cut and to_bytes(read)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_garbage_is_one_error(data: bytes) -> None:
    with pytest.raises(FederationError):
        from_bytes(data)


@pytest.mark.parametrize("version", [1, VERSION + 1])
def test_a_message_of_another_version_is_named(version: int) -> None:
    head = {"version": version, "kind": "refusal", "fields": {"name": "a", "reason": "b"}, "blobs": []}
    if version == 1:
        del head["version"]  # the first one did not say
    data = json.dumps(head).encode()
    with pytest.raises(
        FederationError, match=f"writes messages of version {version}, this one {VERSION}: run the same"
    ):
        from_bytes(len(data).to_bytes(8, "little") + data)


@pytest.mark.parametrize("beyond", [0, 1])
def test_the_head_of_a_message_is_bounded(beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head at the bound is read; a longer one is refused before it is decoded."""
    data = to_bytes(SumShare(name="a", share=b"share"))
    size = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + size] + b" " * (messages._MOST_HEAD_BYTES + beyond - size)
    decoded: list[int] = []
    parse = messages.parse_json
    monkeypatch.setattr(messages, "parse_json", lambda text: decoded.append(len(text)) or parse(text))
    padded = len(head).to_bytes(8, "little") + head + data[8 + size :]
    if beyond:
        with pytest.raises(FederationError, match="malformed or cut short"):
            from_bytes(padded)
        assert decoded == []
    else:
        assert from_bytes(padded) == SumShare(name="a", share=b"share")
        assert decoded == [messages._MOST_HEAD_BYTES]


def test_unexpected_messages_and_headers() -> None:
    with pytest.raises(FederationError, match="'a' refused: because"):
        expect(Advert, Refusal(name="a", reason="because"))
    with pytest.raises(FederationError, match="'advert' was due, got 'finished'"):
        expect(Advert, Finished(adapter=b"", rounds=1))
    with pytest.raises(FederationError, match="header is not acceptable"):
        read_header({"number": 0})
