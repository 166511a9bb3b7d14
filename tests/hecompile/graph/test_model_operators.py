"""Norm and LoRA with gradients of their own: values of the plain form in float64, gradients of differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.graph.ir import DOMAIN
from hecompile.graph.operators import OPERATORS, Context

SCALING, EPSILON = 0.75, 1e-3
ATTRIBUTES = {"scaling": SCALING, "dropout": 0.0, "epsilon": EPSILON}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "RMSNorm": lambda x, w: w * x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt(),
    "SwiGLU": lambda gate, up: F.silu(gate) * up,
    "Lora": lambda x, a, b: SCALING * x @ a.t() @ b.t(),
}
SHAPES = {
    "RMSNorm": [(2, 3, 6), (6,)],
    "SwiGLU": [(2, 3, 6), (2, 3, 6)],
    "Lora": [(2, 3, 6), (2, 6), (5, 2)],
}


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES[name]]


def computed(name: str) -> Callable[..., Tensor]:
    return lambda *given: OPERATORS[DOMAIN, name](Context(), ATTRIBUTES, *given)


@pytest.mark.parametrize("name", PLAIN)
def test_value_and_gradient_are_those_of_the_plain_form(name: str) -> None:
    given = [value.requires_grad_() for value in inputs(name, torch.float64)]
    torch.testing.assert_close(computed(name)(*given), PLAIN[name](*given))
    assert torch.autograd.gradcheck(computed(name), given)
    single = inputs(name, torch.float32)
    torch.testing.assert_close(computed(name)(*single), PLAIN[name](*single), rtol=1e-5, atol=1e-6)


def test_no_gradient_is_made_of_what_needs_none() -> None:
    for name in ("RMSNorm", "Lora"):
        first, *rest = inputs(name, torch.float64)
        wanted = [value.requires_grad_() for value in rest]
        computed(name)(first, *wanted).sum().backward()
        assert first.grad is None and all(value.grad is not None for value in wanted)


def test_lora_of_swiglu_has_the_gradient_of_both() -> None:
    gate, up = inputs("SwiGLU", torch.float64)
    _, a, b = inputs("Lora", torch.float64)
    given = [value.requires_grad_() for value in (gate, up, a, b)]

    def both(gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return computed("GatedLora")(computed("SwiGLU")(gate, up), a, b, gate, up)

    torch.testing.assert_close(both(*given), PLAIN["Lora"](PLAIN["SwiGLU"](gate, up), a, b))
    assert torch.autograd.gradcheck(both, given)


def test_a_norm_keeps_its_input_alone() -> None:
    kept: list[int] = []
    x, weight = (value.requires_grad_() for value in inputs("RMSNorm", torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()) or value, lambda value: value):
        computed("RMSNorm")(x, weight)
    assert sorted(kept) == [6, 6, 36]  # its gain, an inverse for each token, and x
