"""Define the protocol of engines, and the check of a request that all of them share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hecompile.bundles.worker import CircuitSpec, WorkerBundle
from hecompile.errors import WorkerError


class Engine(Protocol):
    """Evaluate the circuits of one bundle. Weights are read when a circuit is first used and kept.

    Every engine returns the same bytes for the same request; `evaluate` may be called from several threads.
    """

    name: str

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """Multiply `planes` by the weight of a circuit, exactly mod 2^(8·upload_limbs).

        uint8 [upload_limbs, T, in_features] → uint8 [reply_bytes, T, out_features].

        Raises WorkerError when the circuit is unknown or the planes do not fit it.
        """
        ...


def check_request(bundle: WorkerBundle, circuit: str, planes: np.ndarray) -> CircuitSpec:
    """Return the description of a circuit. Raises WorkerError where the planes do not fit it."""
    spec = bundle.circuits.get(circuit)
    if spec is None:
        raise WorkerError(f"the worker bundle has no circuit {circuit!r}; it holds {len(bundle.circuits)} others")
    if planes.dtype != np.uint8:
        raise WorkerError(f"circuit {circuit}: planes are {planes.dtype}; needs uint8")
    fits = planes.ndim == 3 and planes.shape[0] == spec.upload_limbs and planes.shape[2] == spec.in_features
    if not fits or planes.shape[1] == 0:
        raise WorkerError(
            f"circuit {circuit}: planes have shape {list(planes.shape)}; needs [{spec.upload_limbs}, T, "
            f"{spec.in_features}] with T at least 1"
        )
    return spec
