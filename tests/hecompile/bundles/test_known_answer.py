"""Workers whose arithmetic is not exact, or who answer something else, do not get past the opening of a connection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hecompile.bundles.worker import WorkerBundle, known_answer_vector
from hecompile.errors import WorkerError
from hecompile.runtime.transports import InProcessTransport, open_connection
from hecompile.runtime.worker.engines.base import check_request
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, write_bundle

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


class InexactEngine:
    """The right circuit around a product `uint8 [T, in] × int8 [in, out] → int64 [T, out]` that is given."""

    name = "inexact"

    def __init__(self, bundle: WorkerBundle, product: Product) -> None:
        self._bundle = bundle
        self._product = product

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        spec = check_request(self._bundle, circuit, planes)
        weight = self._bundle.weight(circuit)
        word = sum(self._product(plane, weight) << (8 * k) for k, plane in enumerate(planes))
        dropped = 8 * (spec.upload_limbs - spec.reply_bytes)
        word = word + (2**dropped // 2)
        return np.stack([(word >> (dropped + 8 * r)) & 255 for r in range(spec.reply_bytes)]).astype(np.uint8)


def exact(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return plane.astype(np.int64) @ weight.astype(np.int64)


def saturating_pairs(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x86 `vpmaddubsw`: neighbouring products are added in int16 with saturation."""
    if plane.shape[1] % 2:
        plane, weight = np.pad(plane, ((0, 0), (0, 1))), np.pad(weight, ((0, 1), (0, 0)))
    products = plane.astype(np.int64)[:, :, None] * weight.astype(np.int64)[None]  # [T, in, out]
    pairs = products.reshape(plane.shape[0], -1, 2, weight.shape[1]).sum(axis=2)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


def float32_accumulation(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (plane.astype(np.float32) @ weight.astype(np.float32)).astype(np.int64)


def float16_results(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return exact(plane, weight).clip(-65504, 65504).astype(np.float16).astype(np.int64)


def signed_activations(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return exact(plane.view(np.int8), weight)


def one_wrong_result(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    products = exact(plane, weight)
    products[-1, -1] += 1 << 8
    return products


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("known_answer") / "worker", {})


def test_exact_worker_is_accepted(bundle: WorkerBundle) -> None:
    info = open_connection(InProcessTransport(Worker(bundle, InexactEngine(bundle, exact)).exchange), PLAN_ID)
    assert info.engine == "inexact"


@pytest.mark.parametrize(
    "product", [saturating_pairs, float32_accumulation, float16_results, signed_activations, one_wrong_result]
)
def test_inexact_worker_is_refused_and_the_connection_closed(bundle: WorkerBundle, product: Product) -> None:
    transport = InProcessTransport(Worker(bundle, InexactEngine(bundle, product)).exchange)
    with pytest.raises(WorkerError, match=r"\(engine inexact\) computes wrongly: \d+ of 185 .* another machine"):
        open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerError, match="is closed"):
        transport.hello(PLAN_ID)


def test_worker_that_is_wrong_for_single_tokens_only_is_refused(bundle: WorkerBundle) -> None:
    def product(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return float32_accumulation(plane, weight) if plane.shape[0] == 1 else exact(plane, weight)

    with pytest.raises(WorkerError, match=r"computes wrongly: \d+ of 37 results"):
        open_connection(InProcessTransport(Worker(bundle, InexactEngine(bundle, product)).exchange), PLAN_ID)


def test_reply_of_another_shape_is_refused(bundle: WorkerBundle) -> None:
    class Truncating(InexactEngine):
        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            return super().evaluate(circuit, planes)[:, :, 1:]

    with pytest.raises(WorkerError, match=r"the reply has shape \(3, 5, 36\) with 24 bits a word; needs \(3, 5, 37\)"):
        open_connection(InProcessTransport(Worker(bundle, Truncating(bundle, exact)).exchange), PLAN_ID)


def test_sums_of_the_known_answer_pass_what_float32_holds() -> None:
    planes, _ = known_answer_vector(PLAN_ID)
    assert planes[0, 0].astype(np.int64).sum() * 127 > 2**24
