"""Derive what participants and server share of a round, and encode the vector that is encrypted in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError
from hecompile.he.aggregation.parameters import AggregationParameters
from hecompile.he.random.sampling import PublicSeed
from hecompile.runtime.federation.protocol.channels import Roster, check_advert, check_contributors
from hecompile.runtime.federation.protocol.messages import Advert
from hecompile.runtime.federation.protocol.settings import RoundHeader

WEIGHT_DIGITS, DIGIT_BITS = 8, 4
"""A sample count travels as 8 coordinates of 4 bits each: their sums stay exact under the noise."""
CHECK_WORDS = 32
"""Coordinates that are zero in every plaintext: a wrong sum of keys leaves uniform words there."""


@dataclass(frozen=True)
class Transcript:
    """Hold the participants of a round, by their evaluation points, and their keys."""

    header: RoundHeader
    publics: Mapping[str, bytes]

    @property
    def names(self) -> list[str]:
        """Return the names in the order of the points: participant i has point i + 1."""
        return sorted(self.publics)

    @property
    def context(self) -> bytes:
        """Return 32 bytes that bind header, names and keys."""
        digest = hashlib.sha256(b"hecompile/federation/transcript/2" + self.header.digest())
        for name in self.names:
            encoded = name.encode()
            digest.update(len(encoded).to_bytes(4, "little") + encoded + self.publics[name])
        return digest.digest()

    @property
    def seed(self) -> PublicSeed:
        """Return the seed of the round's matrix A: a hash of everybody's fresh keys.

        Nobody alone chooses it, and no seed is used twice.
        """
        return PublicSeed(hashlib.sha256(b"hecompile/federation/matrix/1" + self.context).digest())


def read_transcript(header: RoundHeader, adverts: Sequence[Advert], roster: Roster) -> Transcript:
    """Check who takes part. Raises FederationError for a stranger, a bad signature, a double, or too few."""
    publics: dict[str, bytes] = {}
    for advert in adverts:
        if advert.name in publics or advert.name not in header.agreement.owners:
            raise FederationError(f"{advert.name!r} is listed twice, or is no owner of this federation")
        check_advert(roster, advert.name, header.digest(), advert.public, advert.signature)
        publics[advert.name] = advert.public
    check_enough(header, publics, "take part")
    return Transcript(header, publics)


def check_enough(header: RoundHeader, names: Iterable[str], what: str) -> None:
    """Raise FederationError unless `names` are enough to open a sum, and to be summed."""
    count, fewest = len(list(names)), header.agreement.fewest
    if count < fewest:
        raise FederationError(
            f"round {header.number}: {count} owners {what}, but it takes {fewest} (threshold {header.agreement.threshold}, "
            f"minimum {header.agreement.minimum}); the global adapter is unchanged"
        )


def check_confirmed(
    transcript: Transcript, contributors: Sequence[str], confirmations: Mapping[str, bytes], roster: Roster
) -> None:
    """Raise FederationError unless `threshold` participants signed these contributors, and nobody's signature is wrong."""
    header = transcript.header
    for name, signature in confirmations.items():
        if name not in transcript.publics:
            raise FederationError(f"{name!r} confirms the contributors of a round that it is not part of")
        check_contributors(roster, name, transcript.context, contributors, signature)
    if len(confirmations) < header.agreement.threshold:
        raise FederationError(
            f"round {header.number}: {len(confirmations)} owners confirmed the contributors, but it takes "
            f"{header.agreement.threshold}; the sum stays closed and the global adapter is unchanged"
        )


def digit_spacing(parameters: AggregationParameters) -> int:
    """Return the integer steps between two values of a digit: over twice the largest noise, so that rounding is exact."""
    return 1 << (2 * parameters.noise_bound(parameters.max_clients)).bit_length()


def encode(parameters: AggregationParameters, values: NDArray[np.float64], samples: int) -> NDArray[np.int32]:
    """Encode the plaintext: quantised values, the digits of the count, zeros: int32 `[n + 8 + 32]`."""
    digits = [(samples >> (DIGIT_BITS * i)) & ((1 << DIGIT_BITS) - 1) for i in range(WEIGHT_DIGITS)]
    tail = np.zeros(WEIGHT_DIGITS + CHECK_WORDS, dtype=np.int32)
    tail[:WEIGHT_DIGITS] = np.array(digits, dtype=np.int64) * digit_spacing(parameters)
    return np.concatenate([parameters.quantise(values), tail])


def decode(
    parameters: AggregationParameters, opened: NDArray[np.int64], clients: int
) -> tuple[NDArray[np.float64], int]:
    """Decode an opened sum: the sums of the values, float64 `[n]`, and of the counts.

    Raises:
        FederationError: what was opened is not a sum of such plaintexts.
    """
    values, digits, zeros = np.split(opened, [len(opened) - WEIGHT_DIGITS - CHECK_WORDS, len(opened) - CHECK_WORDS])
    if int(np.abs(zeros).max()) > parameters.noise_bound(clients):
        raise FederationError(
            "the opened sum is noise: a share was forged, or belongs to other contributors; the global adapter is unchanged"
        )
    spacing = digit_spacing(parameters)
    sums = np.rint(digits / spacing).astype(np.int64)
    total = sum(int(digit) << (DIGIT_BITS * i) for i, digit in enumerate(sums))
    return parameters.to_reals(values), total


def coordinates(kept: int) -> int:
    """Count the coordinates of the encrypted vector for `kept` coordinates of the adapter."""
    return kept + WEIGHT_DIGITS + CHECK_WORDS
