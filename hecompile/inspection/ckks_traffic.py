"""Count the ciphertexts that an evaluation sends before any is made.

Which entries of a tensor have a ciphertext follows from the graph alone: masked entries have none, and what is repeated is
sent once. So the circuit is walked by the worker's own evaluator, with ciphertexts of no words: the same numbering of
elements, and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.keys import EvaluationKeys, Words
from hecompile.ckks.parameters import CkksParameters


@dataclass(frozen=True)
class CkksTraffic:
    """Count the ciphertexts of one evaluation: of the input, of each refresh by the name of its value, of the logits."""

    inputs: int
    refreshes: dict[str, int]
    outputs: int

    @property
    def refreshed(self) -> int:
        return sum(self.refreshes.values())

    def bytes_up(self, parameters: CkksParameters) -> int:
        """Return the payload bytes from the client: inputs and fresh ciphertexts, at the top level."""
        return (self.inputs + self.refreshed) * parameters.ciphertext_bytes(parameters.levels)

    def bytes_down(self, parameters: CkksParameters) -> int:
        """Return the payload bytes to the client: ciphertexts to refresh, and the logits, cut to two primes."""
        return (self.refreshed + self.outputs) * parameters.ciphertext_bytes(0)


def predicted_traffic(circuit: PolynomialCircuit, parameters: CkksParameters) -> CkksTraffic:
    """Count the traffic of one evaluation, whatever the number of sequences.

    Raises InputError and LegalityError as an evaluation of this circuit would.
    """
    refreshes: dict[str, int] = {}

    def refresh(value: str, stale: CkksTensor) -> CkksTensor:
        truncated = counter.truncated(stale)
        refreshes[value] = len(truncated.words)
        return counter.fresh(truncated.index, len(truncated.words))

    inputs = {}
    with _Counter(parameters) as counter:
        for name, shape in circuit.inputs.items():
            count = int(np.prod(shape))
            inputs[name] = counter.fresh(np.arange(count).reshape(shape), count)
        result = counter.truncated(circuit.run(counter, inputs, refresh))
    return CkksTraffic(sum(len(tensor.words) for tensor in inputs.values()), refreshes, len(result.words))


class _Counter(Evaluator):
    """Evaluate without arithmetic: words have a last axis of size 0, and no kernel runs."""

    def __init__(self, parameters: CkksParameters) -> None:
        count = len(parameters.moduli)
        keys = np.zeros((count - 1, 2, count, parameters.ring_dim), dtype=np.uint32)
        super().__init__(EvaluationKeys(parameters, keys), threads=1)

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fresh(self, index: NDArray[Any], count: int) -> CkksTensor:
        return CkksTensor(self._empty(count, self.parameters.levels), index, self.parameters.levels)

    def _run(self, count: int, kernel: Callable[..., None], *arguments: Any) -> None:
        pass

    def _exact_product(self, digits: NDArray[np.float64], x: NDArray[np.float64], prime: int) -> NDArray[np.float64]:
        return np.empty((len(digits), 0))

    def _empty(self, count: int, level: int) -> Words:
        return np.empty((count, 2, self.parameters.primes(level), 0), dtype=np.uint32)
