"""Run an `onnx_ir` graph in torch, operator by operator, with autograd. Passes, tests and the client use it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError, LegalityError
from hecompile.graph import model_operators, polynomial_operators, quantized_operators  # noqa: F401  they register
from hecompile.graph.attention_cache import causal_mask
from hecompile.graph.ir import (
    ATTENTION_BIAS,
    ATTENTION_OPERATORS,
    SLIDING_BIAS,
    attributes_of,
    constant_of,
    window_of,
)
from hecompile.graph.operators import OPERATORS, Context, Operator

Observer = Callable[[ir.Value, Tensor], None]


@dataclass(frozen=True)
class _Step:
    """Hold a node resolved once: its function, attributes, input and output names, and the values that die after it."""

    node: ir.Node
    function: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


def as_tensor(array: np.ndarray) -> Tensor:
    """Make a tensor on the array's own memory, even where that is a file mapped read-only.

    No operator writes to its inputs, and a copy of a large vocabulary's embedding would double the client's resident memory.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        if array.dtype == ir.DataType.BFLOAT16.numpy():  # which torch knows under its own name alone
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class Interpreter:
    """Prepare a graph once and run it any number of times; `run` is a pure function of its inputs.

    Raises LegalityError at construction for an operator that has no implementation.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.constants: dict[str, Tensor] = {}
        for name, value in self.graph.initializers.items():
            array = constant_of(value)
            if array is None:
                raise LegalityError(f"initializer {name} has no data")
            self.constants[name] = as_tensor(array)
        self._steps: list[_Step] = []
        last_use: dict[str, int] = {}
        nodes = [node for node in self.graph if not self._fold_constant(node)]
        for index, node in enumerate(nodes):
            last_use.update({str(used.name): index for used in node.inputs if used is not None})
        kept = {str(value.name) for value in self.graph.outputs} | self.constants.keys()
        for index, node in enumerate(nodes):
            function = OPERATORS.get((node.domain, node.op_type))
            if function is None:
                raise LegalityError(f"no implementation of operator {node.domain}::{node.op_type} (node {node.name})")
            names = tuple(None if used is None else str(used.name) for used in node.inputs)
            dead = tuple({n for n in names if n is not None and last_use[n] == index and n not in kept})
            outputs = tuple(str(value.name) for value in node.outputs)
            attributes = attributes_of(node)
            self._steps.append(_Step(node, function, attributes, names, outputs, dead))
        self._narrowing = self._find_narrowing(last_use)

    @property
    def can_narrow(self) -> bool:
        """Tell whether `run` can leave out positions: whether an attention that makes them independent is in the graph."""
        return self._narrowing is not None

    def _find_narrowing(self, last_use: Mapping[str, int]) -> tuple[int, tuple[tuple[str, int], ...]] | None:
        """Return the index of the last attention, and (name, axis) of each value with positions that is read after it."""
        attentions = [i for i, step in enumerate(self._steps) if step.node.op_type in ATTENTION_OPERATORS]
        names = {str(value.name): value for value in self.graph.inputs}
        shape = names["input_ids"].shape if "input_ids" in names else None
        if not attentions or shape is None:
            return None
        last, positions = attentions[-1], shape[-1]
        made = [value for step in self._steps[: last + 1] for value in step.node.outputs]
        kept = {str(value.name) for value in self.graph.outputs}
        alive: list[tuple[str, int]] = []
        for value in (*self.graph.inputs, *made):
            name = str(value.name)
            if last_use.get(name, -1) <= last and name not in kept:
                continue
            if value.shape is None:
                return None
            axes = [
                axis for axis, dim in enumerate(value.shape) if isinstance(dim, ir.SymbolicDim) and dim == positions
            ]
            if len(axes) > 1:
                return None
            alive += [(name, axis) for axis in axes]
        return last, tuple(alive)

    def _fold_constant(self, node: ir.Node) -> bool:
        if node.op_type != "Constant" or node.domain:
            return False
        array = constant_of(node.outputs[0])
        if array is None:
            raise LegalityError(f"Constant {node.name}: only numeric tensors are supported")
        self.constants[str(node.outputs[0].name)] = torch.tensor(array)
        return True

    def run(
        self,
        inputs: Mapping[str, Tensor],
        context: Context | None = None,
        observer: Observer | None = None,
        positions: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the graph and return its outputs by name.

        Args:
            inputs: a tensor for every graph input, by name.
            observer: called with every value that a node produces, for calibration.
            positions: int64 [N], the places on the sequence axis at which outputs are wanted, in this order. After the last
                attention no position depends on another, so all others are left out from there on.
            parameters: take the place of the initializers of the same names, for training.

        Raises:
            InputError: an input is missing, or there are `positions` and the graph has no last attention to cut them after.
            KeyError: a parameter has a name that no initializer has.
        """
        context = context or Context()
        narrowing = self._narrowing if positions is not None else None
        if positions is not None and narrowing is None:
            raise InputError("this graph has no last Attention node after which positions could be left out: fuse it")
        values: dict[str, Tensor] = dict(self.constants)
        for name, parameter in (parameters or {}).items():
            if name not in self.constants:
                raise KeyError(name)
            values[name] = parameter
        for graph_input in self.graph.inputs:
            name = str(graph_input.name)
            if name not in inputs:
                raise InputError(f"the graph needs the input {name}; given were {sorted(inputs)}")
            values[name] = inputs[name]
        for index, step in enumerate(self._steps):
            arguments = [None if name is None else values[name] for name in step.inputs]
            results = step.function(context, step.attributes, *arguments)
            if not isinstance(results, tuple):
                results = (results,)
            for value, name, result in zip(step.node.outputs, step.outputs, results, strict=True):
                values[name] = result
                if observer is not None:
                    observer(value, result)
            for name in step.dead:
                del values[name]
            if narrowing is not None and index == narrowing[0]:
                assert positions is not None
                for name, axis in narrowing[1]:
                    values[name] = values[name].index_select(axis, positions)
        return {str(value.name): values[str(value.name)] for value in self.graph.outputs}


