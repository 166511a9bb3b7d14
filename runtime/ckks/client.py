"""Run the data owner's side of a polynomial plan: encrypt embeddings, refresh where the plan says, decrypt logits.

The worker sees ciphertexts and public keys. A refresh answers any ciphertext with a fresh encryption of its values, which
under IND-CPA tells nothing. The client's behaviour must not depend on the values either, or a worker that sends ciphertexts
of its own making could read it (a reaction attack). So values over the scheme's bound are cut to it in silence, the protocol
runs to its end whatever was decrypted, and only then, here, is the error raised. No decrypted number is ever sent back: CKKS
decryptions carry their error, which would give the key away (Li, Micciancio, EUROCRYPT 2021).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.bundles.ckks import CkksPlan, read_table
from hecompile.checkpoint.tokenizer import load_tokenizer, read_answer_ends
from hecompile.ckks.keys import SecretKey, Words
from hecompile.ckks.parameters import CkksParameters
from hecompile.errors import HecompileError, InputError, WorkerError, WorkerUnavailableError
from hecompile.files import reason_of
from hecompile.foreign import finite, printable
from hecompile.runtime.ckks.messages import PROTOCOL, expect, receive, send
from hecompile.runtime.model.backend import ForwardPass
from hecompile.runtime.wire.address import TcpAddress, parse_address

Progress = Callable[[str, int], None]
"""Take the name of a refreshed value, and how many ciphertexts it has."""


@dataclass
class CkksStats:
    """Measure one evaluation.

    Attributes:
        bytes_up, bytes_down: on the wire.
        encrypt_seconds, decrypt_seconds: of the client.
        refreshes, refreshed: values of the plan, and ciphertexts in all of them.
        worker_seconds: by operation, as the worker reports them.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    encrypt_seconds: float = 0.0
    decrypt_seconds: float = 0.0
    refreshes: int = 0
    refreshed: int = 0
    total_seconds: float = 0.0
    worker_seconds: dict[str, float] = field(default_factory=dict)


