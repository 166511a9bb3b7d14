"""Define the interface of a model over an encrypted worker, whatever its scheme and protocol: a forward pass and its cost.

`hecompile.runtime.client.session.Session` (linear layers on the worker) and `hecompile.runtime.ckks.client.CkksSession` (the
whole model on it) both are one. Training, caches and refreshes are not shared and are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ForwardPass:
    """Hold logits float32 [B, S, V], and their cost: wall seconds, those in which the client computed, frames in bytes."""

    logits: NDArray[np.float32]
    total_seconds: float
    client_seconds: float
    bytes_up: int
    bytes_down: int


class RemoteModel(Protocol):
    """Run a model on private tokens with a worker that sees ciphertexts alone.

    Open it as a context manager, by `hecompile.runtime.client.session.open_session` or as a `CkksSession`.
    """

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that travels with the plan."""

    def forward(self, tokens: NDArray[np.int64]) -> ForwardPass:
        """Compute the logits of every position of tokens int64 [B, S], all rows of S real tokens.

        Raises InputError for rows that the plan does not take, WorkerError from the worker.
        """
