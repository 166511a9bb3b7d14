"""Fusing attention and SwiGLU: text, values and gradients, what is left alone, and packed sequences."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import InputError
from hecompile.graph.interpreter import Interpreter, causal_attention_bias
from hecompile.graph.ir import print_model
from hecompile.graph.legality import FUSED_CLIENT_PLAN
from hecompile.graph.operators import Context
from tests.conftest import Golden
from tests.support.graphs import gaussian, parse, run_pass

TEXT = """
block (int64[B,S] input_ids, float[1,2,S,4] q, float[1,2,S,4] k, float[1,2,S,4] v, float[1,1,S,S] bias, float[1,S,8] up)
  => (float[1,S,8] y)
<float c = {0.5}, int64[3] shape = {0, 0, 8}>
{
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, kt)
    scaled = Mul (scores, c)
    biased = Add (scaled, bias)
    weights = Softmax <axis = -1> (biased)
    mixed = MatMul (weights, v)
    merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
    gate = Reshape (merged, shape)
    activated = hecompile.SiLU (gate)
    y = Mul (activated, up)
}
"""
LENGTH = 5


def block() -> ir.Model:
    model = parse(TEXT, {"mixed": "model.layers.0.self_attn", "y": "model.layers.0.mlp"})
    shapes = {"mixed": (1, 2, "S", 4), "merged": (1, "S", 2, 4), "gate": (1, "S", 8)}
    for node in model.graph:
        for value in node.outputs:
            if str(value.name) in shapes:
                value.shape = ir.Shape(shapes[str(value.name)])
    return model


def data() -> dict[str, torch.Tensor]:
    inputs = {name: gaussian(1, 2, LENGTH, 4, seed=seed).requires_grad_() for seed, name in enumerate("qkv")}
    inputs["up"] = gaussian(1, LENGTH, 8, seed=3).requires_grad_()
    inputs["bias"] = causal_attention_bias(torch.ones(1, LENGTH, dtype=torch.int64))
    return inputs | {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)}


def run(model: ir.Model, context: Context | None = None, positions: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The output and the gradient of each input for one fixed gradient of the output."""
    inputs = data()
    (y,) = Interpreter(model).run(inputs, context, positions=positions).values()
    whole = gaussian(1, LENGTH, 8, seed=9)
    y.backward(whole if positions is None else whole.index_select(1, positions))
    return {"y": y.detach()} | {f"d{name}": inputs[name].grad for name in ("q", "k", "v", "up")}  # type: ignore[dict-item]


def test_golden(golden: Golden) -> None:
    model = block()
    before = run(model)
    result = run_pass(model, "fuse", FUSED_CLIENT_PLAN)
    assert result.modified
    golden.check("fuse", print_model(result.model))
    after = run(result.model)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax <axis = -1>", "Softmax <axis = 2>"),
        ("<perm = [0, 1, 3, 2]>", "<perm = [0, 1, 2, 3]>"),
        ("(scores, c)", "(scores, bias)"),  # not a constant
    ],
)
def test_attention_of_another_form_is_left_alone(old: str, new: str) -> None:
    assert old in TEXT
    fused = run_pass(parse(TEXT.replace(old, new)), "fuse", FUSED_CLIENT_PLAN).model
    assert [node.op_type for node in fused.graph].count("MatMul") == 2
    assert "Attention" not in {node.op_type for node in fused.graph}


def test_an_intermediate_result_that_is_used_elsewhere_is_kept() -> None:
    shared = TEXT.replace("=> (float[1,S,8] y)", "=> (float[1,S,8] y, float[1,2,S,S] weights, float[1,S,8] activated)")
    model = parse(shared)
    before = print_model(model)
    assert not run_pass(model, "fuse", FUSED_CLIENT_PLAN).modified
    assert print_model(model) == before


