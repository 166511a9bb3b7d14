"""Name the client's side of a product: as training calls it, and the simple path that it is tested against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hecompile.he.encode import decode, encode
from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.scheme import Ciphertext, DecryptionKey, decrypt, encrypt_tokens


@dataclass(frozen=True)
class ClientPath:
    """Hold both halves of a client's work on a product.

    encrypt: (A, real rows f32 [T, in], circuit) → ciphertext, and the secret that decrypts its reply.
    decrypt: (that, hint, reply uint8 [reply_bytes, T, out], circuit) → real rows f32 [T, out].
    """

    encrypt: Callable[[PublicMatrix, Tensor, LinearParameters], tuple[Ciphertext, Any]]
    decrypt: Callable[[Any, Hint, Tensor, LinearParameters], Tensor]


def _reference_encrypt(
    public: PublicMatrix, x: Tensor, linear: LinearParameters
) -> tuple[Ciphertext, tuple[DecryptionKey, Tensor]]:
    integers, scale = encode(x, linear.input_bound, linear.norm_bound)
    ciphertext, key = encrypt_tokens(public, integers, linear)
    return ciphertext, (key, scale)


def _reference_decrypt(
    key: tuple[DecryptionKey, Tensor], hint: Hint, reply: Tensor, linear: LinearParameters
) -> Tensor:
    return decode(decrypt(key[0], hint, reply, linear), key[1])


TRAINED = ClientPath(encrypt_reals, decrypt_reals)
"""The functions that `hecompile.runtime.client.products` calls."""

REFERENCE = ClientPath(_reference_encrypt, _reference_decrypt)

PATHS = {"trained": TRAINED, "torch reference": REFERENCE}
