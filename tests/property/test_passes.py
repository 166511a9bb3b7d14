"""Properties of passes, against brute force or against the graph before."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import HecompileError
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import DOMAIN, ORIGIN, add_initializer, attributes_of
from hecompile.he.check_tolerances import can_be_verified
from hecompile.he.parameters import CATALOGUE, LinearParameters
from hecompile.he.weight_norms import measure_norms
from hecompile.passes.offload.select_parameters import choose_ring
from hecompile.plan.circuits import effective_bits
from hecompile.plan.costs import CostModel
from tests.support.graphs import placements, prepared, run_pass

SEEDS = st.integers(0, 2**32 - 1)


def linears(weights: dict[str, np.ndarray], sources: dict[str, str]) -> ir.Model:
    """QuantizedLinear nodes of unit scale, each reading the graph input that `sources` names; all are results."""
    inputs: dict[str, ir.Value] = {}
    for name, source in sources.items():
        shape = ir.Shape(["B", "S", weights[name].shape[1]])
        inputs.setdefault(source, ir.Value(name=source, shape=shape, type=ir.TensorType(ir.DataType.FLOAT)))
    graph = ir.Graph(list(inputs.values()), [], nodes=[], opset_imports={"": 23, DOMAIN: 1})
    for name, weight in weights.items():
        matrix = add_initializer(graph, f"{name}.w", weight)
        scale = add_initializer(graph, f"{name}.s", np.ones(len(weight), dtype=np.float32))
        node = ir.node(
            "QuantizedLinear", [inputs[sources[name]], matrix, scale], domain=DOMAIN, metadata_props={ORIGIN: f"m.0.{name}"}
        )
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["B", "S", len(weight)])
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def int8(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.integers(-128, 128, shape, dtype=np.int8)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, outs=st.lists(st.integers(1, 5), min_size=1, max_size=4), features=st.integers(1, 6), data=st.data())
def test_stacking_preserves_meaning_for_all_shapes(seed: int, outs: list[int], features: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    names = [f"p{index}" for index in range(len(outs))]
    sources = {name: data.draw(st.sampled_from(["x", "z"])) for name in names}
    weights = {name: int8(random, out, features) for name, out in zip(names, outs, strict=True)}
    model = prepared(linears(weights, sources))
    inputs = {name: torch.from_numpy(random.integers(-9, 10, (2, 3, features))).float() for name in set(sources.values())}
    before = Interpreter(model).run(inputs)
    run_pass(model, "stack_projections")
    after = Interpreter(model).run(inputs)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert sum(node.op_type == "QuantizedLinear" for node in model.graph) == len(set(sources.values()))


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    wanted=st.floats(0.5, 22.0),
    bandwidth=st.sampled_from([1e6, 1e11, 1e14]),
)
def test_the_bytes_chosen_are_the_cheapest_that_reach_the_precision(
    seed: int, shape: tuple[int, int], wanted: float, bandwidth: float
) -> None:
    weight = int8(np.random.default_rng(seed), *shape)
    model = prepared(linears({"p": weight}, {"p": "x"}))
    costs = CostModel(bandwidth=bandwidth)
    best: dict[str, float | None] = {}
    for direction, norms in zip(("forward", "backward"), measure_norms(torch.from_numpy(weight)), strict=True):
        seconds = []
        for upload, reply in itertools.product(range(8, 33), repeat=2):
            try:
                parameters = LinearParameters.from_norms(norms, upload, reply)
            except HecompileError:
                continue
            if effective_bits(parameters, norms, 16.0) >= wanted and can_be_verified(parameters):
                seconds.append(costs.wire(parameters, 1) + costs.worker(parameters, 1))
        best[direction] = min(seconds, default=None)
    try:
        run_pass(model, "select_parameters", effective_bits=wanted, costs=costs)
    except HecompileError as error:
        assert None in best.values() and f"{wanted} effective bits cannot be reached" in str(error)
        return
    chosen = attributes_of(model.graph.node(0))
    for direction, (features_in, features_out) in {"forward": shape[::-1], "backward": shape}.items():
        upload, reply = chosen[f"{direction}_upload_bits"], chosen[f"{direction}_reply_bits"]
        assert cost_of_bits(costs, upload, reply, features_in, features_out) == best[direction]


def cost_of_bits(costs: CostModel, upload: int, reply: int, features_in: int, features_out: int) -> float:
    """Seconds per token that depend on the bits, for an int8 weight."""
    wire = (-(-upload * features_in // 8) + -(-reply * features_out // 8)) / costs.bandwidth
    return wire + 2 * features_in * features_out * -(-upload // 8) / costs.worker_flops


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    chunk=st.integers(1, 200),
    wide=st.booleans(),
    transposed=st.booleans(),
)
def test_norms_of_rows_and_columns_are_exact(
    seed: int, shape: tuple[int, int], chunk: int, wide: bool, transposed: bool
) -> None:
    limit, dtype = (2**15, np.int16) if wide else (2**7, np.int8)
    weight = np.random.default_rng(seed).integers(-limit, limit, shape, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hecompile.he.weight_norms._NORM_CHUNK", chunk)
        measured = measure_norms(torch.from_numpy(weight.T if transposed else weight))
    for norms, rows in zip(measured[:: -1 if transposed else 1], (weight, weight.T), strict=True):
        l1 = [sum(abs(int(value)) for value in row) for row in rows]
        squares = [sum(int(value) ** 2 for value in row) for row in rows]
        assert (norms.out_features, norms.in_features) == rows.shape
        assert (norms.max_l1, norms.max_l2) == (max(l1), math.sqrt(max(squares)))
        assert norms.mean_square_l2 == pytest.approx(sum(squares) / len(squares), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 2**20), shape=st.tuples(st.integers(1, 2**15), st.integers(1, 2**15)))
def test_the_ring_chosen_is_always_secure(tokens: int, shape: tuple[int, int]) -> None:
    ring = choose_ring(tokens, [LinearParameters(*shape, max_l1=shape[0], max_l2=1.0)], CostModel())
    assert ring in CATALOGUE.values()
    assert ring.security_bits >= 128 and not ring.insecure


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sources=st.lists(st.sampled_from(["x", "z"]), min_size=1, max_size=4),
    outs=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    price=st.floats(0.001, 1.0),
    worker=st.floats(0.001, 1.0),
)
def test_the_cut_is_as_cheap_as_the_best_of_all_placements(
    seed: int, sources: list[str], outs: list[int], price: float, worker: float
) -> None:
    features = 5
    costs = CostModel(
        client_flops=4.0 * features, worker_flops=16.0 * features / worker, bandwidth=8 / price,
        encrypt_seconds=0.0, decrypt_seconds=0.0, transform_flops=math.inf, hint_bandwidth=math.inf,
    )  # fmt: skip  one output feature: 1 s on the client, `worker` on the worker; one element that crosses: `price`
    names = [f"p{index}" for index in range(len(sources))]
    random = np.random.default_rng(seed)
    weights = {name: int8(random, out, features) for name, out in zip(names, outs, strict=False)}
    source = dict(zip(names, sources, strict=True))

    def total(remote: set[str]) -> float:
        computed = sum(len(weights[name]) * (worker if name in remote else 1.0) for name in names)
        crossing = features * len({source[name] for name in remote}) + sum(len(weights[name]) for name in remote)
        return computed + price * crossing

    subsets = itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(len(names) + 1))
    least = min(total(set(subset)) for subset in subsets)
    model = linears(weights, source)
    run_pass(model, "annotate_secrecy")
    run_pass(model, "place", policy="cheapest", costs=costs)
    placed = total({name for name, side in placements(model).items() if side == "worker"})
    assert abs(placed - least) <= 1e-6 * max(1.0, least)
