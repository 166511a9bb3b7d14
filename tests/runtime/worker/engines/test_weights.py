"""One copy of each weight, mapped from its file, for both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.worker.engines.weights import Weights
from tests.support.bundles import PLAN_ID, extreme_weight, write_bundle

LARGE = extreme_weight(300, 260)  # above the 64 KiB from which a weight has a file of its own


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    wide = np.random.default_rng(0).integers(-32768, 32640, (300, 260), dtype=np.int16)
    linears = {"large": (LARGE, 24, 16), "small": (LARGE[:8, :4].copy(), 24, 16), "wide": (wide, 24, 16)}
    return write_bundle(tmp_path_factory.mktemp("weights") / "worker", linears)


@pytest.mark.parametrize("first", ["forward", "backward"])
@pytest.mark.parametrize("linear", ["large", "small", "wide"])
def test_both_directions_share_one_array(bundle: WorkerBundle, linear: str, first: str) -> None:
    second = "backward" if first == "forward" else "forward"
    weights = Weights(bundle)
    owned, shared = (weights[bundle.circuits[f"{linear}.{direction}"]] for direction in (first, second))
    assert (owned.transposed, shared.transposed) == (False, True)
    assert owned.owner == shared.owner == f"{linear}.{first}"
    assert len(owned.digits) == len(shared.digits) == (2 if linear == "wide" else 1)
    for digit, same, expected in zip(
        owned.digits, shared.digits, bundle.weight_digits(f"{linear}.{first}"), strict=True
    ):
        assert np.shares_memory(digit, same)
        np.testing.assert_array_equal(digit, expected)


def test_a_large_weight_is_the_mapped_file(bundle: WorkerBundle) -> None:
    before = _mapped(bundle)
    weights = Weights(bundle)
    digit = weights[bundle.circuits["large.forward"]].digits[0]
    kept = weights[bundle.circuits["large.backward"]]  # compared with its file, which is let go of
    assert _mapped(bundle) - before == {"large.forward/1/weight.bin"}
    assert not digit.flags.writeable and not digit.flags.owndata and kept.transposed


def _mapped(bundle: WorkerBundle) -> set[str]:
    """The files of the bundle that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line.split("circuits/")[1] for line in lines if str(bundle.directory.resolve()) in line}


def test_a_direction_with_fewer_limbs_shares_the_digits_it_needs(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).integers(-32768, 32640, (9, 7), dtype=np.int16)
    with WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer:
        for name, matrix, limbs in (("pair.forward", weight, 3), ("pair.backward", weight.T, 1)):
            writer.add(LowerWorker()(encrypted_linear_model(matrix, 8 * limbs, 8, name)).model)
        bundle = writer.commit()
    weights = Weights(bundle)
    forward, backward = (weights[bundle.circuits[f"pair.{direction}"]] for direction in ("forward", "backward"))
    assert len(forward.digits) == 2 and len(backward.digits) == 1
    assert np.shares_memory(forward.digits[0], backward.digits[0])
    # The other way round the single digit is not enough, and the forward weight is read from its own file.
    reverse = Weights(bundle)
    assert len(reverse[bundle.circuits["pair.backward"]].digits) == 1
    assert not reverse[bundle.circuits["pair.forward"]].transposed
