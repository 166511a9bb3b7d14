"""Write and read the messages of participants and server: JSON for the structure, raw bytes for the payload.

    8 bytes length of the JSON | JSON {"kind", "fields", "blobs": [lengths]} | the blobs, one after the other

Reading executes nothing and checks every field; whoever carries the bytes bounds their number.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hecompile.errors import FederationError
from hecompile.runtime.federation.protocol.settings import RoundHeader

_BLOB = "$blob"


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


class Opening(Message):
    """Say whose updates were added, with their sealed shares for this participant: server → one participant."""

    kind = "opening"
    header: dict[str, Any]
    adverts: list[Advert]
    shares: dict[str, bytes]


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


_KINDS: dict[str, type[Message]] = {
    kind.kind: kind for kind in (Advert, Invitation, Start, Contribution, Opening, SumShare, Refusal, Finished)
}
M = TypeVar("M", bound=Message)


def to_bytes(message: Message) -> bytes:
    """Write a message as it travels."""
    blobs: list[bytes] = []
    fields = _detach({name: getattr(message, name) for name in type(message).model_fields}, blobs)
    head = json.dumps({"kind": message.kind, "fields": fields, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def from_bytes(data: bytes) -> Message:
    """Read a message. Raises FederationError for anything that `to_bytes` does not write."""
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
        return _KINDS[head["kind"]].model_validate(_attach(head["fields"], blobs))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, ValidationError):
        raise FederationError("a message of the federation is malformed or cut short") from None


def expect(kind: type[M], message: Message) -> M:
    """Return the message if it is of that kind. Raises FederationError otherwise; for a refusal, with its reason."""
    if isinstance(message, Refusal):
        raise FederationError(f"{message.name!r} refused: {message.reason}")
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
