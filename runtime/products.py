"""The client's side of a remote product: which rows travel, how they are encoded and encrypted, what it cost.

    real rows [T, in] → drop rows of zeros → encode per token → encrypt → worker → decrypt → decode → [T, out]

Rows that are all zero (masked gradients) are not sent and come back as exact zeros; padding never gets here.
"""

from __future__ import annotations

import abc
import logging
import threading
import time
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hecompile.client_bundle import ClientBundle
from hecompile.errors import InputError, WorkerError
from hecompile.he.encode import decode, encode
from hecompile.he.hints import HintStore
from hecompile.he.parameters import LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.scheme import decrypt, encrypt_tokens
from hecompile.worker_bundle import WorkerBundle
from runtime.transports import Answer, Transport, open_connection

DEFAULT_CACHE_BYTES = 2 << 30
_LOG = logging.getLogger(__name__)


@dataclass
class Costs:
    """Cumulative costs of a session: seconds by who spent them, whole frames on the wire in bytes.

    The seconds are added up over the threads that were at it: with several products in flight they exceed the time that
    passed.
    """

    client_crypto_seconds: float = 0.0
    worker_seconds: float = 0.0
    wire_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def as_dict(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


class Products(abc.ABC):
    """Computes the products of a plan's circuits on real numbers; `product` may be called in several threads at once."""

    def __init__(self, circuits: dict[str, LinearParameters]) -> None:
        self.circuits = circuits
        self.costs = Costs()
        self._lock = threading.Lock()

    def product(self, circuit: str, x: Tensor) -> Tensor:
        """x f32 [T, in_features] → x·Wᵀ f32 [T, out_features], W the integer weight of `circuit`.

        Rows of zeros give exact zeros. Raises InputError for values that are not finite, WorkerError from the worker.
        """
        parameters = self.circuits[circuit]
        live = x.ne(0).any(dim=1).nonzero().squeeze(1)  # [T'] of the rows that travel
        if len(live) == len(x) > 0:
            return self._product_of_live_rows(circuit, parameters, x)
        result = x.new_zeros(x.shape[0], parameters.out_features)
        if live.numel():
            result[live] = self._product_of_live_rows(circuit, parameters, x[live])
        return result

    @abc.abstractmethod
    def _product_of_live_rows(self, circuit: str, parameters: LinearParameters, x: Tensor) -> Tensor:
        """The product of rows none of which is zero."""

    def close(self) -> None:  # noqa: B027  most have nothing to let go of
        """Let go of the worker."""


class EncryptedProducts(Products):
    """Products by an untrusted worker on ciphertexts. Every call encrypts under fresh one-time secrets.

    Opening says hello and runs the known-answer test. `cache_bytes` bounds the memory for hints in the FFT domain.
    Raises WorkerError when the worker serves another plan or computes wrongly.
    """

    def __init__(self, bundle: ClientBundle, transport: Transport, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__(bundle.circuits)
        self._transport = transport
        self._turn = threading.Lock()  # for a transport that takes one request at a time
        self._check_circuits(open_connection(transport, bundle.plan_id).circuits.keys())
        rows = max(parameters.in_features for parameters in bundle.circuits.values())
        self._public = PublicMatrix(bundle.ring, bundle.public_seed, rows)
        self._hints = HintStore(bundle.hints, bundle.ring, cache_bytes)

    def _check_circuits(self, offered: object) -> None:
        missing = sorted(name for name in self.circuits if name not in offered)  # type: ignore[operator]
        if missing:
            raise WorkerError(f"the worker lacks {len(missing)} circuits of this plan, first: {missing[0]}")

    def _product_of_live_rows(self, circuit: str, parameters: LinearParameters, x: Tensor) -> Tensor:
        start = time.perf_counter()
        integers, scale = encode(x, parameters.input_bound, parameters.norm_bound)
        ciphertext, key = encrypt_tokens(self._public, integers, parameters)
        encrypted = time.perf_counter()
        answer = self._evaluate(circuit, ciphertext.planes.numpy())
        answered = time.perf_counter()
        result = decode(decrypt(key, self._hints.hint(circuit), torch.from_numpy(answer.planes), parameters), scale)
        done = time.perf_counter()
        with self._lock:
            self.costs.client_crypto_seconds += (encrypted - start) + (done - answered)
            self.costs.worker_seconds += answer.worker_seconds
            self.costs.wire_seconds += max(0.0, answered - encrypted - answer.worker_seconds)
            self.costs.bytes_up += answer.bytes_sent
            self.costs.bytes_down += answer.bytes_received
        return result

    def _evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        if self._transport.concurrent:
            return self._transport.evaluate(circuit, planes)
        with self._turn:
            return self._transport.evaluate(circuit, planes)

    def close(self) -> None:
        self._transport.close()


class CleartextProducts(Products):
    """Products of UNENCRYPTED integers, in this process, for debugging and exact comparison. Hides nothing.

    The encoding is that of the encrypted path, so that the difference to it is the encryption noise alone.
    """

    def __init__(self, bundle: ClientBundle, worker_bundle: WorkerBundle) -> None:
        super().__init__(bundle.circuits)
        if worker_bundle.plan_id != bundle.plan_id:
            raise InputError(
                f"worker bundle {worker_bundle.directory} is of plan {worker_bundle.plan_id}, "
                f"the client bundle of {bundle.plan_id}; export them together"
            )
        message = (
            "engine 'cleartext': NOTHING IS ENCRYPTED. Use it for debugging only, never with private data elsewhere."
        )
        warnings.warn(message, stacklevel=2)
        _LOG.warning(message)
        self._worker_bundle = worker_bundle
        self._weights: dict[str, Tensor] = {}

    def _product_of_live_rows(self, circuit: str, parameters: LinearParameters, x: Tensor) -> Tensor:
        with self._lock:
            if circuit not in self._weights:
                self._weights[circuit] = torch.from_numpy(self._worker_bundle.weight(circuit).copy()).double()
        integers, scale = encode(x, parameters.input_bound, parameters.norm_bound)
        # Exact: |W·x| < 2^31 by the choice of the input bound, far below 2^53.
        return decode((integers.double() @ self._weights[circuit]).to(torch.int64), scale)
