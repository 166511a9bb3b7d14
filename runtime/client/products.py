"""Compute remote products on the client's side: how rows are encoded and encrypted, what is done with replies, what it cost.

    real rows [T, in] → encode per token, encrypt → worker → verify, decrypt, decode → wrapped rows once more → [T, out]

Every row travels, whatever its values: the number of rows follows from attention masks and labels alone, which
`EncryptedCausalLM` packs by, and for routed experts from what the router chose (`passes/offload/route_experts.py`). A row
that is zero by value is sent as an encryption of zeros, and comes back as exact zeros.
"""

from __future__ import annotations

import abc
import logging
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError, VerificationError, WorkerError
from hecompile.he.check_store import CheckStore
from hecompile.he.check_vectors import Checks
from hecompile.he.encode import decode, encode
from hecompile.he.fused import RealKey, decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint, HintStore
from hecompile.he.parameters import LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import Ciphertext
from hecompile.he.verification import Expectation, hint_is_right
from hecompile.runtime.client.bounds import Bounds
from hecompile.runtime.client.fetched_hints import FetchedHints, Fetching, HintSource
from hecompile.runtime.client.hintless import hint_of
from hecompile.runtime.transports import Answer, Replicas, Transport, open_connection

DEFAULT_CACHE_BYTES = 512 << 20
_LOG = logging.getLogger(__name__)
_ADVICE = (
    "The step was not taken and nothing was changed. That worker (or its memory, or the link) is not to be trusted: {}go on "
    "from the last checkpoint with another"
)


@dataclass
class Costs:
    """Add up the costs of a session: seconds by who spent them, whole frames on the wire in bytes.

    The seconds are added up over the threads that were at it: with several products in flight they exceed the time that
    passed.
    """

    client_crypto_seconds: float = 0.0
    worker_seconds: float = 0.0
    wire_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    repeated_rows: int = 0
    """Rows that were sent again under the proven bound, as a product of theirs had wrapped (`hecompile.he.wraps`)."""

    def as_dict(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}


