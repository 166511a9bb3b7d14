"""Look up a quantised activation under TFHE (concrete-python), by programmable bootstrapping.

Every element is one ciphertext and one bootstrapping. Its result is exactly the table's entry, but for a probability that is
chosen (Chillotti et al., TFHE, eprint 2018/421; programmable: Chillotti, Joye and Paillier, eprint 2021/091). keygen,
encrypt, evaluate and decrypt all happen in this process: it shows what the integer form of a plan means under another scheme
and what it costs, and is not for serving. Concrete's parameters have at least 128 bits of security, its default.
"""

from __future__ import annotations

import threading
import time

import numpy as np
from concrete import fhe

from hecompile.approximation.silu_table import ActivationTable
from hecompile.errors import InputError, WorkerError
from hecompile.runtime.worker.engines.concrete_engine import P_ERROR

MAX_ELEMENTS = 1 << 12
"""Limit on the elements of one call, which at 8 bits would take hours."""


class EncryptedTable:
    """Keep the TFHE circuit of one table, compiled and keyed when it is first used.

    Args:
        table: its integer form.
        block: elements that are encrypted together.
        p_error: the largest probability with which a single look-up may be wrong.

    Attributes:
        keygen_seconds, evaluate_seconds: time spent so far.
        key_bytes: size of the bootstrapping key that the evaluating side needs.
    """

    def __init__(self, table: ActivationTable, block: int = 8, p_error: float = P_ERROR) -> None:
        if block < 1 or not 0 < p_error < 1:
            raise InputError(f"needs block >= 1 and 0 < p_error < 1, got {block} and {p_error}")
        self.table, self.block, self._p_error = table, block, p_error
        self.keygen_seconds, self.evaluate_seconds, self.key_bytes = 0.0, 0.0, 0
        self._circuit: fhe.Circuit | None = None
        self._lock = threading.Lock()

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Look up integers of any shape, from 0 to 2^bits - 1, on ciphertexts; returns int64 of that shape.

        The result is that of `ActivationTable.lookup`.

        Raises WorkerError for an index outside the table, and for more than 4096 elements.
        """
        largest = (1 << self.table.bits) - 1
        if indices.dtype.kind not in "iu" or (indices.size and not 0 <= indices.min() <= indices.max() <= largest):
            raise WorkerError(f"a table of {self.table.bits} bits takes integers from 0 to {largest}")
        if indices.size > MAX_ELEMENTS:
            raise WorkerError(
                f"{indices.size} elements; a table under TFHE takes at most {MAX_ELEMENTS} at once: it is for small tensors"
            )
        flat = indices.astype(np.int64).ravel()
        padded = np.zeros(-(-flat.size // self.block) * self.block, dtype=np.int64)
        padded[: flat.size] = flat
        with self._lock:  # concrete does not document its circuits as thread-safe
            parts = [self._run(part) for part in padded.reshape(-1, self.block)]
        found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return found[: flat.size].reshape(indices.shape)

    def _run(self, part: np.ndarray) -> np.ndarray:
        circuit = self._keyed()
        encrypted = circuit.encrypt(part)
        start = time.perf_counter()
        result = circuit.run(encrypted)
        self.evaluate_seconds += time.perf_counter() - start
        return np.asarray(circuit.decrypt(result), dtype=np.int64)

    def _keyed(self) -> fhe.Circuit:
        if self._circuit is None:
            circuit = _compile(self.table, self.block, self._p_error)
            start = time.perf_counter()
            circuit.keygen()
            self.keygen_seconds = time.perf_counter() - start
            self.key_bytes = int(circuit.size_of_bootstrap_keys)
            self._circuit = circuit
        return self._circuit


def _compile(table: ActivationTable, block: int, p_error: float) -> fhe.Circuit:
    """Compile `x [block] → table[x] [block]` to a TFHE circuit."""
    entries = fhe.LookupTable(list(table.entries))

    def look_up(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = entries[x]
        return found

    inputs = [np.zeros(block, dtype=np.int64), np.full(block, (1 << table.bits) - 1)]
    try:
        return fhe.Compiler(look_up, {"x": "encrypted"}).compile(inputs, fhe.Configuration(p_error=p_error))
    except RuntimeError as error:
        raise WorkerError(f"concrete finds no TFHE parameters for a table of {table.bits} bits ({error})") from error
