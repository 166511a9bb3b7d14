"""What a model over an encrypted worker is to its caller, whichever scheme and protocol answer: a forward pass and its cost.

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
    """logits float32 [B, S, V]; wall seconds, those of them in which the client computed, and whole frames in bytes."""

    logits: NDArray[np.float32]
    total_seconds: float
    client_seconds: float
    bytes_up: int
    bytes_down: int


class RemoteModel(Protocol):
    """A model on private tokens of which a worker computes what it does on ciphertexts alone. Open it as a context manager,
    by `hecompile.runtime.client.session.open_session` or as a `CkksSession`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that travels with the plan."""

    def forward(self, tokens: NDArray[np.int64]) -> ForwardPass:
        """Logits of every position of tokens int64 [B, S], all rows of S real tokens.

        Raises InputError for rows that the plan does not take, WorkerError from the worker.
        """