class Products(abc.ABC):
    """Compute the products of a plan's circuits on real numbers; `product` may be called in several threads at once."""

    bounds: Bounds | None = None

    def __init__(self, circuits: dict[str, LinearParameters]) -> None:
        self.circuits = circuits
        self.costs = Costs()
        self._lock = threading.Lock()

    @abc.abstractmethod
    def product(
        self, circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """Compute (x ⊙ column_scale)·Wᵀ ⊙ row_scale, W the integer weight of `circuit`.

        Args:
            circuit: its name.
            x: float32 `[T, in_features]`. Rows of zeros are sent like any others and give exact zeros.
            column_scale: float32 `[in_features]`, or None for ones.
            row_scale: float32 `[out_features]`, or None for ones.

        Returns:
            float32 `[T, out_features]`.

        Raises:
            InputError: a value that is not finite.
            VerificationError: the worker returned something else than the product.
            WorkerError: from the worker.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Close the connection to the worker."""


class EncryptedProducts(Products):
    """Get products from an untrusted worker on ciphertexts. Every call encrypts under fresh one-time secrets.

    Every reply is verified (`hecompile.he.verification`). Opening says hello and runs the known-answer test.

    Args:
        bundle: the client bundle.
        transport: to the worker, not opened yet.
        cache_bytes: bounds the memory for transformed hints.
        retry_elsewhere: over `Replicas`, a worker whose reply is wrong gets no more requests and another one is tried; else
            the product raises VerificationError.
        fetching: of hints that are not in the bundle but fetched.

    Raises:
        WorkerError: the worker serves another plan or computes wrongly.
        InputError: the bundle's check vectors are spent on workers that were caught; `fetching` has too small a budget.
    """

    def __init__(
        self,
        bundle: ClientBundle,
        transport: Transport,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        retry_elsewhere: bool = False,
        fetching: Fetching | None = None,
    ) -> None:
        super().__init__(bundle.circuits)
        self._transport = transport
        self._retry_elsewhere = retry_elsewhere
        self._turn = threading.Lock()  # for a transport that takes one request at a time
        self._checks = CheckStore(bundle.checks, bundle.circuits)
        self._verdict = threading.Lock()  # check vectors are spent and their liar is distrusted at one time
        self._ended: str | None = None  # by which error, where a worker was caught and no other may be asked
        self._hints: HintStore | FetchedHints = HintStore(bundle.hints, bundle.ring, cache_bytes)
        if bundle.plan.hints == "fetched":
            self._hints = self._fetched_hints(bundle, fetching or Fetching())
        self._check_circuits(open_connection(transport, bundle.plan_id).circuits.keys())
        self._ring = bundle.ring
        rows = max(parameters.in_features for parameters in bundle.circuits.values())
        self._public = PublicMatrix(bundle.ring, bundle.public_seed, rows)
        self._hintless = bundle.plan.hints == "none"
        self.bounds: Bounds = Bounds(bundle)

    def _check_circuits(self, offered: object) -> None:
        missing = sorted(name for name in self.circuits if name not in offered)  # type: ignore[operator]
        if missing:
            raise WorkerError(f"the worker lacks {len(missing)} circuits of this plan, first: {missing[0]}")

    def product(
        self, circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """See `Products.product`."""
        parameters = self.bounds.parameters(circuit)
        result, scale = self._verified(circuit, parameters, x, column_scale, row_scale)
        if parameters.gain == 1 or len(x) == 0:
            return result
        start = time.perf_counter()
        wrapped = self.bounds.wrapped(circuit, x, result, scale, column_scale, row_scale)
        seconds = time.perf_counter() - start
        gain = np.full(len(x), parameters.gain)
        if len(wrapped):
            # Nothing of a row that wrapped is kept: its values are encrypted anew, scaled so that nothing can wrap.
            again = self._verified(circuit, parameters.proven, x[wrapped], column_scale, row_scale)
            result[wrapped], scale[wrapped], gain[wrapped] = again[0], again[1], 1.0
        start = time.perf_counter()
        self.bounds.follow(circuit, gain, result, scale, row_scale)
        with self._lock:
            self.costs.repeated_rows += len(wrapped)
            self.costs.client_crypto_seconds += seconds + time.perf_counter() - start
        return result

    def _verified(
        self, circuit: str, parameters: LinearParameters, x: Tensor, column_scale: Tensor | None, row_scale: Tensor | None
    ) -> tuple[Tensor, np.ndarray]:  # fmt: skip
        """Return a product that a worker has computed and verification has passed, and the scale of its tokens."""
        start = time.perf_counter()
        self._require_trust()
        checks = self._checks.checks(circuit, parameters)
        ciphertext, key = encrypt_reals(self._public, x, parameters, column_scale, checks)
        if key.tokens == 0:
            return x.new_zeros(len(x), parameters.out_features), key.scale
        encrypted = time.perf_counter()
        result = None
        while result is None:
            answers = self._request(circuit, ciphertext.planes)
            answered = time.perf_counter()
            result = self._decrypt(circuit, key, ciphertext, answers, row_scale)
        done = time.perf_counter()
        worker_seconds = sum(answer.worker_seconds for answer in answers)
        with self._lock:
            self.costs.client_crypto_seconds += (encrypted - start) + (done - answered)
            self.costs.worker_seconds += worker_seconds
            self.costs.wire_seconds += max(0.0, answered - encrypted - worker_seconds)
            self.costs.bytes_up += sum(answer.bytes_sent for answer in answers)
            self.costs.bytes_down += sum(answer.bytes_received for answer in answers)
        return result, key.scale

    def _request(self, circuit: str, planes: Tensor) -> list[Answer]:
        """Get the worker's product of a ciphertext, and the circuit's hint where none is stored."""
        hints = self._hints
        if isinstance(hints, FetchedHints):
            hints.expect(circuit)
        answers = [self._ask(lambda: self._transport.evaluate(circuit, planes.numpy()))]
        if self._hintless:
            answers.append(self._ask(lambda: self._transport.setup(circuit, self._ring.lattice_dim)))
        if isinstance(hints, FetchedHints):
            hints.wait(circuit)  # here, where waiting counts as the wire's time
        return answers

    def _fetched_hints(self, bundle: ClientBundle, fetching: Fetching) -> FetchedHints:
        def ask(circuit: str, size: int) -> Answer:
            return self._ask(lambda: self._transport.hint(circuit, size))

        def distrust(worker: str) -> bool:
            return fetching.folder is None and self._replicas is not None and self._replicas.distrust(worker)

        source = HintSource(bundle.fetched, fetching.folder or ask, self._count_bytes, distrust)
        return FetchedHints(bundle, source, fetching.budget, fetching.in_flight)

    def _count_bytes(self, answer: Answer) -> None:
        with self._lock:
            self.costs.bytes_up += answer.bytes_sent
            self.costs.bytes_down += answer.bytes_received

    def _decrypt(
        self, circuit: str, key: RealKey, ciphertext: Ciphertext, answers: list[Answer], row_scale: Tensor | None
    ) -> Tensor | None:
        """Verify and decrypt a product; None where an answer was wrong and another worker can take the request.

        Check vectors that caught a lie by now, in whichever thread or process, do not count: what was encrypted before is
        checked with those that are in use when the reply is here, and still in use when it has passed.
        """
        parameters, replicas = self.circuits[circuit], self._replicas
        while True:
            with self._verdict:
                # Who was caught spends no other vectors by replies that were on their way.
                self._require_trust()
                checks = self._checks.checks(circuit, parameters)
                if replicas is not None and not all(replicas.trusts(answer.worker) for answer in answers):
                    return None
            if key.expectation is None or key.expectation.checks.series != checks.series:
                key.expectation = Expectation.of_ciphertext(checks, parameters, ciphertext.planes, SecretRandom())
            hint = self._hint(circuit, answers, checks)
            if hint is None:
                return None
            try:
                result = decrypt_reals(key, hint, torch.from_numpy(answers[0].planes), parameters, row_scale)
            except VerificationError as error:
                self._distrust(circuit, checks.series, str(error), answers[0].worker)
                return None
            self._hints.release(circuit)
            if self._checks.checks(circuit, parameters).series == checks.series:
                return result

    def _hint(self, circuit: str, answers: list[Answer], checks: Checks) -> Hint | None:
        """Return the stored hint, or the worker's, verified; None where that was wrong and another worker can make one."""
        parameters = self.circuits[circuit]
        if not self._hintless:
            return self._hints.hint(circuit, parameters.out_features, parameters.decryption_precision)
        hint = hint_of(answers[1], self._ring, parameters)
        everything = slice(0, parameters.in_features)
        matrix = self._public.coefficients(everything).flatten(1)  # int32 [in, rank · ring_dim]
        if hint_is_right(checks, hint.coefficients(slice(0, hint.rows)), matrix):
            return hint
        error = "the worker's hint is not its weight times the public matrix"
        self._distrust(circuit, checks.series, error, answers[1].worker)
        return None

    @property
    def _replicas(self) -> Replicas | None:
        """Return the workers among which another can be asked after a wrong reply."""
        return self._transport if self._retry_elsewhere and isinstance(self._transport, Replicas) else None

    def _distrust(self, circuit: str, series: int, error: str, worker: str) -> None:
        """Drop the worker that answered wrongly; raise VerificationError where no other can take the request.

        The check vectors that caught it are spent, on disk, before anybody can learn of it, by a closed connection or by
        what comes next. The request goes to another worker unchanged. The decision depends on the reply's check sums alone,
        which hold nothing that was decrypted.
        """
        replicas, message = self._replicas, f"{circuit}: {worker or 'the worker'}: {error}"
        with self._verdict:
            self._checks.spend(series)
            others = replicas is not None and replicas.distrust(worker)
            left = self._checks.left
            if not others or left == 0:
                advice = _ADVICE.format(
                    "" if left else "its check vectors are spent, so export again, which draws new ones, and "
                )
                nobody = "No other worker is left to trust. " if replicas is not None and left else ""
                self._ended = self._ended or f"{message}. {nobody}{advice}"
        self._require_trust()
        _LOG.warning("%s. That worker is not asked again", message)

    def _require_trust(self) -> None:
        """Raise VerificationError where a worker was caught in this session and no other may be asked."""
        if self._ended is not None:
            raise VerificationError(self._ended) from None

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        if self._transport.concurrent:
            return request()
        with self._turn:
            return request()

    def close(self) -> None:
        if isinstance(self._hints, FetchedHints):
            self._hints.close()
        self._transport.close()


class CleartextProducts(Products):
    """Compute products of UNENCRYPTED integers in this process, for debugging and exact comparison. Hide nothing.

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

    def product(
        self, circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """See `Products.product`."""
        parameters = self.circuits[circuit]
        with self._lock:
            if circuit not in self._weights:
                self._weights[circuit] = torch.from_numpy(self._worker_bundle.weight(circuit).copy()).double()
        scaled = x.double() if column_scale is None else x.double() * column_scale.double()
        integers, scale = encode(scaled, parameters.input_bound, parameters.norm_bound)
        # Exact: |W·x| is at most 2^31 times a gain, far below 2^53. Nothing wraps here, whatever the gain.
        result = decode((integers.double() @ self._weights[circuit]).to(torch.int64), scale, torch.float64)
        return (result if row_scale is None else result * row_scale.double()).to(torch.float32)
