"""The client's side of a remote product: which rows travel, how they are encoded and encrypted, what it cost.

    real rows [T, in] → drop rows of zeros → encode per token → encrypt → worker → decrypt → decode → [T, out]

Rows that are all zero (masked gradients) are not sent and come back as exact zeros; padding never gets here.
"""

from __future__ import annotations

import abc
import logging
import time
import warnings
from dataclasses import dataclass, fields

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
from runtime.hintless import fetch_hint
from runtime.transports import Transport, open_connection

DEFAULT_CACHE_BYTES = 2 << 30
_LOG = logging.getLogger(__name__)


@dataclass
class Costs:
    """Cumulative costs of a session: seconds by who spent them, whole frames on the wire in bytes."""

    client_crypto_seconds: float = 0.0
    worker_seconds: float = 0.0
    wire_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def as_dict(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


class Products(abc.ABC):
    """Computes the products of a plan's circuits on real numbers. Not for several threads at once."""

    def __init__(self, circuits: dict[str, LinearParameters]) -> None:
        self.circuits = circuits
        self.costs = Costs()

    def product(self, circuit: str, x: Tensor) -> Tensor:
        """x f32 [T, in_features] → x·Wᵀ f32 [T, out_features], W the integer weight of `circuit`.

        Rows of zeros give exact zeros. Raises InputError for values that are not finite, WorkerError from the worker.
        """
        parameters = self.circuits[circuit]
        result = x.new_zeros(x.shape[0], parameters.out_features)
        live = x.ne(0).any(dim=1).nonzero().squeeze(1)  # [T'] of the rows that travel
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
        self._check_circuits(open_connection(transport, bundle.plan_id).circuits.keys())
        self._ring = bundle.ring
        rows = max(parameters.in_features for parameters in bundle.circuits.values())
        self._public = PublicMatrix(bundle.ring, bundle.public_seed, rows)
        self._hints = HintStore(bundle.hints, bundle.ring, cache_bytes)
        self._hintless = bundle.plan.hints == "none"

    def _check_circuits(self, offered: object) -> None:
        missing = sorted(name for name in self.circuits if name not in offered)  # type: ignore[operator]
        if missing:
            raise WorkerError(f"the worker lacks {len(missing)} circuits of this plan, first: {missing[0]}")

    def _product_of_live_rows(self, circuit: str, parameters: LinearParameters, x: Tensor) -> Tensor:
        transport, costs = self._transport, self.costs
        sent, received, computed = transport.bytes_sent, transport.bytes_received, transport.worker_seconds
        start = time.perf_counter()
        integers, scale = encode(x, parameters.input_bound, parameters.norm_bound)
        ciphertext, key = encrypt_tokens(self._public, integers, parameters)
        encrypted = time.perf_counter()
        reply = torch.from_numpy(transport.evaluate(circuit, ciphertext.planes.numpy()))
        fetched = fetch_hint(transport, self._ring, circuit, parameters) if self._hintless else None
        answered = time.perf_counter()
        hint = fetched or self._hints.hint(circuit)
        result = decode(decrypt(key, hint, reply, parameters), scale)
        done = time.perf_counter()
        worker_seconds = transport.worker_seconds - computed
        costs.client_crypto_seconds += (encrypted - start) + (done - answered)
        costs.worker_seconds += worker_seconds
        costs.wire_seconds += max(0.0, answered - encrypted - worker_seconds)
        costs.bytes_up += transport.bytes_sent - sent
        costs.bytes_down += transport.bytes_received - received
        return result

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
        if circuit not in self._weights:
            self._weights[circuit] = torch.from_numpy(self._worker_bundle.weight(circuit).copy()).double()
        integers, scale = encode(x, parameters.input_bound, parameters.norm_bound)
        # Exact: |W·x| < 2^31 by the choice of the input bound, far below 2^53.
        return decode((integers.double() @ self._weights[circuit]).to(torch.int64), scale)
