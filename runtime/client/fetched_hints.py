"""Fetch hints ahead of their use, for a client that stores none: check each, keep what a budget allows, forget the rest.

    expect(circuit)  → its hint and those that come after it are on their way, in the background
    wait(circuit)    → it is here, and its SHA-256 is that in the client's manifest
    hint(circuit)    → what decrypts
    release(circuit) → it has been used

Hints are public, and whoever made the client bundle has put the SHA-256 of each into its manifest. So a server of hints can
at most serve none. They are kept in memory and never on disk: what would lie there is what stored hints are.

Training visits every circuit in turn, over and over, and where not all fit, the one that was used last is needed last. So it
goes first, once every micro-batch in flight has used it, and what does not fit is fetched once per pass.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecompile.array_files import npy_in
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.client_files import FileRecord
from hecompile.errors import InputError, VerificationError
from hecompile.he.hints import Hint, Precision
from hecompile.inspection.linear import circuits_without_gradient
from hecompile.runtime.transports import Answer

DEFAULT_BYTES = 512 << 20

_AHEAD = 4
"""Hints that are fetched ahead of the one in use: the circuits of one decoder layer in one direction."""

_FETCHING = 2
"""Hints that are on their way at once: one would wait for the worker's answer with nothing on the wire."""

Content = NDArray[np.uint8]


@dataclass(frozen=True)
class Fetching:
    """Say where hints are fetched and how many are kept.

    Attributes:
        budget: bytes that are kept in memory, beside the hints in use.
        in_flight: how many micro-batches visit the circuits side by side.
        folder: asks for the file of a circuit, of that size, elsewhere than at the worker.
    """

    budget: int = DEFAULT_BYTES
    in_flight: int = 1
    folder: Callable[[str, int], Answer] | None = None


class HintSource:
    """Get the files of hints from wherever they are served, and take none that is not the one of the plan.

    Args:
        records: circuit → size and SHA-256 of its file.
        ask: requests the file of a circuit, of that size.
        count: receives every answer, for its bytes.
        distrust: leaves the worker of that name; returns whether another can be asked.
    """

    def __init__(
        self,
        records: Mapping[str, FileRecord],
        ask: Callable[[str, int], Answer],
        count: Callable[[Answer], None],
        distrust: Callable[[str], bool],
    ) -> None:
        self._records, self._ask, self._count, self._distrust = records, ask, count, distrust

    def fetch(self, circuit: str) -> Content:
        """Return the file of a circuit's hint, uint8 [bytes].

        Raises:
            VerificationError: it is not the one of the plan, and nobody else is left to ask.
            WorkerError: from the worker.
        """
        record = self._records[circuit]
        while True:
            answer = self._ask(circuit, record.bytes)
            self._count(answer)
            content: Content = answer.planes.reshape(-1)
            if hashlib.sha256(content.data).hexdigest() == record.sha256:
                return content
            if not self._distrust(answer.worker):
                raise VerificationError(
                    f"{circuit}: {answer.worker or 'the worker'}: the hint that it serves is not the one of this plan: its "
                    "SHA-256 is another. Nothing was decrypted with it and the step was not taken. Copy the worker bundle "
                    "of this plan there again, and go on from the last checkpoint"
                )


@dataclass
class _Entry:
    content: Future[Content]
    size: int
    uses: int = 0
    turn: int = 0  # of its last use


