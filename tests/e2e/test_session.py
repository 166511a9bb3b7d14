"""Check that a session reads its plan once, and that nobody's changes to the graph reach anybody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from hecompile.bundles.client import ClientBundle, graph_sha256
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.graph.ir import constant_of, nodes_of_type
from hecompile.inspection.linear import circuits_without_gradient
from hecompile.passes.offload.fuse import Fuse
from hecompile.runtime.client.functions import functions_of
from hecompile.runtime.client.session import open_session
from hecompile.runtime.training.train import run_training
from tests.e2e.conftest import Build
from tests.support.training import make_recipe

EXACT = {"attention": "exact", "norm": "exact", "activation": "exact"}


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record every file that onnx_ir reads a graph from."""
    read: list[Path] = []
    real = ir.load

    def load(path: Path) -> ir.Model:
        read.append(path)
        return real(path)

    monkeypatch.setattr(ir, "load", load)
    return read


def test_a_run_parses_the_plan_once(build: Build, parses: list[Path], tmp_path: Path) -> None:
    place = {"model": build.directory / CLIENT, "worker_bundle": build.directory / WORKER, **EXACT}
    recipe = make_recipe(tmp_path, max_steps=1).model_copy(update=place)
    with open_session(recipe) as session:
        run_training(session.model, session.tokenizer, recipe)  # it compares the recipe's functions with the plan's
        assert circuits_without_gradient(session.bundle.graph())
    assert parses == [build.directory / CLIENT / "plan.onnx"]


def test_changes_to_a_graph_stay_in_it(build: Build) -> None:
    bundle = ClientBundle.open(build.directory / CLIENT)
    fused = Fuse()(bundle.graph()).model
    assert list(nodes_of_type(fused, "Attention")) and functions_of(fused) == EXACT
    for node in nodes_of_type(fused, "RMSNorm"):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    assert graph_sha256(bundle.graph()) == bundle.plan.graph_sha256


def test_copies_of_a_graph_share_their_weights(build: Build) -> None:
    bundle = ClientBundle.open(build.directory / CLIENT)
    one, other = bundle.graph(), bundle.graph()
    weights = {name: (value, other.graph.initializers[name]) for name, value in one.graph.initializers.items()}
    arrays = {name: (constant_of(a), constant_of(b)) for name, (a, b) in weights.items()}
    large = [name for name, (a, _) in arrays.items() if a is not None and a.nbytes > 1 << 16]
    assert large
    for name in large:
        a, b = arrays[name]
        assert a is not None and b is not None and np.shares_memory(a, b)
