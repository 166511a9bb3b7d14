"""A federation whose owners do not train: their updates are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hecompile.runtime.federation.protocol.channels import Identity
from hecompile.runtime.federation.protocol.keyring import MemoryKeys, RoundKeys
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.messages import Message
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant
from hecompile.runtime.federation.protocol.rounds import Exchange, Federation, in_process
from hecompile.runtime.federation.protocol.settings import Agreement, FederationSection, RoundHeader
from hecompile.runtime.federation.protocol.terms import Terms

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
LAYOUT = Layout(((f"{PREFIX}.lora_A.weight", (4, 16)), (f"{PREFIX}.lora_B.weight", (24, 4))))


Step = Callable[[Mapping[str, Message]], Mapping[str, Message]]


@dataclass
class World:
    """Owners with fixed updates, and a server."""

    federation: Federation
    participants: dict[str, Participant]
    identities: dict[str, Identity]
    updates: dict[str, LocalUpdate]
    adapter: NDArray[np.float32] = field(default_factory=lambda: np.zeros(LAYOUT.size, np.float32))

    @property
    def exchange(self) -> Exchange:
        return in_process(self.participants)

    def without(self, *names: str) -> Exchange:
        return in_process({name: one for name, one in self.participants.items() if name not in names})

    def scripted(self, *steps: Step | None, confirming: Step | None = None) -> Exchange:
        """Each kind of request goes once through its step: invitation, start, opening; None is undisturbed."""
        by_kind = {**dict(zip(("invitation", "start", "opening"), steps, strict=False)), "contributors": confirming}

        def exchange(requests: Mapping[str, Message]) -> Mapping[str, Message]:
            kind = next(iter(requests.values())).kind
            return (by_kind.pop(kind, None) or self.exchange)(requests)

        return exchange

    def moved(self, number: int) -> NDArray[np.float32]:
        """Another adapter than any that a round of a test started from: none is trained from twice."""
        return self.adapter + np.float32(number)


def make_world(
    owners: int = 3, layout: Layout = LAYOUT, keys: Callable[[str], RoundKeys] | None = None, **section: Any
) -> World:
    generator = np.random.default_rng(5)
    names = [f"owner-{index}" for index in range(owners)]
    identities = {name: Identity.generate(name) for name in names}
    roster = {name: identity.public for name, identity in identities.items()}
    terms = Terms(Agreement.of(names, FederationSection(max_samples=64, **section)), roster, layout)
    updates = {
        name: LocalUpdate(generator.normal(0, 0.02, layout.size).astype(np.float32), 10 + 9 * index)
        for index, name in enumerate(names)
    }

    def train(name: str) -> Callable[[RoundHeader, NDArray[np.float32], NDArray[np.bool_]], LocalUpdate]:
        return lambda header, adapter, mask: updates[name]

    participants = {
        name: Participant(identities[name], terms, MemoryKeys() if keys is None else keys(name), train(name))
        for name in names
    }
    adapter = generator.normal(0, 0.1, layout.size).astype(np.float32)
    return World(Federation(terms), participants, identities, updates, adapter)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """And afterwards as many as before: sums of other tests in this process are compared with those of other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
