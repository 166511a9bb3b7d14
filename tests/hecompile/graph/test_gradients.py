"""Which values change with the adapter, and which linears need no gradient of what they read."""

from __future__ import annotations

import pytest

from hecompile.graph.gradients import trained_values, without_gradient
from hecompile.graph.ir import ATTENTION_BIAS, module_path
from tests.support.graphs import parse, run_pass

TEXT = f"""
two (int64[B,S] input_ids, float[B,1,S,S] {ATTENTION_BIAS}) => (float[B,S,2] y)
<float[5,2] table, float[2,2] w, float[B,S,2] x0, float[B,S,2] a, float[B,S,2] b, float[B,S,2] c, float[B,S,2] d,
 float[B,S,2] x1, float[B,S,2] e, float[B,S,2] x2>
{{
    x0 = Gather (table, input_ids)
    a = hecompile.Linear (x0, w)
    b = hecompile.Linear (x0, w)
    c = Mul (a, b)
    d = hecompile.Linear (c, w)
    x1 = Add (x0, d)
    e = hecompile.Linear (x1, w)
    x2 = Add (x1, e)
    y = hecompile.Linear (x2, w)
}}
""".replace("float[5,2] table", "float[5,2] table = {" + ", ".join(["1.0"] * 10) + "}").replace(
    "float[2,2] w", "float[2,2] w = {1.0, 0.0, 0.0, 1.0}"
)
PATHS = {
    "a": "model.layers.0.q_proj", "b": "model.layers.0.v_proj", "d": "model.layers.0.o_proj",
    "e": "model.layers.1.up_proj", "y": "lm_head",
}  # fmt: skip
NAMES = {path: name for name, path in PATHS.items()}


@pytest.mark.parametrize(
    ("targets", "layers", "forward_only", "constant"),
    [
        (("v_proj",), None, "ab", "x0 a b.frozen"),
        (("up_proj",), None, "abde", "x0 a b c d x1 e.frozen"),
        (("o_proj", "up_proj"), (1,), "abde", "x0 a b c d x1 e.frozen"),
        (("o_proj", "up_proj"), None, "abd", "x0 a b c d.frozen"),
    ],
)
def test_nothing_below_the_lowest_adapter_needs_a_gradient(
    targets: tuple[str, ...], layers: tuple[int, ...] | None, forward_only: str, constant: str
) -> None:
    model = parse(TEXT, PATHS)
    if layers is not None:  # o_proj is in layer 0 alone
        targets = tuple(name for name in targets if name != "o_proj")
    run_pass(model, "attach_lora", target_modules=targets, layers_to_transform=layers)
    assert "".join(sorted(NAMES[module_path(node)] for node in without_gradient(model, "Linear"))) == forward_only
    trained = trained_values(model)
    made = [str(value.name) for node in model.graph for value in node.outputs if value not in trained]
    short = {f"{path}.frozen": f"{name}.frozen" for name, path in PATHS.items()}
    assert [short.get(name, name) for name in made] == constant.split()


def test_activations_that_a_part_of_a_model_reads_have_a_gradient() -> None:
    model = parse(
        "part (float[B,S,2] x) => (float[B,S,2] y) <float[2,2] w = {1.0, 0.0, 0.0, 1.0}> { y = hecompile.Linear (x, w) }"
    )
    assert without_gradient(model, "Linear") == frozenset()
