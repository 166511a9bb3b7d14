"""Handle a round as its server: replies in, requests out, no network. It holds no secret; it learns the sum alone.

    invitation → adverts → start → contributions → contributors → confirmations → opening → sum shares → result

Whoever does not reply in time is absent from the replies: a round goes on while enough are left, and fails closed when not.
Whoever refuses ends it with the reason. The global adapter changes only by the result of `finish`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError
from hecompile.he.aggregation.scheme import EncryptedSum, EncryptedVector
from hecompile.runtime.federation.protocol import shamir
from hecompile.runtime.federation.protocol.layout import Layout, adapter_digest, mask_digest
from hecompile.runtime.federation.protocol.messages import (
    Advert,
    Confirmation,
    Contribution,
    Contributors,
    Invitation,
    Message,
    Opening,
    Pending,
    Start,
    SumShare,
    expect,
    read_header,
)
from hecompile.runtime.federation.protocol.pruning import is_a, shared_mask
from hecompile.runtime.federation.protocol.settings import Agreement, RoundHeader
from hecompile.runtime.federation.protocol.terms import Terms
from hecompile.runtime.federation.protocol.transcript import (
    Transcript,
    check_confirmed,
    check_enough,
    coordinates,
    decode,
    read_transcript,
)

M = TypeVar("M", Advert, Contribution, Confirmation, SumShare)


@dataclass(frozen=True, eq=False)
class RoundResult:
    """Hold what a round gave.

    Attributes:
        adapter: the new global adapter, float32 `[size]`.
        mean: the weighted mean update of the kept coordinates, float64 `[kept]`.
        contributors: whose updates are in it.
        opened_by: who opened it.
        samples: the sum of the counts (of the contributors, under differential privacy).
        error_bound: largest error of a coordinate of `mean` against the mean of the exact updates.
        bytes_up: of all contributions, shares included.
    """

    adapter: NDArray[np.float32]
    mean: NDArray[np.float64]
    contributors: tuple[str, ...]
    opened_by: tuple[str, ...]
    samples: int
    error_bound: float
    bytes_up: int


def prune_global(
    layout: Layout, agreement: Agreement, number: int, adapter: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Prune the adapter that round `number` starts from: float32 `[size]`; and the mask of what travels: bool `[size]`."""
    section = agreement.section
    rate = section.pruning.rate(number) if section.pruning is not None and section.pruning.mask == "shared" else 0.0
    pruned = adapter * shared_mask(layout, adapter, rate, freeze_a=False)
    if section.freeze_a:
        for name, where in layout.slices():
            if is_a(name):
                pruned[where] = adapter[where]
    return pruned, shared_mask(layout, pruned, rate, section.freeze_a)


