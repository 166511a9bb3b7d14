"""After a lie was caught nothing is verified with what caught it: not by another worker's reply, run or session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hecompile.errors import InputError, VerificationError
from hecompile.he.check_store import SERIES
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import Answer, InProcessTransport, Replicas
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build
from tests.e2e.test_cheating import Cheat, one_bit

CIRCUIT = "model.layers.0.mlp.down_proj.forward"


def rows(build: Build, count: int = 20) -> torch.Tensor:
    return torch.randn(count, build.client.circuits[CIRCUIT].in_features)


def cheating(build: Build) -> EncryptedProducts:
    return EncryptedProducts(build.client, InProcessTransport(Worker(build.worker, Cheat(build, 0, one_bit)).exchange))


def marks(build: Build) -> list[str]:
    return sorted(path.name for path in build.client.checks.glob("spent.*"))


def test_every_session_has_new_vectors_until_none_are_left(own_build: Build) -> None:
    for caught in range(SERIES):
        products = cheating(own_build)
        left = "go on from the last checkpoint" if caught < SERIES - 1 else "spent, so export again"
        with pytest.raises(VerificationError, match=left):
            products.product(CIRCUIT, rows(own_build))
        assert marks(own_build) == [f"spent.{series}" for series in range(caught + 1)]
    with pytest.raises(InputError, match=rf"all {SERIES} set.* spent.*export again"):
        cheating(own_build)
    with pytest.raises(VerificationError, match="export again"):  # nor does a session that was open before
        products.product(CIRCUIT, rows(own_build))


def replicas(build: Build, names: list[str], **cheats: Cheat) -> EncryptedProducts:
    def worker(name: str) -> Callable[[], InProcessTransport]:
        engine = cheats.get(name, "onnxruntime")
        return lambda: InProcessTransport(Worker(build.worker, engine).exchange)

    return EncryptedProducts(build.client, Replicas({name: worker(name) for name in names}), retry_elsewhere=True)


def test_another_worker_is_verified_with_other_vectors(own_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ciphertext, another expectation; and it is on disk before the other worker is asked."""
    seen: list[list[str]] = []

    class Honest:
        name = "honest"

        def __init__(self) -> None:
            self._engine = Worker(own_build.worker).engine

        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            if circuit != "known_answer":
                seen.append(marks(own_build))
            return self._engine.evaluate(circuit, planes)

    cheat = Cheat(own_build, 0, one_bit)
    products = replicas(own_build, ["bad", "good"], bad=cheat, good=Honest())  # type: ignore[arg-type]
    x = rows(own_build)
    exact = x @ torch.from_numpy(own_build.worker.weight(CIRCUIT).copy()).float()
    for _ in range(4):
        result = products.product(CIRCUIT, x)
        assert float((result - exact).norm() / exact.norm()) < 0.01
    assert len(cheat.lied) == 1 and seen[-1] == ["spent.0"]
    assert products._checks.checks(CIRCUIT, own_build.client.circuits[CIRCUIT]).series == 1


def test_a_liar_is_cut_off_after_it_is_on_disk(own_build: Build) -> None:
    """A closed connection tells it that it was caught."""
    at_close: list[list[str]] = []

    class Watched(InProcessTransport):
        def close(self) -> None:
            at_close.append(marks(own_build))

    def worker(engine: Cheat | str) -> Callable[[], InProcessTransport]:
        return lambda: Watched(Worker(own_build.worker, engine).exchange)

    workers = {"bad": worker(Cheat(own_build, 0, one_bit)), "good": worker("onnxruntime")}
    products = EncryptedProducts(own_build.client, Replicas(workers), retry_elsewhere=True)
    products.product(CIRCUIT, rows(own_build))
    assert at_close == [["spent.0"]]


def test_as_many_workers_are_survived_as_there_are_sets(own_build: Build) -> None:
    bad = {f"bad{index}": Cheat(own_build, 0, one_bit) for index in range(SERIES)}
    products = replicas(own_build, [*bad, "good"], **bad)
    with pytest.raises(VerificationError, match="export again"):
        for _ in range(2 * SERIES + 2):
            products.product(CIRCUIT, rows(own_build))
    assert len(marks(own_build)) == SERIES
    assert [len(cheat.lied) for cheat in bad.values()] == [1] * SERIES


def test_replies_in_flight_are_verified_with_the_vectors_in_use_when_they_are_here(own_build: Build) -> None:
    """One thread's worker is caught while the other's answers: its expectation is made anew for the ciphertext it sent."""
    gate, asked = threading.Event(), threading.Event()

    class Slow:
        name = "slow"

        def __init__(self) -> None:
            self._engine = Worker(own_build.worker).engine

        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            reply = self._engine.evaluate(circuit, planes)
            if circuit != "known_answer":
                asked.set()
                assert gate.wait(60)
            return reply

    products = EncryptedProducts(own_build.client, InProcessTransport(Worker(own_build.worker, Slow()).exchange))
    x, results = rows(own_build), []
    thread = threading.Thread(target=lambda: results.append(products.product(CIRCUIT, x)))
    thread.start()
    assert asked.wait(60)
    with pytest.raises(VerificationError):
        cheating(own_build).product(CIRCUIT, rows(own_build))
    gate.set()
    thread.join()
    exact = x @ torch.from_numpy(own_build.worker.weight(CIRCUIT).copy()).float()
    assert float((results[0] - exact).norm() / exact.norm()) < 0.01


def test_marks_are_no_part_of_the_bundle(own_build: Build, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        cheating(own_build).product(CIRCUIT, rows(own_build))
    type(own_build.client).open(own_build.client.directory)


def test_a_liar_spends_one_set_however_many_of_its_replies_are_on_their_way(own_build: Build) -> None:
    """Where no other worker may be asked, the first of them ends the session: the others are not looked at."""
    together = threading.Barrier(SERIES)

    class Together(InProcessTransport):
        def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
            answer = super().evaluate(circuit, planes)
            if circuit == CIRCUIT:
                together.wait(60)
            return answer

    products = EncryptedProducts(
        own_build.client, Together(Worker(own_build.worker, Cheat(own_build, 0, one_bit)).exchange)
    )
    errors: list[VerificationError] = []

    def ask() -> None:
        try:
            products.product(CIRCUIT, rows(own_build))
        except VerificationError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(SERIES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == SERIES and marks(own_build) == ["spent.0"]
    with pytest.raises(VerificationError, match="go on from the last checkpoint"):  # nor is it asked again
        products.product(CIRCUIT, rows(own_build))