class FetchedHints:
    """Serve hints that are fetched, in place of `hecompile.he.hints.HintStore`. Safe to use from several threads.

    Args:
        bundle: the client bundle, with a record of every hint.
        source: where they come from.
        budget: bytes that are kept in memory, beside the hints in use.
        in_flight: how many micro-batches visit the circuits side by side.

    Raises:
        InputError: the budget is too small for the two largest hints, of which one is in use while the other comes.
    """

    def __init__(
        self, bundle: ClientBundle, source: HintSource, budget: int = DEFAULT_BYTES, in_flight: int = 1
    ) -> None:
        self._sizes = {circuit: record.bytes for circuit, record in bundle.fetched.items()}
        least = sum(sorted(self._sizes.values())[-2:])
        if budget < least:
            raise InputError(
                f"connection.hint_cache is {budget} bytes, and the two largest hints of this plan, one in use and one on "
                f"its way, take {least}; give at least so many"
            )
        self._params, self._source, self._budget, self._in_flight = bundle.ring, source, budget, in_flight
        self._next = _first_order(self._sizes, circuits_without_gradient(bundle.graph()))
        self._visit = threading.local()  # each thread goes through the circuits by itself
        self._entries: dict[str, _Entry] = {}
        self._turns = itertools.count(1)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_FETCHING, "hints")

    def expect(self, circuit: str) -> None:
        """Begin to fetch the hint of `circuit` if it is not here, and after it those that come next, as far as they fit."""
        with self._lock:
            last = getattr(self._visit, "last", None)
            if last is not None:
                self._next[last] = circuit
            self._visit.last = circuit
            self._begin(circuit)
            for _ in range(_AHEAD):
                following = self._next.get(circuit)
                if following is None or not self._fits(following):
                    return
                circuit = following
                self._begin(circuit)

    def wait(self, circuit: str) -> None:
        """Wait until the hint of `circuit` is here. Raises what `HintSource.fetch` does."""
        self._content(circuit)

    def hint(self, circuit: str, rows: int, precision: Precision = np.float64) -> Hint:
        """Return the hint of `circuit`, which has `rows` output features, for decryption in `precision`.

        Raises:
            InputError: the file is of another ring or circuit, which the bundle was made with.
            VerificationError, WorkerError: see `HintSource.fetch`.
        """
        try:
            hint = Hint(self._params, npy_in(self._content(circuit)), rows)
        except ValueError as error:
            raise InputError(f"the hint of {circuit} is no array ({error}); export again") from error
        hint.check_precision(precision)
        return hint

    def release(self, circuit: str) -> None:
        """Note that a hint has been used; it stays as long as nothing else needs its room."""
        with self._lock:
            if (entry := self._entries.get(circuit)) is not None:
                entry.uses += 1
                entry.turn = next(self._turns)

    def close(self) -> None:
        """Stop fetching."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _content(self, circuit: str) -> Content:
        with self._lock:
            entry = self._begin(circuit)
        try:
            return entry.content.result()
        except BaseException:
            with self._lock:  # the next request asks again
                if self._entries.get(circuit) is entry:
                    del self._entries[circuit]
            raise

    def _begin(self, circuit: str) -> _Entry:
        """Return the entry of a circuit, made now and with others let go of where it is not there."""
        entry = self._entries.get(circuit)
        if entry is None:
            size = self._sizes[circuit]
            for other in self._in_the_way(size):
                del self._entries[other]
            entry = self._entries[circuit] = _Entry(self._threads.submit(self._source.fetch, circuit), size)
        return entry

    def _fits(self, circuit: str) -> bool:
        """Tell whether a hint is here, or has room once those that were used have gone."""
        if circuit in self._entries:
            return True
        unused = sum(entry.size for entry in self._entries.values() if entry.uses == 0)
        return unused + self._sizes[circuit] <= self._budget

    def _in_the_way(self, size: int) -> list[str]:
        """Name the used hints that go to make room for `size` bytes.

        First go those that every micro-batch in flight has used, the last used first, then the others, the first used first.
        """
        used = [(name, entry) for name, entry in self._entries.items() if entry.uses and entry.content.done()]
        through = [item for item in used if item[1].uses % self._in_flight == 0]
        through.sort(key=lambda item: -item[1].turn)
        rest = sorted((item for item in used if item[1].uses % self._in_flight), key=lambda item: item[1].turn)
        over, names = sum(entry.size for entry in self._entries.values()) + size - self._budget, []
        for name, entry in through + rest:
            if over <= 0:
                break
            names.append(name)
            over -= entry.size
        return names


def _first_order(circuits: Iterable[str], unused: frozenset[str]) -> dict[str, str]:
    """Return which circuit follows which in training, as far as a plan tells: forward in its order, backward in reverse."""
    known = [name for name in circuits if name not in unused]
    forward = [name for name in known if name.endswith(".forward")]
    order = forward + [name for name in reversed(known) if not name.endswith(".forward")]
    return dict(itertools.pairwise([*order, *order[:1]]))
