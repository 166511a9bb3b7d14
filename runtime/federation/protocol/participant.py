"""Handle a round as a participant: message in, message out, no network.

    invitation   → advert        a fresh X25519 key, signed
    start        → contribution  train; draw a one-time key, encrypt under it, share it out; the key is gone
    contributors → confirmation  sign whose updates are in the sum, one set per round
    opening      → sum share     once enough others signed that set: unseal the contributors' shares, add them

Everything is checked against this participant's own copy of the agreement before anything is computed. Between messages
it keeps what `keyring.py` says and nothing else. A request that comes again, because the server or this participant was
interrupted, gets the answer that it got before; another one in its place gets none.

The third step is ConsistencyCheck of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine
learning" (CCS 2017, figure 4).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from hecompile.errors import FederationError, HecompileError, PrivacyError
from hecompile.he.aggregation import scheme as aggregation
from hecompile.he.random.sampling import SecretRandom
from hecompile.runtime.federation.protocol import shamir
from hecompile.runtime.federation.protocol.channels import Channels, Identity
from hecompile.runtime.federation.protocol.keyring import RoundKeys
from hecompile.runtime.federation.protocol.layout import adapter_digest, mask_digest
from hecompile.runtime.federation.protocol.messages import (
    Advert,
    Confirmation,
    Contribution,
    Contributors,
    Invitation,
    Message,
    Opening,
    Refusal,
    Start,
    SumShare,
    read_as,
    read_header,
    to_bytes,
)
from hecompile.runtime.federation.protocol.noise import private_update
from hecompile.runtime.federation.protocol.pruning import shared_mask
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.protocol.terms import Terms
from hecompile.runtime.federation.protocol.transcript import (
    Transcript,
    check_confirmed,
    check_enough,
    encode,
    read_transcript,
)
from hecompile.runtime.privacy.ledger import PrivacyLedger

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """Hold what training changed, float32 `[size]` over the whole adapter, and on how many examples."""

    delta: NDArray[np.float32]
    samples: int


Train = Callable[[RoundHeader, NDArray[np.float32], NDArray[np.bool_]], LocalUpdate]
"""(round, global adapter float32 `[size]`, mask bool `[size]`) → update; zero outside the mask."""


class Participant:
    """Answer the messages of a federation for one owner.

    `terms` are its own copies; `train` is called once per round; `ledger` is its own record of what it released, and must
    be there where the agreement has differential privacy.
    """

    def __init__(
        self, identity: Identity, terms: Terms, keys: RoundKeys, train: Train, ledger: PrivacyLedger | None = None
    ) -> None:
        self.identity = identity
        self.terms = terms
        self.agreement = terms.agreement
        self.layout = terms.layout
        self._keys = keys
        self._train = train
        self._ledger = ledger

    @property
    def name(self) -> str:
        return self.identity.name

    def answer(self, message: Message) -> Message:
        """Return the reply. After an error, FederationError or one of training's, this participant is out of the round."""
        if isinstance(message, Invitation):
            return self._advertise(message)
        if isinstance(message, Start):
            return self._contribute(message)
        if isinstance(message, Contributors):
            return self._confirm(message)
        if isinstance(message, Opening):
            return self._open(message)
        raise FederationError(f"a participant does not answer a message {message.kind!r}")

    def answer_or_refuse(self, message: Message) -> Message:
        """Answer, with errors as refusals, which tell the others no figure of this owner's; the log has them in full."""
        try:
            return self.answer(message)
        except FederationError as error:
            _log.error("%s: %s", self.name, error)
            return Refusal(name=self.name, reason=error.public)
        except PrivacyError as error:
            _log.error("%s: %s", self.name, error)
            return Refusal(name=self.name, reason="its privacy budget does not allow for another round")
        except HecompileError as error:
            _log.error("%s: %s", self.name, error)
            return Refusal(name=self.name, reason="its training failed; see its own log")

    def _advertise(self, message: Invitation) -> Advert:
        header = self._accept(message.header)
        public = self._keys.begin(header).public_key().public_bytes_raw()
        signature = self.identity.sign_advert(header.digest(), public)
        return Advert(name=self.name, public=public, signature=signature)

    def _accept(self, fields: dict[str, object]) -> RoundHeader:
        header = read_header(fields)
        if header.agreement != self.agreement:
            own, other = self.agreement.model_dump(), header.agreement.model_dump()
            differing = ", ".join(sorted(name for name in own if own[name] != other[name]))
            raise FederationError(f"round {header.number} is not what {self.name!r} agreed to: {differing} differ")
        if header.layout != self.layout.digest():
            raise FederationError(
                f"the adapter of {self.name!r} has other LoRA matrices or shapes than the federation's: use the same r, "
                "target_modules and checkpoint"
            )
        return header

    def _contribute(self, message: Start) -> Contribution:
        header, transcript = self._transcript(message)
        adapter, mask = self._adapter(header, message.adapter)
        made = self._keys.contribution(header, transcript.context)
        if made is None:
            update = self._train(header, adapter.copy(), mask)
            values, samples = self._values(header, update, mask)
            plaintext = encode(header.parameters, values, samples)
            made = self._keys.contribute(
                header,
                transcript.context,
                lambda private: to_bytes(self._encrypt(transcript, self._channels(transcript, private), plaintext)),
            )
        return read_as(Contribution, made)

    def _transcript(self, message: Start | Contributors | Opening) -> tuple[RoundHeader, Transcript]:
        header = self._accept(message.header)
        transcript = read_transcript(header, message.adverts, self.terms.roster)
        if self.name not in transcript.publics:
            raise FederationError(f"{self.name!r} was asked about a round that it is not part of")
        return header, transcript

    def _adapter(self, header: RoundHeader, content: bytes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        adapter = np.frombuffer(content, dtype="<f4") if len(content) % 4 == 0 else np.zeros(0, dtype="<f4")
        if adapter.size != self.layout.size or not np.isfinite(adapter).all():
            raise FederationError(
                f"the global adapter has {adapter.size} values; it must have {self.layout.size}, all finite"
            )
        section = self.agreement.section
        shared = section.pruning is None or section.pruning.mask == "shared"
        mask = shared_mask(self.layout, adapter, header.rate if shared else 0.0, section.freeze_a)
        if mask_digest(mask) != header.mask or int(mask.sum()) != header.coordinates:
            raise FederationError(
                f"round {header.number}: the pruning mask of {self.name!r} is not the server's: another global "
                "adapter or rate"
            )
        if adapter_digest(adapter) != header.adapter:
            raise FederationError(
                f"round {header.number}: the adapter sent to {self.name!r} is not the one that the round was announced with"
            )
        return adapter, mask

    def _values(
        self, header: RoundHeader, update: LocalUpdate, mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], int]:
        """Return the weighted update, with noise where agreed, float64 `[kept]`, and the count that goes with it."""
        if update.delta.shape != (self.layout.size,):
            raise FederationError(f"the update has {list(update.delta.shape)} values, the adapter {self.layout.size}")
        delta = update.delta[mask].astype(np.float64)
        section = self.agreement.section
        if section.privacy is not None:
            return private_update(self.agreement, header.number, delta, self._ledger), 1
        if not 1 <= update.samples <= section.max_samples:
            raise FederationError(
                f"{update.samples} samples, but at most max_samples {section.max_samples} were agreed on",
                public="its number of samples is beyond the agreed one",
            )
        if math.isfinite(float(np.abs(delta).max(initial=0.0))):  # `quantise` refuses the rest
            delta *= update.samples / section.max_samples
        return delta, update.samples

    def _encrypt(self, transcript: Transcript, channels: Channels, plaintext: NDArray[np.int32]) -> Contribution:
        parameters = transcript.header.parameters
        key = aggregation.keygen(parameters)
        ciphertext = aggregation.encrypt(parameters, transcript.seed, key, plaintext)
        names = transcript.names
        shares = shamir.share(
            key.spend("share").reshape(-1), transcript.header.agreement.threshold, len(names), SecretRandom()
        )
        sealed = {
            name: channels.seal(name, row.astype("<u2").tobytes()) for name, row in zip(names, shares, strict=True)
        }
        return Contribution(name=self.name, update=ciphertext.to_bytes(), shares=sealed)

    def _confirm(self, message: Contributors) -> Confirmation:
        header, transcript = self._transcript(message)
        self._check_contributors(transcript, message.names)
        self._keys.confirm(header, transcript.context, message.names)
        return Confirmation(
            name=self.name, signature=self.identity.sign_contributors(transcript.context, message.names)
        )

    def _open(self, message: Opening) -> SumShare:
        header, transcript = self._transcript(message)
        contributors = sorted(message.shares)
        self._check_contributors(transcript, contributors)
        check_confirmed(transcript, contributors, message.confirmations, self.terms.roster)

        def share(private: X25519PrivateKey) -> bytes:
            channels = self._channels(transcript, private)
            rows = [self._share(sender, channels.unseal(sender, message.shares[sender])) for sender in contributors]
            return shamir.add(rows).astype("<u2").tobytes()

        return SumShare(name=self.name, share=self._keys.open(header, transcript.context, contributors, share))

    def _check_contributors(self, transcript: Transcript, contributors: Sequence[str]) -> None:
        number = transcript.header.number
        if not set(contributors) <= set(transcript.names) or len(set(contributors)) < len(contributors):
            raise FederationError(f"round {number}: the sum is to hold somebody who takes no part, or somebody twice")
        check_enough(transcript.header, contributors, "contributed")

    def _share(self, sender: str, content: bytes) -> NDArray[np.uint16]:
        size = self.agreement.parameters().ring.lattice_dim
        row = np.frombuffer(content, dtype="<u2") if len(content) == 2 * size else np.zeros(0, dtype="<u2")
        if row.size != size or int(row.max()) >= shamir.PRIME:
            raise FederationError(f"the share of {sender!r} for {self.name!r} is no share of a key of this federation")
        return row

    def _channels(self, transcript: Transcript, private: X25519PrivateKey) -> Channels:
        if transcript.publics.get(self.name) != private.public_key().public_bytes_raw():
            raise FederationError(f"round {transcript.header.number}: the key listed for {self.name!r} is not its own")
        return Channels(self.name, private, transcript.publics, transcript.context)
