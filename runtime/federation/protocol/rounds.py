"""Run the rounds of a federation over any transport, from the server's side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hecompile.runtime.federation.protocol.messages import Finished, Message, Pending, from_bytes, to_bytes
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.federation.protocol.server_round import RoundResult, ServerRound, new_federation
from hecompile.runtime.federation.protocol.terms import Terms

Exchange = Callable[[Mapping[str, Message]], Mapping[str, Message]]
"""Sends each owner its message and waits for the replies; owners that did not reply in time are left out."""
Save = Callable[[Pending], None]
"""Keeps a round on disk; it is there when this returns."""


@dataclass(frozen=True)
class Federation:
    """Run the server's side of all rounds, on its own `terms`.

    `identifier` says to the owners which federation this is; one that is resumed has the one it had.
    """

    terms: Terms
    identifier: str = field(default_factory=new_federation)

    def round(
        self,
        number: int,
        adapter: NDArray[np.float32],
        exchange: Exchange,
        save: Save = lambda pending: None,
        pending: Pending | None = None,
    ) -> RoundResult:
        """Run one round from `adapter`, float32 `[size]`, which is never changed; or the rest of one that is `pending`.

        Whatever owners answer for once is given to `save` before they are asked. Raises FederationError where it fails.
        """
        if pending is None:
            current = ServerRound(self.terms, number, adapter, self.identifier)
            save(current.pending)
        else:
            current = ServerRound.resume(self.terms, adapter, pending)
        if not current.participants:
            current.start(exchange(dict.fromkeys(self.terms.agreement.owners, current.invitation())))
            save(current.pending)
        if not current.closed:
            current.close(exchange(dict.fromkeys(current.participants, current.start_message())))
            save(current.pending)
        confirmations = exchange(dict.fromkeys(current.participants, current.contributors_message()))
        return current.finish(exchange(current.open(confirmations)))

    def run(
        self,
        adapter: NDArray[np.float32],
        exchange: Exchange,
        report: Callable[[int, RoundResult], None] = lambda number, result: None,
        *,
        complete: int = 0,
        pending: Pending | None = None,
        save: Save = lambda pending: None,
    ) -> NDArray[np.float32]:
        """Run the rounds after the `complete` ones, tell the owners the final global adapter, and return it.

        Raises FederationError where a round fails; what `report` was told of the earlier ones stands.
        """
        agreement = self.terms.agreement
        rounds = agreement.section.rounds
        for number in range(complete + 1, rounds + 1):
            result = self.round(number, adapter, exchange, save, pending)
            adapter, pending = result.adapter, None
            report(number, result)
        exchange(dict.fromkeys(agreement.owners, Finished(adapter=adapter.astype("<f4").tobytes(), rounds=rounds)))
        return adapter


def in_process(participants: Mapping[str, Participant]) -> Exchange:
    """Return an exchange with participants in this process, through the bytes of the wire all the same."""

    def exchange(requests: Mapping[str, Message]) -> dict[str, Message]:
        replies = {}
        for name, request in requests.items():
            if name in participants and not isinstance(request, Finished):
                answer = participants[name].answer_or_refuse(from_bytes(to_bytes(request)))
                replies[name] = from_bytes(to_bytes(answer))
        return replies

    return exchange