def evaluate_node(node: ir.Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Evaluate one node outside of any run; None stands for an input that it does without."""
    results = OPERATORS[node.domain, node.op_type](Context(), attributes_of(node), *inputs)
    return results if isinstance(results, tuple) else (results,)


def packed_graph_inputs(
    input_ids: Tensor, lengths: Sequence[int], starts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Make the data inputs of a fused graph for packed sequences: input_ids [1, T], T the sum of lengths.

    starts: position of each sequence's first token; 0 by default. Run the graph with `Context(sequences=lengths)`: the bias
    is a placeholder, and attention goes by the lengths.
    """
    begin = [0] * len(lengths) if starts is None else starts
    ranges = [torch.arange(start, start + length) for start, length in zip(begin, lengths, strict=True)]
    positions = torch.cat(ranges)[None]  # [1, T]
    biases = dict.fromkeys((ATTENTION_BIAS, SLIDING_BIAS), torch.zeros(1, 1, 1, 1))
    return {"input_ids": input_ids, "position_ids": positions, **biases}


def causal_attention_bias(attention_mask: Tensor, window: int | None = None) -> Tensor:
    """Make the additive attention bias f32 [B, 1, S, S] of a right-padded batch.

    It is 0 where query i may see key j ≤ i and j is a real token (`attention_mask` [B, S], 1 = real), and the smallest
    finite float elsewhere. window: how many positions a query sees at most, itself included; None for all.
    """
    length = attention_mask.shape[1]
    causal = causal_mask(length, length, window)
    allowed = causal[None, None] & attention_mask[:, None, None, :].bool()  # [B, 1, S, S]
    # A padded query sees at least itself, so that its softmax stays finite; its output is never used.
    allowed = allowed | torch.eye(length, dtype=torch.bool)[None, None]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def graph_inputs(input_ids: Tensor, attention_mask: Tensor, model: ir.Model | None = None) -> dict[str, Tensor]:
    """Make the data inputs of an exported graph for a right-padded batch; both tensors are int64 [B, S].

    model: the graph, where it has inputs besides those of every model: a bias for attention within a window.
    """
    positions = torch.arange(input_ids.shape[1], dtype=torch.int64).expand_as(input_ids).contiguous()
    inputs = {
        "input_ids": input_ids,
        ATTENTION_BIAS: causal_attention_bias(attention_mask),
        "position_ids": positions,
    }
    for value in () if model is None else model.graph.inputs:
        if (window := window_of(value)) is not None:
            inputs[str(value.name)] = causal_attention_bias(attention_mask, window)
    return inputs
