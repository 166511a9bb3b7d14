"""The client's side of a product as training calls it, and the simple path that it is tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hecompile.he.encode import decode, encode
from hecompile.he.fused import RealKey, decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.scheme import Ciphertext, DecryptionKey, decrypt, encrypt_tokens


class Encrypt(Protocol):
    """Real rows f32 [T, in] → ciphertext, its key, and the scale [T, 1]."""

    def __call__(
        self, public: PublicMatrix, x: Tensor, linear: LinearParameters
    ) -> tuple[Ciphertext, DecryptionKey, Tensor]: ...


class Decrypt(Protocol):
    """A reply uint8 [reply_bytes, T, out] → real rows f32 [T, out]."""

    def __call__(
        self, key: DecryptionKey, hint: Hint, reply: Tensor, linear: LinearParameters, scale: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class ClientPath:
    encrypt: Encrypt
    decrypt: Decrypt


def _reference_encrypt(
    public: PublicMatrix, x: Tensor, linear: LinearParameters
) -> tuple[Ciphertext, DecryptionKey, Tensor]:
    integers, scale = encode(x, linear.input_bound, linear.norm_bound)
    return *encrypt_tokens(public, integers, linear), scale


def _reference_decrypt(
    key: DecryptionKey, hint: Hint, reply: Tensor, linear: LinearParameters, scale: Tensor
) -> Tensor:
    return decode(decrypt(key, hint, reply, linear), scale)


REFERENCE = ClientPath(_reference_encrypt, _reference_decrypt)


def _trained_encrypt(
    public: PublicMatrix, x: Tensor, linear: LinearParameters
) -> tuple[Ciphertext, DecryptionKey, Tensor]:
    ciphertext, key = encrypt_reals(public, x, linear)
    return ciphertext, key, torch.from_numpy(key.scale)[:, None]


def _trained_decrypt(key: DecryptionKey, hint: Hint, reply: Tensor, linear: LinearParameters, scale: Tensor) -> Tensor:
    assert isinstance(key, RealKey)  # it knows the scale
    return decrypt_reals(key, hint, reply, linear)


TRAINED = ClientPath(_trained_encrypt, _trained_decrypt)
"""What `runtime.products` calls."""

PATHS = {"trained": TRAINED, "torch reference": REFERENCE}
