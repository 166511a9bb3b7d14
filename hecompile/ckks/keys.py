"""Make keys: the client holds a `SecretKey`, a worker `EvaluationKeys`, and words of ciphertexts go between them.

SEAL draws keys from the operating system's generator, for each session. Encryption is symmetric, each time with fresh
randomness.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.ckks.library import MemoryFile, fields_and_words, load_words, seal
from hecompile.ckks.parameters import CkksParameters
from hecompile.errors import InputError, SecurityError, WorkerError
from hecompile.he.random.sampling import Unsharable

Words = NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class EvaluationKeys:
    """Hold relinearisation keys, encryptions of s² under s, which are public by design.

    There are no rotation keys, for nothing rotates.

    Raises:
        InputError: the words are no keys of these parameters.
    """

    parameters: CkksParameters
    words: Words
    """uint32 `[digits, 2, moduli, ring_dim]`."""

    def __post_init__(self) -> None:
        count = len(self.parameters.moduli)
        shape = (count - 1, 2, count, self.parameters.ring_dim)
        if self.words.dtype != np.uint32 or self.words.shape != shape:
            raise InputError(
                f"evaluation keys of these parameters are uint32 {list(shape)}, got {self.words.dtype} "
                f"{list(self.words.shape)}: they belong to other parameters"
            )
        if not in_range(self.words, self.parameters.moduli):
            raise InputError("the evaluation keys have words beyond their moduli: they are of other parameters, or damaged")


class SecretKey(Unsharable):
    """Draw a key, encrypt and decrypt with it; it cannot be copied, pickled, printed, or used by a forked process."""

    __slots__ = ("_context", "_decryptor", "_encoder", "_encryptor", "_fields", "_file", "_key", "_process", "parameters")

    def __init__(self, parameters: CkksParameters) -> None:
        api = seal()
        self.parameters = parameters
        self._process = os.getpid()
        self._context = parameters.context()
        self._key = api.KeyGenerator(self._context).secret_key()
        self._encryptor = api.Encryptor(self._context, self._key)
        self._decryptor = api.Decryptor(self._context, self._key)
        self._encoder = api.CKKSEncoder(self._context)
        self._file = MemoryFile()
        self._fields = self._fields_per_level()

    def close(self) -> None:
        """Release the memory that ciphertexts passed through."""
        self._file.close()

    def evaluation_keys(self) -> EvaluationKeys:
        """Make the public keys that a worker needs to multiply."""
        api = seal()
        self._check()
        keys = api.RelinKeys()
        api.KeyGenerator(self._context, self._key).create_relin_keys(keys)
        shape = (2, len(self.parameters.moduli), self.parameters.ring_dim)
        digits = [fields_and_words(key.data(), self._file, shape)[1] for key in keys.key(2)]
        return EvaluationKeys(self.parameters, np.stack(digits))

    def encrypt(self, values: NDArray[np.float64]) -> Words:
        """Encrypt values at the top level.

        Args:
            values: float64 `[count, slots]`, or `[count]` for values that stand in all slots.

        Returns:
            uint32 `[count, 2, moduli, ring_dim]`.

        Raises:
            InputError: values are not finite or beyond the scheme's bound, or too many; the message shows none of them.
        """
        self._check()
        parameters = self.parameters
        if not np.isfinite(values).all() or (values.size and np.abs(values).max() > parameters.value_bound):
            raise InputError(f"values to encrypt are not finite or beyond ±{parameters.value_bound:.3g}")
        if values.ndim == 2 and values.shape[1] > parameters.slots:
            raise InputError(f"{values.shape[1]} sequences are more than the {parameters.slots} slots of a ciphertext")
        api = seal()
        shape = (2, parameters.primes(parameters.levels), parameters.ring_dim)
        result = np.empty((len(values), *shape), dtype=np.uint32)
        plain, scale = api.Plaintext(), parameters.scales[-1]
        for row, value in enumerate(values):
            self._encoder.encode(value.tolist() if values.ndim == 2 else float(value), scale, plain)
            ciphertext = api.Ciphertext(self._context)
            self._encryptor.encrypt_symmetric(plain, ciphertext)
            result[row] = fields_and_words(ciphertext, self._file, shape)[1]
        return result

    def decrypt(self, words: Words, scale_level: int) -> NDArray[np.float64]:
        """Decrypt uint32 `[count, 2, k, ring_dim]`, whose scale is that of `scale_level`: float64 `[count, slots]`.

        Raises:
            WorkerError: the words are no ciphertexts of these parameters.
        """
        self._check()
        parameters, api = self.parameters, seal()
        if words.ndim != 4 or words.shape[2] - 2 not in self._fields or not 0 <= scale_level <= parameters.levels:
            raise WorkerError(f"ciphertexts of shape {list(words.shape)} do not belong to these parameters")
        if words.shape[1] != 2 or words.shape[3] != parameters.ring_dim or not in_range(words, parameters.moduli):
            raise WorkerError("the worker sent ciphertexts with words beyond their moduli, or of another ring")
        result = np.empty((len(words), parameters.slots))
        fields, scale = self._fields[words.shape[2] - 2], parameters.scales[scale_level]
        ciphertext, plain = api.Ciphertext(self._context), api.Plaintext()
        for row, one in enumerate(words):
            if not one[1].any():  # SEAL refuses to load it, and its content would be public
                raise WorkerError("the worker sent a ciphertext that encrypts nothing")
            load_words(ciphertext, self._context, self._file, fields, scale, one)
            self._decryptor.decrypt(ciphertext, plain)
            result[row] = self._encoder.decode_double(plain)
        return result

    def _fields_per_level(self) -> dict[int, bytes]:
        """Return the fields that SEAL writes before the coefficients, by level, from encryptions of zero."""
        api, parameters = seal(), self.parameters
        evaluator, ciphertext, plain = api.Evaluator(self._context), api.Ciphertext(self._context), api.Plaintext()
        self._encoder.encode(0.0, parameters.scales[-1], plain)
        self._encryptor.encrypt_symmetric(plain, ciphertext)
        fields = {}
        for level in range(parameters.levels, -1, -1):
            shape = (2, parameters.primes(level), parameters.ring_dim)
            fields[level] = fields_and_words(ciphertext, self._file, shape)[0]
            if level:
                evaluator.mod_switch_to_next_inplace(ciphertext)
        return fields

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise SecurityError("this secret key belongs to the parent process: make one in the process that uses it")


def in_range(words: Words, moduli: tuple[int, ...]) -> bool:
    """Return whether every word is below its modulus: words uint32 `[.., k, ring_dim]`, of the first k moduli."""
    bounds: Any = np.array(moduli[: words.shape[-2]], dtype=np.uint32)[:, None]
    return all(bool((one < bounds).all()) for one in words)
