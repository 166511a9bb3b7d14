"""Define what all owners of a federation agree on before it starts, and what each round adds; both are public."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hecompile.he.aggregation.parameters import CLIENT_LIMIT, AggregationParameters
from hecompile.runtime.privacy.noise import BASE_SIGMA, MULTIPLIERS
from hecompile.runtime.recipes.section import Positive, Section

SHARE_SIGMA = BASE_SIGMA * math.prod(math.hypot(z, z - 1) for z in MULTIPLIERS[:2])
"""Standard deviation, in grid steps, of one contributor's noise: two levels of `hecompile.runtime.privacy.noise`, about
2^14."""
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class PruningSection(Section):
    """Prune by magnitude at a rising rate: `start_rate` of every matrix in round `start_round`, `end_rate` in `end_round`.

    The rate rises linearly between them, and is 0 before. `shared` takes one public mask from the previous global adapter
    and sends no pruned coordinate. `per_client` is FedShield-LLM as published: each client prunes what it trained, and
    zeros travel too.
    """

    start_rate: Rate = 0.2
    end_rate: Rate = 0.5
    start_round: Positive = 2
    end_round: Positive = 2
    mask: Literal["shared", "per_client"] = "shared"

    @model_validator(mode="after")
    def _rising(self) -> PruningSection:
        if self.end_rate < self.start_rate or self.end_round < self.start_round:
            raise ValueError("end_rate and end_round must not be below start_rate and start_round: the rate rises")
        return self

    def rate(self, number: int) -> float:
        """Return the pruned share of round `number`, counted from 1."""
        if number < self.start_round:
            return 0.0
        if number >= self.end_round:
            return self.end_rate
        share = (number - self.start_round) / (self.end_round - self.start_round)
        return self.start_rate + share * (self.end_rate - self.start_rate)


class NoiseSection(Section):
    """Give whole owners differential privacy (`noise.py`); all weights are then equal.

    * `clip`: the Euclidean norm that the whole update of an owner is cut to, times the `noise_multiplier` is the standard
      deviation of the noise of a sum, put together from all contributors' shares.
    * `colluding`: how many contributors may tell the server their noise without the promise suffering.
    * `epsilon`: what an owner spends at most in its whole life, with `delta`; without it, its ledger only keeps count.
    """

    clip: Annotated[float, Field(gt=0)]
    noise_multiplier: Annotated[float, Field(ge=0.1)]
    colluding: Annotated[int, Field(ge=0)] = 0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    epsilon: Annotated[float, Field(gt=0)] | None = None


class FederationSection(Section):
    """Hold the agreement; a client compares it with its own copy, so that a server cannot weaken it.

    * `threshold`: how many participants open a sum together; fewer, with or without the server, open nothing. With c owners
      in league with the server, two different sums of one round cannot both be opened where threshold > (owners + c)/2
      (docs/federation.md). Default: ⌊2·owners/3⌋ + 1, which holds for c up to a third of the owners. Always over half.
    * `minimum`: fewest contributors of a sum, at least 2. With c owners in league with the server, a sum hides an update
      only among minimum - c others: take c + 2 or more. Default: the threshold, or 2.
    * `value_range`: largest |weight · update| of a coordinate in round 1, weight ≤ 1; with a shared mask, or none, it falls
      with the learning rate.
    * `max_samples`: the count with weight 1.
    * `algorithm`: fedavg, or fedprox with `mu`, which adds mu/2·‖w - w_global‖² to every owner's loss.
    * `round_decay`: the learning rate of round n of N is that of the recipe times (1 + cos(π·(n - 1)/N)) / 2, or `none`.
    * `freeze_a`: FFA-LoRA: A stays as it was drawn, B is trained and sent alone.
    """

    rounds: Positive = 8
    threshold: Positive | None = None
    minimum: Positive | None = None
    value_range: Annotated[float, Field(gt=0)] = 1.0
    max_samples: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1024
    upload_bytes: Literal[3, 4] = 3
    algorithm: Literal["fedavg", "fedprox"] = "fedavg"
    mu: Annotated[float, Field(ge=0)] = 0.01
    round_decay: Literal["cosine", "none"] = "cosine"
    freeze_a: bool = False
    pruning: PruningSection | None = None
    privacy: NoiseSection | None = None

    def decay(self, number: int) -> float:
        """Return the factor of round `number`'s learning rate."""
        return 1.0 if self.round_decay == "none" else (1 + math.cos(math.pi * (number - 1) / self.rounds)) / 2