class ServerRound:
    """Handle one round from `adapter`, float32 `[size]`. Call the five methods in their order.

    `pending` gives what to keep on disk between two of them, and `resume` goes on from there. A round keeps its header, its
    participants and its contributors, because owners answer for one of each.
    """

    def __init__(self, terms: Terms, number: int, adapter: NDArray[np.float32], federation: str | None = None) -> None:
        self.agreement = terms.agreement
        self.roster = terms.roster
        self.adapter, self.mask = prune_global(terms.layout, terms.agreement, number, adapter)
        self.header = RoundHeader(
            federation=new_federation() if federation is None else federation,
            number=number,
            nonce=os.urandom(16).hex(),
            agreement=terms.agreement,
            layout=terms.layout.digest(),
            mask=mask_digest(self.mask),
            adapter=adapter_digest(self.adapter),
            coordinates=int(self.mask.sum()),
        )
        self._fields = self.header.model_dump(mode="json")
        self._adverts: list[Advert] = []
        self._transcript: Transcript | None = None
        self._contributors: tuple[str, ...] = ()
        self._shares: dict[str, dict[str, bytes]] = {}
        self._sum: EncryptedSum | None = None
        self._bytes_up = 0

    @staticmethod
    def resume(terms: Terms, adapter: NDArray[np.float32], pending: Pending) -> ServerRound:
        """Return the round that was interrupted. Raises FederationError where it is not one of these terms and adapter."""
        header = read_header(pending.header)
        current = ServerRound(terms, header.number, adapter, header.federation)
        if header != current.header.model_copy(update={"nonce": header.nonce}):
            raise FederationError(f"round {header.number} was begun with another adapter or agreement")
        current.header, current._fields = header, pending.header
        if pending.adverts:
            current._adverts = pending.adverts
            current._transcript = read_transcript(header, pending.adverts, terms.roster)
        if pending.contributors:
            count = coordinates(header.coordinates)
            current._sum = EncryptedSum.from_bytes(header.parameters, pending.total, count, len(pending.contributors))
            current._contributors, current._shares = tuple(pending.contributors), pending.shares
            current._bytes_up = pending.bytes_up
        return current

    @property
    def pending(self) -> Pending:
        """Return the round so far: public values, sealed shares and the sum, which is encrypted."""
        return Pending(
            header=self._fields,
            adverts=self._adverts,
            contributors=list(self._contributors),
            shares=self._shares,
            total=b"" if self._sum is None else self._sum.to_bytes(),
            bytes_up=self._bytes_up,
        )

    @property
    def participants(self) -> list[str]:
        """Return who takes part; empty before `start`."""
        return [] if self._transcript is None else self._transcript.names

    @property
    def closed(self) -> bool:
        """Return whether the contributors are settled."""
        return self._sum is not None

    def invitation(self) -> Invitation:
        """Return the message that begins the round, for all owners."""
        return Invitation(header=self._fields)

    def start(self, replies: Mapping[str, Message]) -> None:
        """Settle who takes part: those who replied. Raises FederationError for too few, or a key that is not signed."""
        adverts = [_from(name, expect(Advert, reply)) for name, reply in sorted(replies.items())]
        self._transcript = read_transcript(self.header, adverts, self.roster)
        self._adverts = adverts

    def start_message(self) -> Start:
        """Return the message that asks the participants for their updates."""
        return Start(header=self._fields, adverts=self._adverts, adapter=self.adapter.astype("<f4").tobytes())

    def close(self, replies: Mapping[str, Message]) -> None:
        """Add the contributions, and settle whose are in the sum.

        Raises FederationError for too few contributions, or a malformed one.
        """
        transcript = self._transcript
        if transcript is None or self._sum is not None:
            raise FederationError("contributions are added once, after the round was started")
        parameters, count = self.header.parameters, coordinates(self.header.coordinates)
        contributions = [_from(name, expect(Contribution, reply)) for name, reply in sorted(replies.items())]
        check_enough(self.header, [one.name for one in contributions], "contributed")
        total = EncryptedSum(parameters, count)
        for contribution in contributions:
            if contribution.name not in transcript.publics or sorted(contribution.shares) != transcript.names:
                raise FederationError(f"{contribution.name!r} did not send one share to each participant of the round")
            total.add(EncryptedVector.from_bytes(parameters, contribution.update, count))
            self._bytes_up += len(contribution.update) + sum(len(share) for share in contribution.shares.values())
        self._sum, self._contributors = total, tuple(one.name for one in contributions)
        self._shares = {one.name: one.shares for one in contributions}

    def contributors_message(self) -> Contributors:
        """Return the message that asks the participants to confirm whose updates are in the sum."""
        return Contributors(header=self._fields, adverts=self._adverts, names=list(self._contributors))

    def open(self, replies: Mapping[str, Message]) -> dict[str, Opening]:
        """Return the message to each participant that confirmed the contributors. Raises FederationError for too few."""
        if self._transcript is None or self._sum is None:
            raise FederationError("a round is opened after it was closed")
        confirmations = {
            name: _from(name, expect(Confirmation, reply)).signature for name, reply in sorted(replies.items())
        }
        check_confirmed(self._transcript, self._contributors, confirmations, self.roster)
        return {
            name: Opening(
                header=self._fields,
                adverts=self._adverts,
                shares={contributor: shares[name] for contributor, shares in self._shares.items()},
                confirmations=confirmations,
            )
            for name in confirmations
        }

    def finish(self, replies: Mapping[str, Message]) -> RoundResult:
        """Open the sum, and return the new global adapter with what is known of the round.

        Raises FederationError for too few shares, forged ones, or an impossible sum.
        """
        transcript, total = self._transcript, self._sum
        if transcript is None or total is None:
            raise FederationError("a round is finished after it was opened")
        ring = self.header.parameters.ring
        shares = self._shares_by_point(transcript, replies)
        if len(shares) < self.agreement.threshold:
            raise FederationError(
                f"round {self.header.number}: {len(shares)} owners opened, but it takes {self.agreement.threshold}; "
                "the sum stays closed and the global adapter is unchanged"
            )
        key_sum = shamir.combine(shares, self.agreement.threshold).reshape(ring.rank, ring.ring_dim)
        return self._result(total, total.open(transcript.seed, key_sum), tuple(sorted(replies)))

    def _shares_by_point(self, transcript: Transcript, replies: Mapping[str, Message]) -> dict[int, NDArray[np.uint16]]:
        points = {name: index + 1 for index, name in enumerate(transcript.names)}
        shares: dict[int, NDArray[np.uint16]] = {}
        ring = self.header.parameters.ring
        for name, reply in sorted(replies.items()):
            one = _from(name, expect(SumShare, reply))
            if name not in points or len(one.share) != 2 * ring.lattice_dim:
                raise FederationError(
                    f"{name!r} sent no share of the sum of this round's keys; the global adapter is unchanged"
                )
            shares[points[name]] = np.frombuffer(one.share, dtype="<u2")
        return shares

    def _result(self, total: EncryptedSum, opened: NDArray[np.int64], opened_by: tuple[str, ...]) -> RoundResult:
        parameters, clients = self.header.parameters, total.clients
        sums, samples = decode(parameters, opened, clients)
        largest = self.agreement.section.max_samples if self.agreement.weighted_by_samples else 1
        if not clients <= samples <= clients * largest:
            raise FederationError(
                f"{clients} owners claim {samples} samples together, at most {largest} each were agreed on"
            )
        weight = samples / largest
        mean = sums / weight
        adapter = self.adapter.copy()
        adapter[self.mask] += mean.astype(np.float32)
        return RoundResult(
            adapter=adapter,
            mean=mean,
            contributors=self._contributors,
            opened_by=opened_by,
            samples=samples,
            error_bound=parameters.value_error(clients) / weight,
            bytes_up=self._bytes_up,
        )


def new_federation() -> str:
    """Draw the identifier of a federation."""
    return os.urandom(16).hex()


def _from(name: str, message: M) -> M:
    """Return the message, if its name is that of its sender, as the transport says. Raises FederationError otherwise."""
    if message.name != name:
        raise FederationError(f"{name!r} sent a message in the name of {message.name!r}")
    return message
