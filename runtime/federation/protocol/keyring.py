"""Remember what a participant did in a round, so that it does so once, also after a restart.

    invitation    the round's number, header and adapter, and the X25519 key of the round
    contribution  the participants it was made for, and its bytes: the same request gets the same answer
    confirmation  the contributors that were signed
    opening       the share that was given; the X25519 key is deleted

Each is durable before the participant answers, and none is overwritten within its round. The key of the encryption itself is
not here: it is drawn, used and dropped within one handler (`participant.py`). The key kept here can only unseal shares of
*others'* keys that are addressed to this participant.

Two sums that start from one adapter, or belong to one round, and differ by one owner would give that owner's update as
their difference. So shares are given for one set of contributors per round, rounds only grow, and no adapter comes twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hecompile.errors import FederationError, InputError
from hecompile.he.random.sampling import Unsharable
from hecompile.runtime.federation.protocol.channels import contributors_text
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.protocol.store import DirectoryStore, MemoryStore, Store

RECORD_FILE, EARLIER_FILE, ROUND_FILES = "record.json", "last-round", "round-*"
Make = Callable[[X25519PrivateKey], bytes]


@dataclass(frozen=True)
class Record:
    """Hold the last round of the federation that a participant is in.

    Attributes:
        federation: identifier of the federation.
        number: of the round.
        header: digest of its header.
        adapters: digests of all adapters that this and earlier rounds started from.
        context: of the participants that the contribution was made for; empty before.
        confirmed: digest of the contributors that were signed; empty before.
    """

    federation: str
    number: int
    header: str
    adapters: tuple[str, ...]
    context: str = ""
    confirmed: str = ""


class RoundKeys(Unsharable):
    """Hold the key of the round and a `Record`.

    Args:
        store: where they are.
        fresh: the first invitation may be one of another federation than the recorded one.
        forget: that federation may start from an adapter of the recorded one.
    """

    __slots__ = ("_forget", "_fresh", "_store")

    def __init__(self, store: Store, *, fresh: bool = False, forget: bool = False) -> None:
        self._store, self._fresh, self._forget = store, fresh, forget

    def begin(self, header: RoundHeader) -> X25519PrivateKey:
        """Return a fresh key for the round, or the one it has, and forget an unfinished round.

        Raises FederationError for an old number, another header of this number, an adapter that was there before, or
        another federation.
        """
        with self._store.locked():
            record = self._record()
            if record is None or record.header != header.digest().hex():
                record = self._next(record, header)
                self._store.clear(ROUND_FILES)
                self._save(record)
            self._fresh = False
            content = self._store.read(_key(record))
            if content is None:
                if record.confirmed or record.context:
                    raise _spent(header.number, "opened")
                content = X25519PrivateKey.generate().private_bytes_raw()
                self._store.write(_key(record), content)
            return X25519PrivateKey.from_private_bytes(content)

    def contribution(self, header: RoundHeader, context: bytes) -> bytes | None:
        """Return the contribution that was made, or None. Raises FederationError if it was for other participants."""
        with self._store.locked():
            return self._contribution(self._current(header), context)

    def contribute(self, header: RoundHeader, context: bytes, make: Make) -> bytes:
        """Return the one contribution of the round, made of the key if there is none yet.

        Raises FederationError where it was made for other participants.
        """
        with self._store.locked():
            record = self._current(header)
            made = self._contribution(record, context)
            if made is None:
                made = make(self._round_key(record, "contributed to"))
                self._store.write(_file(record, "contribution"), made)
                self._save(replace(record, context=context.hex()))
            return made

    def confirm(self, header: RoundHeader, context: bytes, contributors: Sequence[str]) -> None:
        """Bind the round to one set of contributors. Raises FederationError where it is bound to another."""
        with self._store.locked():
            record, wanted = self._current(header), _contributors(context, contributors)
            if record.confirmed not in ("", wanted) or record.context not in ("", context.hex()):
                raise _spent(header.number, "confirmed with other contributors")
            self._save(replace(record, confirmed=wanted))

    def open(self, header: RoundHeader, context: bytes, contributors: Sequence[str], make: Make) -> bytes:
        """Return the one share of the sum, made of the key if there is none yet; the key is deleted.

        Raises FederationError for contributors that this participant did not confirm.
        """
        with self._store.locked():
            record = self._current(header)
            if record.confirmed != _contributors(context, contributors):
                raise _spent(header.number, "confirmed or opened before with other contributors")
            given = self._store.read(_file(record, "share"))
            if given is None:
                given = make(self._round_key(record, "opened"))
                self._store.write(_file(record, "share"), given)
            self._store.remove(_key(record))
            return given

    def finish(self) -> None:
        """Remove what the last round left but the record, once the federation is over."""
        with self._store.locked():
            self._store.clear(ROUND_FILES)

    def rounds_begun(self) -> int:
        """Count the rounds that were contributed to, this one included: those that need no training any more."""
        record = self._record()
        return 0 if record is None else record.number - (0 if record.context else 1)

    def _next(self, record: Record | None, header: RoundHeader) -> Record:
        seen: tuple[str, ...] = ()
        if record is not None and record.federation == header.federation:
            if header.number <= record.number:
                raise _old(header.number, record.number)
            seen = record.adapters
        elif record is not None:
            if not self._fresh:
                what = "this is another federation than the one that this owner was in"
                record_file = self._store.place(RECORD_FILE)
                raise FederationError(f"{what}; to join it all the same, remove {record_file}", public=what)
            seen = () if self._forget else record.adapters
        if header.adapter in seen:
            what = (
                f"round {header.number} starts from the adapter of an earlier round, which is trained from once: two sums "
                "from it would tell the difference of their contributors"
            )
            advice = f"; to train from it in another federation all the same, remove {self._store.place(RECORD_FILE)}"
            elsewhere = record is not None and record.federation != header.federation
            raise FederationError(what + advice * elsewhere, public=what)
        return Record(header.federation, header.number, header.digest().hex(), (*seen, header.adapter))

    def _current(self, header: RoundHeader) -> Record:
        record = self._record()
        if record is None or record.header != header.digest().hex():
            raise _spent(header.number, "contributed to or opened")
        return record

    def _contribution(self, record: Record, context: bytes) -> bytes | None:
        if not record.context:
            return None
        made = self._store.read(_file(record, "contribution"))
        if made is None or record.context != context.hex():
            raise _spent(record.number, "contributed to")
        return made

    def _round_key(self, record: Record, what: str) -> X25519PrivateKey:
        content = self._store.read(_key(record))
        if content is None:
            raise _spent(record.number, what)
        return X25519PrivateKey.from_private_bytes(content)

    def _record(self) -> Record | None:
        content = self._store.read(RECORD_FILE)
        if content is None and self._store.read(EARLIER_FILE) is not None:
            raise InputError(
                f"{self._store.place(EARLIER_FILE)} is of a federation of an earlier release, which cannot be continued; "
                "remove it to join a new one"
            )
        return None if content is None else self._parse(content)

    def _save(self, record: Record) -> None:
        self._store.write(RECORD_FILE, (json.dumps(asdict(record)) + "\n").encode())

    def _parse(self, content: bytes) -> Record:
        try:
            fields = json.loads(content)
            return Record(**{**fields, "adapters": tuple(fields["adapters"])})
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self._store.place(RECORD_FILE)} is damaged: it holds the rounds and adapters that this owner has seen; "
                "restore it"
            ) from None


class MemoryKeys(RoundKeys):
    """Keep it in memory, for experiments in one process."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(MemoryStore())


class DirectoryKeys(RoundKeys):
    """Keep it in a private directory, for a participant that is to survive its process."""

    __slots__ = ()

    def __init__(self, directory: Path, *, fresh: bool = False, forget: bool = False) -> None:
        super().__init__(DirectoryStore(directory), fresh=fresh, forget=forget)


def _key(record: Record) -> str:
    return _file(record, "key")


def _file(record: Record, kind: str) -> str:
    return f"round-{record.number}.{kind}"


def _contributors(context: bytes, names: Sequence[str]) -> str:
    return hashlib.sha256(contributors_text(context, names)).hexdigest()


def _old(number: int, last: int) -> FederationError:
    return FederationError(
        f"round {number} was requested after round {last}: round numbers only grow, a repeated one is refused"
    )


def _spent(number: int, what: str) -> FederationError:
    return FederationError(f"round {number} was {what} before, or never begun: a participant does so once per round")
