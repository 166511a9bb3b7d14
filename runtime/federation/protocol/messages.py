"""What participants and server send each other, and how it is written: JSON for the structure, raw bytes for the payload.

    8 bytes length of the JSON | JSON {"kind", "fields", "blobs": [lengths]} | the blobs, one after the other

Nothing is executed to read one, every field is checked, and sizes are bounded by whoever carries the bytes.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hecompile.errors import FederationError
from hecompile.runtime.federation.protocol.settings import RoundHeader

_BLOB = "$blob"


class Message(BaseModel):
    """Base; `kind` names it on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: ClassVar[str]


class Advert(Message):
    """Participant → server: the X25519 key of the round and the signature over it."""

    kind = "advert"
    name: str
    public: bytes
    signature: bytes


class Invitation(Message):
    """Server → participants: a round begins."""

    kind = "invitation"
    header: dict[str, Any]


class Start(Message):
    """Server → participants: who takes part, and the global adapter, float32 little endian."""

    kind = "start"
    header: dict[str, Any]
    adverts: list[Advert]
    adapter: bytes


class Contribution(Message):
    """Participant → server: the encrypted update, and a sealed share of its key for every participant."""

    kind = "contribution"
    name: str
    update: bytes
    shares: dict[str, bytes]


class Opening(Message):
    """Server → one participant: whose updates were added, and their sealed shares for this participant."""

    kind = "opening"
    header: dict[str, Any]
    adverts: list[Advert]
    shares: dict[str, bytes]


class SumShare(Message):
    """Participant → server: its share of the sum of the contributors' keys."""

    kind = "sum_share"
    name: str
    share: bytes


class Refusal(Message):
    """Participant → server: it cannot go on. The reason has no figure of the owner's update or data."""

    kind = "refusal"
    name: str
    reason: str


class Finished(Message):
    """Server → participants: the federation is over; the global adapter as in `Start`."""

    kind = "finished"
    adapter: bytes
    rounds: int


_KINDS: dict[str, type[Message]] = {
    kind.kind: kind for kind in (Advert, Invitation, Start, Contribution, Opening, SumShare, Refusal, Finished)
}
M = TypeVar("M", bound=Message)


def to_bytes(message: Message) -> bytes:
    """The message as it travels."""
    blobs: list[bytes] = []
    fields = _out({name: getattr(message, name) for name in type(message).model_fields}, blobs)
    head = json.dumps({"kind": message.kind, "fields": fields, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def from_bytes(data: bytes) -> Message:
    """Raises FederationError for anything that `to_bytes` does not write."""
    try:
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])
        blobs, at = [], 8 + size
        for length in head["blobs"]:
            if not isinstance(length, int) or length < 0:
                raise ValueError
            blobs.append(data[at : at + length])
            at += length
        if at != len(data):
            raise ValueError
        return _KINDS[head["kind"]].model_validate(_in(head["fields"], blobs))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, ValidationError):
        raise FederationError("a message of the federation is malformed or cut short") from None


def expect(kind: type[M], message: Message) -> M:
    """The message, if it is of that kind. Raises FederationError otherwise; a refusal with its reason."""
    if isinstance(message, Refusal):
        raise FederationError(f"{message.name!r} refused: {message.reason}")
    if not isinstance(message, kind):
        raise FederationError(f"a message {kind.kind!r} was due, got {message.kind!r}")
    return message


def read_header(fields: dict[str, Any]) -> RoundHeader:
    """The header of a message, checked. Raises FederationError."""
    try:
        return RoundHeader.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise FederationError(f"the round's header is not acceptable: {reason}") from None


def _out(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, bytes):
        blobs.append(value)
        return {_BLOB: len(blobs) - 1}
    if isinstance(value, Message):
        return {name: _out(getattr(value, name), blobs) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {key: _out(item, blobs) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_out(item, blobs) for item in value]
    return value


def _in(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BLOB}:
            return blobs[value[_BLOB]]
        return {key: _in(item, blobs) for key, item in value.items()}
    if isinstance(value, list):
        return [_in(item, blobs) for item in value]
    return value
