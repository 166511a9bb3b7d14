"""Take the output head off a client's plan: who multiplies by it, and what becomes of the products.

    local    logits = form(Linear(hidden, W))                                    the client has W
    remote   logits = form(Concat(RemoteLinear(hidden), RemoteLinear(hidden)))   the worker has W, in parts of the vocabulary

Either way the loss goes through it piece by piece (`hecompile.runtime.model.head`), which the interpreter of the graph
could not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import DOMAIN, constant_of
from hecompile.runtime.client.mapped import release
from hecompile.runtime.client.products import Products
from hecompile.runtime.model.head import LocalHead, LogitsForm, OutputHead

LOGITS_BYTES = 1 << 28
"""Size of the logits of a remote head that exist at a time, float32: 511 rows of 128256. A block of a ciphertext costs as
much for half of its tokens as for all, so that smaller pieces would take more cryptography."""


@dataclass(frozen=True)
class DetachedHead:
    """Say how the logits were made: `weight` names the initializer of a local head, and is None for a remote one.

    parts: of a remote head, (linear, initializer of its scales f32 [V_k]), in the order of the vocabulary.
    """

    form: LogitsForm
    weight: str | None
    parts: tuple[tuple[str, str], ...] = ()

    def open(
        self,
        model: ir.Model,
        constants: Mapping[str, Tensor],
        products: Products,
        ring_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> OutputHead:
        """Return the head itself.

        constants: the graph's initializers; ring_dim: tokens of a block of a ciphertext; dtype: of a local head's products.
        Raises InputError for bfloat16 where this processor has no such products, or the head is remote.
        """
        if dtype == torch.bfloat16:
            self._require_bfloat16()
        if self.weight is None:
            return RemoteHead(products, [(linear, constants[scale]) for linear, scale in self.parts], ring_dim)
        stored = constant_of(model.graph.initializers[self.weight])
        assert stored is not None
        return LocalHead(constants[self.weight], lambda rows: release(stored[rows]), dtype)

    def _require_bfloat16(self) -> None:
        if self.weight is None:
            raise InputError("head_products is bfloat16 but the plan's head is remote: drop head_products")
        if not any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")):
            raise InputError("head_products is bfloat16 but this processor has no bfloat16 products: drop head_products")


class RemoteHead:
    """Ask the worker for the products, piece by piece of the vocabulary; see `OutputHead`.

    It tells the worker how many rows are scored, as the linears of the last layer do too.
    """

    def __init__(self, products: Products, parts: list[tuple[str, Tensor]], ring_dim: int) -> None:
        self._products, self._parts = products, parts
        fitting = LOGITS_BYTES // (4 * sum(len(scale) for _, scale in parts))
        self.rows = max(1, fitting // ring_dim * ring_dim if fitting >= ring_dim else fitting)

    def products(self, hidden: Tensor) -> list[Tensor]:
        """See `OutputHead.products`."""
        return [
            self._products.product(f"{linear}.forward", hidden, row_scale=scale) for linear, scale in self._parts
        ]

    def gradient(self, pieces: list[Tensor]) -> Tensor:
        """See `OutputHead.gradient`."""
        total: Tensor | None = None
        for linear, scale in reversed(self._parts):
            part = self._products.product(f"{linear}.backward", pieces.pop(), column_scale=scale)  # [n, H]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


def detach_head(model: ir.Model) -> DetachedHead:
    """Make the head's input the graph's only output, and return what made logits of it.

    Raises LegalityError when the logits are anything but products with a frozen weight, times numbers and capped at most
    once.
    """
    (logits,) = model.graph.outputs
    node, factor, cap = logits.producer(), 1.0, None
    while node is not None and not _heads(node):
        if node.op_type == "Tanh" and cap is None:
            factor, cap = 1.0, factor
            node = _maker(node.inputs[0])
            continue
        value, number = _times(node)
        if value is None:
            break
        factor, node = factor * number, _maker(value)
    heads = [] if node is None else _heads(node)
    if not heads:
        raise LegalityError(f"the output {logits.name} of the client plan is not made by a Linear; export it again")
    hidden = heads[0].inputs[0]
    assert hidden is not None
    form, frozen = LogitsForm(factor, cap), [str(head.inputs[1].name) for head in heads if head.inputs[1] is not None]
    remote = heads[0].op_type == "RemoteLinear"
    linears = [str(head.attributes["linear"].value) for head in heads] if remote else []
    model.graph.outputs[0] = hidden
    _remove(model, logits.producer(), hidden)
    return DetachedHead(form, None if remote else frozen[0], tuple(zip(linears, frozen, strict=True)) if remote else ())


def _heads(node: ir.Node) -> list[ir.Node]:
    """Return the linears whose products `node` gives, side by side; none where it gives anything else."""
    if (node.domain, node.op_type) in ((DOMAIN, "Linear"), (DOMAIN, "RemoteLinear")):
        return [node]
    makers = [_maker(value) for value in node.inputs] if (node.domain, node.op_type) == ("", "Concat") else []
    remote = [maker for maker in makers if maker is not None and maker.op_type == "RemoteLinear"]
    same = len(remote) == len(makers) and len({maker.inputs[0] for maker in remote}) == 1
    return remote if same else []


def _times(node: ir.Node) -> tuple[ir.Value | None, float]:
    """Return x and c where `node` computes c·x; no value where it computes something else."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None, 1.0
    first, second = node.inputs
    for value, constant in ((first, second), (second, first)):
        number = constant_of(constant)
        if number is not None and number.size == 1 and constant_of(value) is None:
            if node.op_type == "Mul":
                return value, float(number)
            if constant is second:
                return value, 1.0 / float(number)
    return None, 1.0


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _remove(model: ir.Model, last: ir.Node | None, until: ir.Value) -> None:
    """Remove the nodes from the logits back to `until`; the head's weight stays, for the client multiplies by it."""
    waiting = [] if last is None else [last]
    while waiting:
        node = waiting.pop()
        makers = dict.fromkeys(_maker(value) for value in node.inputs if value is not None and value is not until)
        model.graph.remove(node, safe=True)
        waiting += [
            maker
            for maker in makers
            if maker is not None and not any(output.uses() or constant_of(output) is not None for output in maker.outputs)
        ]
