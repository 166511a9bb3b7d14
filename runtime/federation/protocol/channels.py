"""Prove who a participant is, and seal shares from one to another through a server that cannot read them.

An identity is an Ed25519 key; the roster says whose is whose. For each round a participant draws an X25519 key and signs it
together with everything public that the round is about. Two such keys give a secret (RFC 7748), HKDF-SHA256 (RFC 5869)
makes a key of it for one direction between two names in one round, and ChaCha20-Poly1305 (RFC 8439) seals the share under
that key with the same names and round as associated data. So a share opens for its recipient, from its sender, in its
round, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hecompile.errors import FederationError, InputError
from hecompile.files import create_private
from hecompile.he.random.sampling import Unsharable

_NONCE_BYTES = 12
_SHARE, _ADVERT = b"hecompile/federation/share/1", b"hecompile/federation/advert/1"
_CONTRIBUTORS = b"hecompile/federation/contributors/1"

Roster = Mapping[str, bytes]
"""Names of the owners and their Ed25519 public keys, 32 bytes each; known to all beforehand."""


class Identity(Unsharable):
    """Hold an owner's name and its long-term signing key."""

    __slots__ = ("_key", "name")

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key

    @staticmethod
    def generate(name: str) -> Identity:
        """Draw a new identity from the operating system's generator."""
        return Identity(name, Ed25519PrivateKey.generate())

    @staticmethod
    def load_or_create(name: str, path: Path) -> Identity:
        """Read the identity whose 32 secret bytes are in `path`, or write a new one, readable by its owner alone.

        Raises InputError for a file of another length.
        """
        if path.exists():
            secret = path.read_bytes()
            if len(secret) != 32:
                raise InputError(
                    f"{path} is no identity key (32 bytes); restore it, or delete it and register the new one"
                )
            return Identity(name, Ed25519PrivateKey.from_private_bytes(secret))
        identity = Identity.generate(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        create_private(path, identity._key.private_bytes_raw())
        return identity

    @property
    def public(self) -> bytes:
        """Return the public key for the roster, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign_hello(self, challenge: bytes) -> bytes:
        """Prove to a server that this is the owner; `challenge` starts with a label that nothing else signed has."""
        return self._key.sign(challenge)

    def sign_advert(self, context: bytes, public: bytes) -> bytes:
        """Sign this owner's public key of the round, bound to `context`; 64 bytes."""
        return self._key.sign(_advert(context, self.name, public))

    def sign_contributors(self, context: bytes, contributors: Sequence[str]) -> bytes:
        """Sign whose updates are in the sum of the round, bound to `context`; 64 bytes."""
        return self._key.sign(contributors_text(context, contributors))


def check_advert(roster: Roster, name: str, context: bytes, public: bytes, signature: bytes) -> None:
    """Raise FederationError unless `name` is in the roster and signed `public` for `context`."""
    _check(roster, name, signature, _advert(context, name, public), "the round's key")


def check_contributors(
    roster: Roster, name: str, context: bytes, contributors: Sequence[str], signature: bytes
) -> None:
    """Raise FederationError unless `name` is in the roster and signed these contributors for `context`."""
    _check(roster, name, signature, contributors_text(context, contributors), "the list of contributors")


def _check(roster: Roster, name: str, signature: bytes, text: bytes, what: str) -> None:
    if name not in roster:
        raise FederationError(f"{name!r} is not in the roster of this federation")
    try:
        Ed25519PublicKey.from_public_bytes(roster[name]).verify(signature, text)
    except (InvalidSignature, ValueError):
        raise FederationError(
            f"{what} of {name!r} is not signed by {name!r} for this round: forged or replayed"
        ) from None


def contributors_text(context: bytes, contributors: Sequence[str]) -> bytes:
    """Write the contributors of a round, in the order of their names, as they are signed."""
    names = (_sized(name.encode()) for name in sorted(contributors))
    return b"".join((_CONTRIBUTORS, _sized(context), *names))


@dataclass(frozen=True)
class Channels:
    """Seal and open shares between the participants of one round.

    Args:
        context: digest of everything public about the round, all participants' keys included.
        publics: the participants' X25519 keys of the round.
    """

    name: str
    private: X25519PrivateKey
    publics: Mapping[str, bytes]
    context: bytes

    def seal(self, recipient: str, content: bytes) -> bytes:
        """Encrypt for `recipient` alone; returns nonce, ciphertext and tag."""
        nonce = os.urandom(_NONCE_BYTES)
        associated = _direction(self.context, self.name, recipient)
        return nonce + self._cipher(recipient, associated).encrypt(nonce, content, associated)

    def unseal(self, sender: str, sealed: bytes) -> bytes:
        """Decrypt; raises FederationError for anything that `sender` did not seal for this participant in this round."""
        associated = _direction(self.context, sender, self.name)
        try:
            return self._cipher(sender, associated).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], associated)
        except (InvalidTag, ValueError):
            raise FederationError(
                f"the share of {sender!r} for {self.name!r} is forged, replayed or of another round"
            ) from None

    def _cipher(self, other: str, associated: bytes) -> ChaCha20Poly1305:
        try:
            shared = self.private.exchange(X25519PublicKey.from_public_bytes(self.publics[other]))
        except (ValueError, KeyError):  # a point of small order, or nobody of this round
            raise FederationError(f"{other!r} has no usable key in this round") from None
        key = HKDF(algorithm=SHA256(), length=32, salt=self.context, info=associated).derive(shared)
        return ChaCha20Poly1305(key)


def _direction(context: bytes, sender: str, recipient: str) -> bytes:
    return b"".join((_SHARE, _sized(context), _sized(sender.encode()), _sized(recipient.encode())))


def _advert(context: bytes, name: str, public: bytes) -> bytes:
    return b"".join((_ADVERT, _sized(context), _sized(name.encode()), _sized(public)))


def _sized(part: bytes) -> bytes:
    """Put the length before a part, so that no two lists of parts read alike."""
    return len(part).to_bytes(4, "little") + part
