"""Run the rounds of a federation over any transport, from the server's side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecompile.runtime.federation.protocol.messages import Finished, Message, from_bytes, to_bytes
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.federation.protocol.server_round import RoundResult, ServerRound
from hecompile.runtime.federation.protocol.terms import Terms

Exchange = Callable[[Mapping[str, Message]], Mapping[str, Message]]
"""Sends each owner its message and waits for the replies; owners that did not reply in time are left out."""


@dataclass(frozen=True)
class Federation:
    """Run the server's side of all rounds, on its own `terms`."""

    terms: Terms

    def round(self, number: int, adapter: NDArray[np.float32], exchange: Exchange) -> RoundResult:
        """Run one round from `adapter`, float32 `[size]`, which is never changed. Raises FederationError where it fails."""
        current = ServerRound(self.terms, number, adapter)
        invitation = current.invitation()
        adverts = exchange(dict.fromkeys(self.terms.agreement.owners, invitation))
        start = current.start(adverts)
        openings = current.open(exchange(dict.fromkeys(adverts, start)))
        return current.finish(exchange(openings))

    def run(
        self,
        adapter: NDArray[np.float32],
        exchange: Exchange,
        report: Callable[[int, RoundResult], None] = lambda number, result: None,
    ) -> NDArray[np.float32]:
        """Run all rounds of the agreement, tell the owners the final global adapter, and return it, float32 `[size]`.

        Raises FederationError where a round fails; what `report` was told of the earlier ones stands.
        """
        agreement = self.terms.agreement
        rounds = agreement.section.rounds
        for number in range(1, rounds + 1):
            result = self.round(number, adapter, exchange)
            adapter = result.adapter
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