def test_fused_graph_is_left_alone() -> None:
    model = run_pass(block(), "fuse", FUSED_CLIENT_PLAN).model
    before = print_model(model)
    assert not run_pass(model, "fuse", FUSED_CLIENT_PLAN).modified
    assert print_model(model) == before


@pytest.mark.parametrize("lengths", [(LENGTH,), (2, 3), (1, 1, 3)])
def test_packed_sequences_attend_to_their_own_past(lengths: tuple[int, ...]) -> None:
    """The same as the unfused graph with a bias that is causal within each sequence and forbids the rest."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    inputs = data() | {"bias": torch.where(allowed, 0.0, -math.inf)[None, None]}
    (expected,) = Interpreter(block()).run(inputs).values()
    packed = run(run_pass(block(), "fuse", FUSED_CLIENT_PLAN).model, Context(sequences=lengths))
    torch.testing.assert_close(packed["y"], expected.detach())


def test_positions_that_are_not_asked_for_are_left_out_after_the_last_attention() -> None:
    model = run_pass(block(), "fuse", FUSED_CLIENT_PLAN).model
    seen: dict[str, tuple[int, ...]] = {}
    interpreter, positions = Interpreter(model), torch.tensor([1, 4])
    whole = interpreter.run(data())["y"]
    narrow = interpreter.run(
        data(), observer=lambda value, x: seen.update({str(value.name): tuple(x.shape)}), positions=positions
    )["y"]
    torch.testing.assert_close(narrow, whole[:, positions])
    assert seen["mixed"] == (1, 2, LENGTH, 4) and seen["gate"] == (1, 2, 8)
    # The gradient is that of a whole run whose other positions have none.
    gradients = run(model, positions=positions)
    inputs = data()
    masked = torch.zeros(1, LENGTH, 8)
    masked[:, positions] = gaussian(1, LENGTH, 8, seed=9)[:, positions]
    interpreter.run(inputs)["y"].backward(masked)
    for name in ("q", "k", "v", "up"):
        torch.testing.assert_close(gradients[f"d{name}"], inputs[name].grad, msg=name)


def test_positions_need_a_fused_graph() -> None:
    with pytest.raises(InputError, match="fuse it"):
        Interpreter(block()).run(data(), positions=torch.tensor([0]))


GATED = """
mlp (float[1,S,8] gate, float[1,S,8] up, float[2,8] A, float[6,2] B) => (float[1,S,6] z)
{
    activated = hecompile.SiLU (gate)
    y = Mul (activated, up)
    z = hecompile.Lora <scaling = 0.5, dropout = 0.0> (y, A, B)
}
"""


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_of_a_swiglu_keeps_no_result_of_it(dropout: float) -> None:
    text = GATED.replace("dropout = 0.0", f"dropout = {dropout}")
    shapes = {"gate": (1, LENGTH, 8), "up": (1, LENGTH, 8), "A": (2, 8), "B": (6, 2)}
    models = {"plain": parse(text), "fused": run_pass(parse(text), "fuse", FUSED_CLIENT_PLAN).model}
    assert [node.op_type for node in models["fused"].graph] == ["SwiGLU", "GatedLora"]
    found = {}
    for name, model in models.items():
        inputs = {key: gaussian(*shape, seed=len(key)).requires_grad_() for key, shape in shapes.items()}
        kept: list[tuple[int, ...]] = []
        context = Context(training=True, generator=torch.Generator().manual_seed(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t):
            (z,) = Interpreter(model).run(inputs, context).values()
        z.backward(gaussian(1, LENGTH, 6, seed=9))
        found[name] = {"z": z.detach(), **{f"d{key}": value.grad for key, value in inputs.items()}}
        wide = {pointer for pointer in kept if pointer not in {inputs[key].data_ptr() for key in ("A", "B")}}
        if (name, dropout) == ("fused", 0.0):
            assert len(wide) == 3  # gate, up and what is r wide
    for name, value in found["plain"].items():
        torch.testing.assert_close(found["fused"][name], value, msg=name)