class CkksSession:
    """Hold a connection to a worker and the keys of this session. Use as a context manager.

    Args:
        directory: the client bundle.
        address: of the worker.
        timeout: seconds in which the worker must begin each message: what it computes in between, and for others before,
            takes minutes. A message that has begun must come in a minute, or at the slowest rate of `framing`. As the plan
            bounds the messages, this bounds an evaluation.

    Raises:
        InputError: the bundle cannot be read.
        WorkerUnavailableError: nothing answers, or too slowly.
        WorkerError: the worker is of another plan.
    """

    def __init__(self, directory: str | Path, address: str, timeout: float = 3600.0) -> None:
        self.plan = CkksPlan.read(directory)
        self._table = read_table(directory, self.plan)
        self.tokenizer = load_tokenizer(Path(directory))
        self.answer_ends = read_answer_ends(Path(directory))
        self.parameters = CkksParameters.from_fields(self.plan.parameters)
        self.stats = CkksStats()
        self._refreshable = {name: int(np.prod(shape)) for name, shape in self.plan.refreshes.items()}
        self._key = SecretKey(self.parameters)
        self.key_bytes = 0
        self._address, self._timeout = address, timeout
        try:
            self._connection = _connect(address)
        except BaseException:
            self._key.close()
            raise
        try:
            keys = self._key.evaluation_keys()
            self.key_bytes = self._send("open", keys.words, protocol=PROTOCOL, plan_id=self.plan.plan_id)
            fields, _, _ = self._receive(0)
            expect(fields, "ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CkksSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session; its keys are gone with it."""
        self._connection.close()
        self._key.close()

    def logits(self, tokens: NDArray[np.int64], progress: Progress = lambda *_: None) -> NDArray[np.float32]:
        """Evaluate tokens int64 [B, S], S the plan's length, on the worker.

        Returns logits float32 [B, S, V], or [B, 1, V] where the plan has the last position alone.

        Raises:
            InputError: another shape, unknown tokens, or more sequences than slots.
            WorkerError: the worker breaks the protocol.
            HecompileError: at the end, where a value left the range that a ciphertext can hold.
        """
        plan, parameters = self.plan, self.parameters
        batch = self._check(tokens)
        start, self.stats = time.perf_counter(), CkksStats()
        columns = self._table[tokens].reshape(batch, -1).T.astype(np.float64)  # [S·H, B]
        self.stats.bytes_up += self._send("run", self._encrypt(np.ascontiguousarray(columns)))
        overflowed = False
        waiting = dict(self._refreshable)
        most = max([plan.sequence_length * plan.vocabulary, *waiting.values()]) * parameters.ciphertext_bytes(0)
        while True:
            fields, words, size = self._receive(most)
            self.stats.bytes_down += size
            if expect(fields, "refresh", "result") == "result":
                break
            value, level = fields.get("value"), self._level(fields)
            limit = waiting.pop(value, None) if isinstance(value, str) else None
            if not isinstance(value, str) or limit is None or words.ndim != 4 or not 0 < len(words) <= limit:
                raise WorkerError("the worker asks for a refresh that the plan does not have at this point")
            numbers, cut = self._bounded(self._decrypt(words, level)[:, :batch])
            overflowed |= cut
            self.stats.bytes_up += self._send("fresh", self._encrypt(numbers))
            self.stats.refreshes += 1
            self.stats.refreshed += len(words)
            progress(value, len(words))
        if waiting:
            raise WorkerError("the worker left out a refresh of the plan")
        rows = 1 if plan.last_only else plan.sequence_length
        index = _index(fields.get("index"), rows * plan.vocabulary, len(words))
        values, cut = self._bounded(self._decrypt(words, self._level(fields))[:, :batch])
        self.stats.total_seconds = time.perf_counter() - start
        self.stats.worker_seconds = _seconds(fields.get("seconds"))
        if overflowed or cut:
            raise HecompileError(
                f"a value left ±{parameters.value_bound:.3g}, the range of a ciphertext: the text is of another kind than "
                "the polynomials were made for (much shorter, or in other words), or the worker did not compute what it was "
                "asked to"
            )
        # -1: known to be zero, as the logit of a token without an embedding is.
        numbers = np.where((index >= 0)[:, None], values[index], 0.0)  # [rows · V, B]
        return numbers.T.reshape(batch, rows, plan.vocabulary).astype(np.float32)

    def forward(self, tokens: NDArray[np.int64]) -> ForwardPass:
        """See `hecompile.runtime.model.backend.RemoteModel`; rows, errors and logits are those of `logits`."""
        logits, stats = self.logits(tokens), self.stats
        client = stats.encrypt_seconds + stats.decrypt_seconds
        return ForwardPass(logits, stats.total_seconds, client, stats.bytes_up, stats.bytes_down)

    def _check(self, tokens: NDArray[np.int64]) -> int:
        plan = self.plan
        if tokens.ndim != 2 or tokens.shape[1] != plan.sequence_length or not len(tokens):
            raise InputError(f"the plan takes tokens [B, {plan.sequence_length}], got {list(tokens.shape)}")
        if len(tokens) > self.parameters.slots:
            raise InputError(
                f"{len(tokens)} sequences are more than the {self.parameters.slots} slots of a ciphertext; send them in "
                "parts"
            )
        if tokens.min() < 0 or tokens.max() >= plan.vocabulary:
            raise InputError(f"a token is outside the vocabulary of {plan.vocabulary}")
        return len(tokens)

    def _bounded(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        bound = self.parameters.value_bound
        kept = np.nan_to_num(values, nan=0.0, posinf=bound, neginf=-bound).clip(-bound, bound)
        return np.ascontiguousarray(kept), not np.array_equal(kept, values)

    def _encrypt(self, values: NDArray[np.float64]) -> Words:
        start = time.perf_counter()
        words = self._key.encrypt(values)
        self.stats.encrypt_seconds += time.perf_counter() - start
        return words

    def _decrypt(self, words: Words, level: int) -> NDArray[np.float64]:
        start = time.perf_counter()
        values = self._key.decrypt(words, level)
        self.stats.decrypt_seconds += time.perf_counter() - start
        return values

    def _level(self, fields: dict[str, Any]) -> int:
        level = fields.get("level")
        if type(level) is not int or not 0 <= level <= self.parameters.levels:
            raise WorkerError("the worker names a level that the parameters do not have")
        return level

    def _send(self, kind: str, words: Words, **fields: Any) -> int:
        """Send a message and return its bytes. Raises WorkerUnavailableError where the worker does not take it."""
        try:
            return send(self._connection, kind, words, **fields)
        except TimeoutError:
            raise WorkerUnavailableError(f"the worker at {self._address} takes nothing of a message; see its log") from None
        except OSError as error:
            raise WorkerUnavailableError(f"the connection to the worker broke: {reason_of(error)}") from error

    def _receive(self, most: int) -> tuple[dict[str, Any], Words, int]:
        try:
            return receive(self._connection, most, self._timeout)
        except TimeoutError:
            raise WorkerUnavailableError(
                f"the worker at {self._address} was silent for {self._timeout:g} s; see its log"
            ) from None
        except OSError as error:
            raise WorkerUnavailableError(f"the connection to the worker broke: {reason_of(error)}") from error


def _index(places: Any, count: int, ciphertexts: int) -> NDArray[np.int64]:
    if not isinstance(places, list) or len(places) != count:
        raise WorkerError(f"the worker did not say where the {count} logits are")
    if not all(type(place) is int and -1 <= place < ciphertexts for place in places):
        raise WorkerError("the worker names ciphertexts that it did not send")
    return np.array(places)


def _seconds(reported: Any) -> dict[str, float]:
    if not isinstance(reported, dict):
        return {}
    numbers = {printable(name, 60): finite(value) for name, value in reported.items()}
    return {name: number for name, number in numbers.items() if number is not None}


_CONNECT_SECONDS = 10.0


def _connect(address: str) -> socket.socket:
    parsed = parse_address(address)
    if isinstance(parsed, TcpAddress) and parsed.scheme != "tcp":
        raise InputError(f"{address}: a polynomial worker is reached at tcp:// or unix://")
    family = socket.AF_INET if isinstance(parsed, TcpAddress) else socket.AF_UNIX
    try:
        if isinstance(parsed, TcpAddress):
            return socket.create_connection(parsed.socket_address, _CONNECT_SECONDS)
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(parsed.socket_address)
        return connection
    except OSError as error:
        raise WorkerUnavailableError(
            f"no worker answers at {address}: {reason_of(error)}; start one with `hecompile ckks serve`"
        ) from error
