"""Runs an `onnx_ir` graph in torch, operator by operator, with autograd. It serves passes, tests and the client."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError, LegalityError
from hecompile.ir import attributes_of, constant_of
from hecompile.operators import OPERATORS, Context, Operator

Observer = Callable[[ir.Value, Tensor], None]


@dataclass(frozen=True)
class _Step:
    """One node, resolved once: its function, attributes, input and output names, and the values that die after it."""

    node: ir.Node
    function: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory, also where that is a file mapped read-only: no operator writes to its inputs, and
    a copy of a large vocabulary's embedding would double what the client keeps resident."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)


class Interpreter:
    """A prepared graph. `run(inputs)` is a pure function of its inputs and may be called any number of times.

    Raises LegalityError at construction for an operator that has no implementation.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.constants: dict[str, Tensor] = {}
        for name, value in self.graph.initializers.items():
            array = constant_of(value)
            if array is None:
                raise LegalityError(f"initializer {name} has no data")
            self.constants[name] = _as_tensor(array)
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

    def _fold_constant(self, node: ir.Node) -> bool:
        if node.op_type != "Constant" or node.domain:
            return False
        array = constant_of(node.outputs[0])
        if array is None:
            raise LegalityError(f"Constant {node.name}: only numeric tensors are supported")
        self.constants[str(node.outputs[0].name)] = torch.tensor(array)
        return True

    def run(
        self, inputs: Mapping[str, Tensor], context: Context | None = None, observer: Observer | None = None
    ) -> dict[str, Tensor]:
        """Evaluate the graph. `inputs` maps every graph input to a tensor; returns the graph outputs by name.

        `observer` is called with every value that a node produces (calibration). Raises InputError for a missing
        input.
        """
        context = context or Context()
        values: dict[str, Tensor] = dict(self.constants)
        for graph_input in self.graph.inputs:
            name = str(graph_input.name)
            if name not in inputs:
                raise InputError(f"the graph needs the input {name}; given were {sorted(inputs)}")
            values[name] = inputs[name]
        for step in self._steps:
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
        return {str(value.name): values[str(value.name)] for value in self.graph.outputs}


def causal_attention_bias(attention_mask: Tensor) -> Tensor:
    """The additive attention bias [B, 1, S, S] f32 of a right-padded batch: 0 where query i may see key j ≤ i and j is a
    real token (`attention_mask` [B, S], 1 = real), the smallest finite float elsewhere."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal[None, None] & attention_mask[:, None, None, :].bool()  # [B, 1, S, S]
    # A padded query sees at least itself, so that its softmax stays finite; its output is never used.
    allowed = allowed | torch.eye(length, dtype=torch.bool)[None, None]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def graph_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The data inputs of an exported graph for a right-padded batch (both [B, S] int64)."""
    positions = torch.arange(input_ids.shape[1], dtype=torch.int64).expand_as(input_ids).contiguous()
    return {
        "input_ids": input_ids,
        "attention_bias": causal_attention_bias(attention_mask),
        "position_ids": positions,
    }
