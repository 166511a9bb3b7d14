"""Evaluate circuits under TFHE (concrete-python): a second, independent cryptographic backend, for small linears only.

Each byte plane of each token is one encrypted vector; the integer linear `x @ W` runs under TFHE and the limbs are
recombined after decryption. There is no table look-up, so no bootstrapping, and results of 32 bits fit. keygen,
encrypt, evaluate and decrypt all happen in this process: the engine shows that the circuits mean the same under another
scheme, and is not for serving. One encrypted value takes about 15 kB, hence the size limit.
"""

from __future__ import annotations

import threading

import numpy as np
from concrete import fhe

from hecompile.bundles.worker import CircuitSpec, WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.worker.engines.base import check_request

MAX_WEIGHTS = 1 << 16
"""Limit on in_features · out_features: at that size one plane of one token takes about half a second."""

P_ERROR = 2.0**-40
"""Probability per output that TFHE decrypts wrongly; concrete's default of about 1e-5 would show."""


class ConcreteEngine:
    """Keep a compiled and keyed TFHE circuit for each circuit of a bundle, made when it is first used."""

    name = "concrete"

    def __init__(self, bundle: WorkerBundle) -> None:
        self._bundle = bundle
        self._circuits: dict[str, fhe.Circuit] = {}
        self._lock = threading.Lock()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`. Raises WorkerError also for a circuit of more than 65536 weights."""
        spec = check_request(self._bundle, circuit, planes)
        with self._lock:  # concrete does not document its circuits as thread-safe
            compiled = self._compiled(spec)
            products = np.stack([[_run(compiled, token) for token in plane] for plane in planes])  # int64 [L, T, out]
        scales = np.int64(256) ** np.arange(spec.upload_limbs)
        word = np.tensordot(scales, products, axes=1)  # [T, out]; |word| < 2^32 · 2^31, int64 holds it
        dropped_bits = 8 * spec.upload_limbs - spec.reply_bits
        if dropped_bits:
            word = (word + (1 << (dropped_bits - 1))) & -(1 << dropped_bits)
        kept = [(word >> (8 * place)) & 255 for place in range(spec.upload_limbs - spec.reply_bytes, spec.upload_limbs)]
        return np.stack(kept).astype(np.uint8)  # [reply_bytes, T, out]

    def _compiled(self, spec: CircuitSpec) -> fhe.Circuit:
        if spec.name not in self._circuits:
            size = spec.in_features * spec.out_features
            if size > MAX_WEIGHTS:
                raise WorkerError(
                    f"circuit {spec.name}: {spec.in_features} × {spec.out_features} = {size} weights; the engine "
                    f"concrete takes at most {MAX_WEIGHTS}; use the engine onnxruntime or torch"
                )
            self._circuits[spec.name] = _compile(spec, self._bundle.weight(spec.name).astype(np.int64))
        return self._circuits[spec.name]


def _compile(spec: CircuitSpec, weight: np.ndarray) -> fhe.Circuit:
    """Compile `x [in] → x @ weight [out]` to a TFHE circuit, as wide as the inputs that reach the extremes need."""

    def linear(x: np.ndarray) -> np.ndarray:
        return x @ weight

    highest = weight[:, np.argmax(np.maximum(weight, 0).sum(axis=0))]
    lowest = weight[:, np.argmin(np.minimum(weight, 0).sum(axis=0))]
    extremes = [np.where(highest > 0, 255, 0), np.where(lowest < 0, 255, 0)]
    inputs = [*extremes, np.zeros_like(highest), np.full_like(highest, 255)]
    try:
        compiled = fhe.Compiler(linear, {"x": "encrypted"}).compile(inputs, fhe.Configuration(p_error=P_ERROR))
    except RuntimeError as error:
        raise WorkerError(f"circuit {spec.name}: concrete finds no TFHE parameters for it ({error})") from error
    compiled.keygen()
    return compiled


def _run(compiled: fhe.Circuit, token: np.ndarray) -> np.ndarray:
    return np.asarray(compiled.decrypt(compiled.run(compiled.encrypt(token.astype(np.int64)))), dtype=np.int64)