class Agreement(Section):
    """Complete a `FederationSection` for a list of owners.

    Raises pydantic's ValidationError, with the reason, for a threshold or minimum that protects nothing.
    """

    owners: Annotated[list[str], Field(min_length=2, max_length=CLIENT_LIMIT)]
    threshold: Positive
    minimum: Annotated[int, Field(ge=2)]
    section: FederationSection

    @staticmethod
    def of(owners: list[str], section: FederationSection) -> Agreement:
        """Return the agreement of `owners`, with the defaults filled in."""
        threshold = section.threshold or 2 * len(owners) // 3 + 1
        return Agreement(
            owners=sorted(owners), threshold=threshold, minimum=section.minimum or max(2, threshold), section=section
        )

    @model_validator(mode="after")
    def _protects(self) -> Agreement:
        count = len(self.owners)
        if len(set(self.owners)) < count:
            raise ValueError("an owner is named twice")
        if not 2 * self.threshold > count:
            raise ValueError(
                f"threshold {self.threshold} is not more than half of {count} owners: two sums could be opened"
            )
        if self.threshold > count or self.minimum > count:
            raise ValueError(f"threshold {self.threshold} or minimum {self.minimum} is beyond the {count} owners")
        privacy = self.section.privacy
        if privacy is not None and privacy.colluding > self.fewest - 2:
            raise ValueError(
                f"{privacy.colluding} colluding of {self.fewest} contributors leave too few whose noise stays secret"
            )
        return self

    @property
    def fewest(self) -> int:
        """Return the number of contributors of the smallest sum that is opened."""
        return max(self.threshold, self.minimum)

    def parameters(self, number: int = 1) -> AggregationParameters:
        """Return the parameters of round `number`'s encryption, for as many clients as there are owners.

        Under differential privacy a step of the integers is the grid of the noise: nothing is rounded after it was added.
        """
        section, count = self.section, len(self.owners)
        # A client that prunes moves what it prunes all the way to zero, however small the steps of training have become.
        falls = section.pruning is None or section.pruning.mask == "shared"
        value_range = section.value_range * (section.decay(number) if falls else 1.0)
        if section.privacy is not None:
            bound = AggregationParameters(count, 1.0, section.upload_bytes).integer_bound
            value_range = bound * noise_step(section.privacy, self.fewest)
        return AggregationParameters(count, value_range, section.upload_bytes)

    @property
    def weighted_by_samples(self) -> bool:
        """Return whether weights follow sample counts; with differential privacy all weigh the same."""
        return self.section.privacy is None


def noise_step(privacy: NoiseSection, fewest: int) -> float:
    """Return the grid of the noise, in units of the update.

    One contributor's share has standard deviation SHARE_SIGMA steps. Those of fewest - colluding contributors together have
    noise_multiplier · clip.
    """
    return privacy.noise_multiplier * privacy.clip / math.sqrt(fewest - privacy.colluding) / SHARE_SIGMA


class RoundHeader(Section):
    """Hold everything public about one round. Its digest is part of every signature, key and seal.

    So the adapter is: who was shown another one has other keys, and no share of theirs opens. A server that shows adapters
    by which all updates but one vanish would learn that one from the sum (Pasquini, Francati, Ateniese, "Eluding secure
    aggregation in federated learning via model inconsistency", CCS 2022).
    """

    federation: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """Identifies the federation: drawn by the server, the same in all its rounds."""
    number: Positive
    nonce: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    agreement: Agreement
    layout: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    mask: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    adapter: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Digest of the global adapter that the round starts from."""
    coordinates: Positive
    """How many travel: those that the mask keeps."""

    @model_validator(mode="after")
    def _in_time(self) -> RoundHeader:
        if self.number > self.agreement.section.rounds:
            raise ValueError(f"round {self.number} of {self.agreement.section.rounds} that were agreed on")
        return self

    @property
    def parameters(self) -> AggregationParameters:
        """Return the parameters of this round's encryption."""
        return self.agreement.parameters(self.number)

    @property
    def rate(self) -> float:
        """Return the pruned share of this round."""
        pruning = self.agreement.section.pruning
        return pruning.rate(self.number) if pruning is not None else 0.0

    def digest(self) -> bytes:
        """Return a hash of all fields, 32 bytes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"hecompile/federation/round/2" + text.encode()).digest()
