"""Write and read the messages of participants and server: JSON for the structure, raw bytes for the payload.

    8 bytes length of the JSON | JSON {"version", "kind", "fields", "blobs": [lengths]} | the blobs, one after the other

Reading executes nothing and checks every field; whoever carries the bytes bounds their number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hecompile.errors import FederationError
from hecompile.foreign import parse_json, printable
from hecompile.runtime.federation.protocol.settings import RoundHeader

VERSION = 2
"""Version of the messages. Those of version 1 do not say theirs; its rounds have no confirmations."""
_BLOB = "$blob"
_MOST_HEAD_BYTES = 4 << 20
"""JSON takes up to thirty times its bytes in memory; a participant takes a few hundred bytes of it."""


class Message(BaseModel):
    """Serve as the base of all messages; `kind` names one on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: ClassVar[str]


class Advert(Message):
    """Send the X25519 key of the round and the signature over it: participant → server."""

    kind = "advert"
    name: str
    public: bytes
    signature: bytes


class Invitation(Message):
    """Begin a round: server → participants."""

    kind = "invitation"
    header: dict[str, Any]


class Start(Message):
    """Say who takes part, with the global adapter, float32 little endian: server → participants."""

    kind = "start"
    header: dict[str, Any]
    adverts: list[Advert]
    adapter: bytes


class Contribution(Message):
    """Send the encrypted update, and a sealed share of its key for every participant: participant → server."""

    kind = "contribution"
    name: str
    update: bytes
    shares: dict[str, bytes]


class Contributors(Message):
    """Say whose updates were added: server → participants."""

    kind = "contributors"
    header: dict[str, Any]
    adverts: list[Advert]
    names: list[str]


class Confirmation(Message):
    """Send the signature over the contributors: participant → server."""

    kind = "confirmation"
    name: str
    signature: bytes


class Opening(Message):
    """Send the contributors' sealed shares for this participant, and who confirmed them: server → one participant."""

    kind = "opening"
    header: dict[str, Any]
    adverts: list[Advert]
    shares: dict[str, bytes]
    confirmations: dict[str, bytes]


class SumShare(Message):
    """Send its share of the sum of the contributors' keys: participant → server."""

    kind = "sum_share"
    name: str
    share: bytes


class Refusal(Message):
    """Refuse to go on, for a reason without a figure of the owner's update or data: participant → server."""

    kind = "refusal"
    name: str
    reason: str


class Finished(Message):
    """End the federation, with the global adapter as in `Start`: server → participants."""

    kind = "finished"
    adapter: bytes
    rounds: int


class Pending(Message):
    """Hold a round that the server has not finished; on its disk alone, never on the wire.

    `total` is the encrypted sum of the contributions, `shares` their sealed shares by contributor and recipient.
    """

    kind = "pending"
    header: dict[str, Any]
    adverts: list[Advert]
    contributors: list[str]
    shares: dict[str, dict[str, bytes]]
    total: bytes
    bytes_up: int


_KINDS: dict[str, type[Message]] = {
    kind.kind: kind
    for kind in (
        Advert, Invitation, Start, Contribution, Contributors, Confirmation, Opening, SumShare, Refusal, Finished,
    )
}  # fmt: skip
M = TypeVar("M", bound=Message)


def to_bytes(message: Message) -> bytes:
    """Write a message as it travels."""
    blobs: list[bytes] = []
    fields = _detach({name: getattr(message, name) for name in type(message).model_fields}, blobs)
    lengths = [len(blob) for blob in blobs]
    head = json.dumps({"version": VERSION, "kind": message.kind, "fields": fields, "blobs": lengths}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def from_bytes(data: bytes) -> Message:
    """Read a message. Raises FederationError for anything that `to_bytes` does not write, or another version wrote."""
    return _read(data, _KINDS)


def read_as(kind: type[M], data: bytes) -> M:
    """Read what `to_bytes` wrote of that kind. Raises FederationError for anything else."""
    return expect(kind, _read(data, {kind.kind: kind}))


def _read(data: bytes, kinds: Mapping[str, type[Message]]) -> Message:
    try:
        size = int.from_bytes(data[:8], "little")
        if size > _MOST_HEAD_BYTES:
            raise ValueError
        head = parse_json(data[8 : 8 + size])
        version = head.get("version", 1)
        if version == VERSION:
            return _message(head, data, 8 + size, kinds)
        theirs = printable(version, 9)
    except (AttributeError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, ValidationError):
        raise FederationError("a message of the federation is malformed or cut short") from None
    raise FederationError(
        f"the other side of the federation writes messages of version {theirs}, this one {VERSION}: run the same "
        "release of hecompile at the server and at all owners"
    )


def _message(head: dict[str, Any], data: bytes, at: int, kinds: Mapping[str, type[Message]]) -> Message:
    """Put a message together from its JSON and the blobs, which begin at `at`."""
    blobs = []
    for length in head["blobs"]:
        if not isinstance(length, int) or length < 0:
            raise ValueError
        blobs.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError
    return kinds[head["kind"]].model_validate(_attach(head["fields"], blobs))


def expect(kind: type[M], message: Message) -> M:
    """Return the message if it is of that kind. Raises FederationError otherwise; for a refusal, with its reason."""
    if isinstance(message, Refusal):
        raise FederationError(f"{message.name[:200]!r} refused: {printable(message.reason)}")
    if not isinstance(message, kind):
        raise FederationError(f"a message {kind.kind!r} was due, got {message.kind!r}")
    return message


def read_header(fields: dict[str, Any]) -> RoundHeader:
    """Read and check the header of a message. Raises FederationError."""
    try:
        return RoundHeader.model_validate(fields)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise FederationError(f"the round's header is not acceptable: {reason}") from None


def _detach(value: Any, blobs: list[bytes]) -> Any:
    """Return `value` with a reference in the place of every bytes, which are appended to `blobs`."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {_BLOB: len(blobs) - 1}
    if isinstance(value, Message):
        return {name: _detach(getattr(value, name), blobs) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {key: _detach(item, blobs) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_detach(item, blobs) for item in value]
    return value


def _attach(value: Any, blobs: list[bytes]) -> Any:
    """Undo `_detach`."""
    if isinstance(value, dict):
        if value.keys() == {_BLOB}:
            return blobs[value[_BLOB]]
        return {key: _attach(item, blobs) for key, item in value.items()}
    if isinstance(value, list):
        return [_attach(item, blobs) for item in value]
    return value
