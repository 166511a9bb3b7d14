"""Define the scheme in five verbs: keygen, encrypt, evaluate, decrypt, and setup (`setup.py`).

With q = 2^32, a ring R_q of polynomials of degree < d (`ring.py`), a public matrix A of rows in R_q^m, and tokens running
along the coefficients:

    keygen     s ← uniform ternary in R^m, for one block of T ≤ d tokens and never again
    setup      H = W·A mod q                                   once per model
    encrypt    b_j = ⟨A_j, s⟩[0:T] + e_j + x_j mod q            for each input feature j, e discrete Gaussian
    evaluate   Y = W·b mod q                                   the worker: one integer matrix product
    decrypt    Y_i - ⟨H_i, s⟩[0:T] mod q, centred = W_i·(x + e)

This is Regev's encryption with a shared A and a fresh secret per message (Peikert, Vaikuntanathan, Waters, CRYPTO 2008;
Frodo, CCS 2016), used as SimplePIR (Henzinger et al., USENIX Security 2023) does. The lattice is a module lattice or, where
the ring is packed, an ideal lattice: m rows of A are then the matrix of multiplication by one ring element a, and their m
masks the product a·s. b and Y may travel rounded (`LinearParameters`). Nothing but b is sent: T tokens cost T words per
feature.

This module works on integers in the simplest way. Clients use `fused.py`, which is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, SecurityError, WorkerError
from hecompile.he.hints import Hint
from hecompile.he.kernels.transform import extend_secrets, transform_secrets
from hecompile.he.parameters import LOG_Q, LinearParameters, RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import OneTimeSecret, SecretRandom, Unsharable
from hecompile.he.ring import folded_fft, row_chunks
from hecompile.he.setup import setup
from hecompile.word_sizes import bytes_of

__all__ = ["Ciphertext", "DecryptionKey", "decrypt", "encrypt", "encrypt_tokens", "evaluate", "keygen", "setup"]


@dataclass(frozen=True, eq=False)
class Ciphertext:
    """Hold what the worker gets: the top bits of b, rounded, as byte planes uint8 `[upload_limbs, T, in_features]`."""

    planes: Tensor


class DecryptionKey(Unsharable):
    """Hold the secrets of one ciphertext: they decrypt any number of replies, and cannot be copied or pickled."""

    __slots__ = ("_secrets", "_transformed", "linear", "params", "tokens")

    def __init__(
        self, params: RingParameters, linear: LinearParameters, tokens: int, secrets: NDArray[np.int8]
    ) -> None:
        self.params = params
        self.linear = linear
        self.tokens = tokens
        self._secrets = secrets  # int8 [blocks, rank, ring_dim]
        self._transformed: dict[type[np.floating], NDArray[Any]] = {}

    def secret_ffts(self) -> Tensor:
        """Transform the secrets as `ring.FoldedFft.forward` does: complex128 `[blocks, rank, ring_dim/2]`."""
        return folded_fft(self.params).forward(torch.from_numpy(self._secrets))

    def secrets_transformed(self, precision: type[np.floating] = np.float64) -> NDArray[Any]:
        """Return the secrets for the kernels, in float64 or float32, made once: see `transform.transform_secrets`."""
        if np.float64 not in self._transformed:
            self._transformed[np.float64] = transform_secrets(self._secrets, self.params)
        if precision not in self._transformed:
            self._transformed[precision] = self._transformed[np.float64].astype(precision)
        return self._transformed[precision]

    def secrets_extended(self) -> NDArray[np.float64]:
        """Extend the secrets, at each call, for encryption under a packed ring: see `transform.extend_secrets`."""
        return extend_secrets(self.secrets_transformed(), self.params)

    def check(self, hint: Hint, reply: Tensor, linear: LinearParameters) -> None:
        """Check that hint, reply and circuit belong to this key.

        Raises:
            WorkerError: the reply does not have the requested shape.
            InputError: the hint or the circuit is another.
        """
        if self.linear.in_features != linear.in_features or self.linear.upload_bits != linear.upload_bits:
            raise InputError("this ciphertext was made for a circuit with other inputs: decrypt with that one")
        if hint.params != self.params or hint.rows != linear.out_features:
            raise InputError(
                f"the hint has {hint.rows} rows and may be of another ring; {linear.out_features} are wanted"
            )
        hint.check_precision(linear.decryption_precision)
        if hint.bits < linear.hint_bits:
            raise InputError(f"the hint's words have {hint.bits} bits; {linear.hint_bits} are wanted: make the bundle again")
        shape = (linear.reply_bytes, self.tokens, linear.out_features)
        if reply.dtype != torch.uint8 or reply.shape != shape:
            raise WorkerError(f"the reply must be uint8 {list(shape)}, got {reply.dtype} {list(reply.shape)}")


def blocks(tokens: int, ring_dim: int) -> list[slice]:
    """Cut tokens into blocks of at most ring_dim."""
    return [slice(start, min(start + ring_dim, tokens)) for start in range(0, tokens, ring_dim)]


def keygen(params: RingParameters) -> OneTimeSecret:
    """Draw a fresh secret for one block of tokens."""
    return OneTimeSecret(SecretRandom(), params.rank, params.ring_dim)


def encrypt_tokens(public: PublicMatrix, x: Tensor, linear: LinearParameters) -> tuple[Ciphertext, DecryptionKey]:
    """Encrypt any number of tokens, each block of ring_dim of them under a fresh secret: see `encrypt`."""
    _check_input(public, x, linear)
    return encrypt(public, [keygen(public.params) for _ in blocks(len(x), public.params.ring_dim)], x, linear)


def encrypt(
    public: PublicMatrix, secrets: Sequence[OneTimeSecret], x: Tensor, linear: LinearParameters
) -> tuple[Ciphertext, DecryptionKey]:
    """Encrypt integers, and spend the secrets.

    Args:
        public: A, with at least in_features rows.
        secrets: one for each block of ring_dim tokens, all unspent.
        x: int32 or int64 `[T, in_features]`; `linear.admits` every row.
        linear: the circuit.

    Raises:
        InputError: x has the wrong shape or type, or a value that could overflow.
        SecurityError: a secret was used before, or is not a OneTimeSecret.
    """
    _check_input(public, x, linear)
    if not all(type(secret) is OneTimeSecret for secret in secrets):
        raise SecurityError("encrypt consumes OneTimeSecret objects made by keygen and nothing else")
    if len(secrets) != len(blocks(len(x), public.params.ring_dim)):
        raise InputError(f"{len(x)} tokens need one secret per {public.params.ring_dim}, got {len(secrets)}")
    error = SecretRandom().discrete_gaussian((len(x), linear.in_features))
    return _encrypt_with(public, [secret.spend() for secret in secrets], error, x, linear)


def _encrypt_with(
    public: PublicMatrix,
    secrets: Sequence[NDArray[np.int8]],
    error: NDArray[np.int8],
    x: Tensor,
    linear: LinearParameters,
) -> tuple[Ciphertext, DecryptionKey]:
    """Encrypt deterministically: secrets int8 `[rank, ring_dim]` per block, error int8 `[T, in]`, x integer `[T, in]`."""
    params = public.params
    fft = folded_fft(params)
    key = DecryptionKey(params, linear, len(x), np.stack(secrets))
    b = torch.add(x, torch.from_numpy(error)).to(torch.int32)  # [T, in]
    for block, secret_fft in zip(blocks(len(x), params.ring_dim), key.secret_ffts(), strict=True):
        for rows in row_chunks(linear.in_features, params.ring_dim):
            mask = fft.inner_product(public.fft(rows), secret_fft, block.stop - block.start)  # [rows, T of the block]
            b[block, rows] += mask.t()
    planes = _top_bytes(b, linear.upload_bits)
    return Ciphertext(planes), key


def evaluate(weight: Tensor, planes: Tensor, linear: LinearParameters) -> Tensor:
    """Compute what a worker computes, exactly and simply: the reference that engines are tested against.

    Args:
        weight: int8 or int16 `[out, in]`.
        planes: uint8 `[upload_limbs, T, in]`.
        linear: the circuit.

    Returns:
        uint8 `[reply_bytes, T, out]`: the top `reply_bits` of W·word mod 2^(8·upload_limbs), rounded to nearest, then zeros.

    Raises:
        InputError: the weight or the planes do not have the circuit's type or shape.
    """
    if weight.shape != (linear.out_features, linear.in_features) or weight.dtype not in (torch.int8, torch.int16):
        raise InputError(f"the weight must be int8 or int16 [{linear.out_features}, {linear.in_features}]")
    outer = (linear.upload_limbs, linear.in_features)
    if planes.dtype != torch.uint8 or planes.dim() != 3 or planes.shape[::2] != outer:
        raise InputError(f"the ciphertext must be uint8 [{linear.upload_limbs}, T, {linear.in_features}]")
    # Each float64 product is exact: its sums are integers below 255 · 2^15 · in.
    partial = [(plane.double() @ weight.double().t()).to(torch.int64) for plane in planes]
    total = sum((part << (8 * limb) for limb, part in enumerate(partial)), torch.zeros_like(partial[0]))  # [T, out]
    return _top_bytes((total << (LOG_Q - 8 * linear.upload_limbs)).to(torch.int32), linear.reply_bits)


def decrypt(key: DecryptionKey, hint: Hint, reply: Tensor, linear: LinearParameters) -> Tensor:
    """Return W·x plus noise within `linear.noise_bound`.

    Args:
        key: of the ciphertext that was evaluated.
        hint: of the circuit's weight under the same A.
        reply: uint8 `[reply_bytes, T, out_features]`.
        linear: the circuit.

    Returns:
        int64 `[T, out_features]`, centred.

    Raises:
        WorkerError: the reply does not have the requested shape.
        InputError: the key, hint and circuit do not belong together.
    """
    key.check(hint, reply, linear)
    fft = folded_fft(key.params)
    result = _from_top_bytes(reply)  # int32 [T, out], wraps mod q
    for rows in row_chunks(linear.out_features, key.params.ring_dim):
        hint_fft = hint.fft(rows)  # [rank, rows, d/2]
        for block, secret_fft in zip(blocks(key.tokens, key.params.ring_dim), key.secret_ffts(), strict=True):
            result[block, rows] -= fft.inner_product(hint_fft, secret_fft, block.stop - block.start).t()
    return result.to(torch.int64)


def _check_input(public: PublicMatrix, x: Tensor, linear: LinearParameters) -> None:
    if x.dtype not in (torch.int32, torch.int64) or x.dim() != 2 or x.shape[1] != linear.in_features or len(x) == 0:
        raise InputError(
            f"the plaintext must be int32 or int64 [tokens, {linear.in_features}], got {x.dtype} {list(x.shape)}"
        )
    if public.rows < linear.in_features:
        raise InputError(f"the public matrix has {public.rows} rows, the circuit {linear.in_features} inputs")
    low, high = torch.aminmax(x)
    if max(-int(low), int(high)) > linear.input_bound and not bool(linear.admits(x).all()):
        raise InputError(
            f"a plaintext is beyond the input bound {linear.input_bound} and the norm bound {linear.norm_bound:.0f}, and "
            "could overflow"
        )


def _top_bytes(words: Tensor, bits: int) -> Tensor:
    """Round int32 words mod 2^32 to their top `bits`, ties up: uint8 `[bytes that hold them, *words.shape]`."""
    step = 1 << (LOG_Q - bits)
    rounded = (words + step // 2) & -step if step > 1 else words
    split = rounded.contiguous().view(torch.uint8).view(*words.shape, 4)[..., 4 - bytes_of(bits) :]
    return split.permute(2, 0, 1).contiguous()


def _from_top_bytes(planes: Tensor) -> Tensor:
    """Read byte planes `[count, T, n]` as the top bytes of words mod 2^32: int32 `[T, n]`."""
    words = torch.zeros(planes.shape[1:], dtype=torch.int32)
    for index, plane in enumerate(planes.flip(0)):  # the top byte first
        words |= plane.to(torch.int32) << (24 - 8 * index)
    return words
