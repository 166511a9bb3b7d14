"""Evaluate a polynomial graph on ciphertexts, node by node.

Values are CkksTensors (ciphertexts) or numpy arrays (constants). The batch runs along the slots, so axis 0 of every
ciphertext tensor has size 1 here. A value is dropped after its last use.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.operations import OPERATIONS, sum_of_products
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import attributes_of, constant_of
from hecompile.graph.legality import REFRESHED, check_stage

Refresh = Callable[[str, CkksTensor], CkksTensor]
"""Function of the name of a refreshed value and its ciphertexts; returns fresh ones of the same shape at the top level."""


class PolynomialCircuit:
    """Prepare a graph at stage `refreshed` for evaluation; `run` is a pure function of its arguments.

    Raises:
        LegalityError: an operator has no implementation on ciphertexts, or a constant is not numeric.
    """

    def __init__(self, model: ir.Model) -> None:
        check_stage(model, REFRESHED)
        self.graph = model.graph
        self.constants: dict[str, NDArray[Any]] = {}
        for name, initializer in model.graph.initializers.items():
            array = constant_of(initializer)
            if array is None:
                raise LegalityError(f"initializer {name} has no data")
            self.constants[name] = np.asarray(array)
        self._nodes = []
        for node in model.graph:
            if node.op_type == "Constant":
                array = constant_of(node.outputs[0])
                if array is None:
                    raise LegalityError(f"Constant {node.name}: only numeric tensors are supported")
                self.constants[str(node.outputs[0].name)] = np.asarray(array)
                continue
            if (node.domain, node.op_type) not in OPERATIONS and node.op_type != "Refresh":
                raise LegalityError(f"{node.op_type} ({node.name}) cannot be evaluated on ciphertexts")
            self._nodes.append(node)
        self._fused = {node for node in self._nodes if _only_summed(node)}
        self._last: dict[str, int] = {}
        for position, node in enumerate(self._nodes):
            # Operands of a fused product must live until its sum.
            reads = [*node.inputs]
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and producer in self._fused:
                    reads += producer.inputs
            self._last.update({str(value.name): position for value in reads if value is not None})

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Map the name of each input to its shape, with 1 for the batch."""
        return {str(value.name): shape_of(value) for value in self.graph.inputs}

    @property
    def refreshed(self) -> dict[str, tuple[int, ...]]:
        """Map the name of each refreshed value to its shape, with 1 for the batch."""
        nodes = [node for node in self._nodes if node.op_type == "Refresh"]
        return {str(node.outputs[0].name): shape_of(node.outputs[0]) for node in nodes}

    def run(
        self,
        evaluator: Evaluator,
        inputs: Mapping[str, CkksTensor],
        refresh: Refresh,
        seconds: dict[str, float] | None = None,
    ) -> CkksTensor:
        """Return the graph's output on ciphertexts.

        Args:
            evaluator: of the client whose ciphertexts these are.
            inputs: by name.
            refresh: called for each value that is refreshed.
            seconds: collects time per operator.

        Raises:
            InputError: an input is missing or has another shape.
            LegalityError: the output does not depend on the inputs.
        """
        spent = defaultdict(float) if seconds is None else seconds
        kept = {str(value.name) for value in self.graph.outputs} | self.constants.keys()
        values: dict[str, Any] = dict(self.constants)
        for name, shape in self.inputs.items():
            if name not in inputs:
                raise InputError(f"the circuit needs the input {name}")
            if inputs[name].index.shape != shape:
                raise InputError(f"input {name} has shape {inputs[name].index.shape}, the circuit takes {shape}")
            values[name] = inputs[name]
        for position, node in enumerate(self._nodes):
            start = time.perf_counter()
            outputs = [str(value.name) for value in node.outputs]
            if node in self._fused:
                values[outputs[0]] = node
            else:
                arguments: list[Any] = [None if value is None else values[str(value.name)] for value in node.inputs]
                if node.op_type == "Refresh":
                    computed: Any = refresh(outputs[0], arguments[0])
                elif isinstance(arguments[0], ir.Node):
                    factors = [values[str(value.name)] for value in arguments[0].inputs if value is not None]
                    computed = sum_of_products(evaluator, attributes_of(node), factors, arguments[1:])
                else:
                    computed = OPERATIONS[node.domain, node.op_type](evaluator, attributes_of(node), arguments)
                results = computed if isinstance(computed, tuple) else (computed,)
                values.update(zip(outputs, results, strict=True))
            for value in node.inputs:
                self._drop(values, value, position, kept)
            name = "MatMul of ciphertexts" if node.op_type == "MatMul" else node.op_type
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        (output,) = (str(value.name) for value in self.graph.outputs)
        result = values[output]
        if not isinstance(result, CkksTensor):
            raise LegalityError("the output of the circuit does not depend on its inputs")
        return result

    def _drop(self, values: dict[str, Any], value: ir.Value | None, position: int, kept: set[str]) -> None:
        if value is None:
            return
        name = str(value.name)
        if name in values and self._last[name] <= position and name not in kept:
            stored = values.pop(name)
            if isinstance(stored, ir.Node):
                for operand in stored.inputs:
                    self._drop(values, operand, position, kept)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the static shape, with 1 for the symbolic batch.

    Raises:
        LegalityError: there is no shape, or another axis is symbolic.
    """
    if value.shape is None:
        raise LegalityError(f"{value.name} has no shape: the graph must be static but for the batch")
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    if None in dims[1:]:
        raise LegalityError(f"{value.name} has shape {value.shape}: only the batch, axis 0, may be symbolic")
    return tuple(1 if dim is None else dim for dim in dims)


def _only_summed(node: ir.Node) -> bool:
    """Return whether this is a product of two ciphertexts whose only reader sums it: it is relinearised after the sum."""
    readers = list(node.outputs[0].consumers()) if node.op_type == "Mul" else []
    constant = any(constant_of(value) is not None for value in node.inputs)
    return len(readers) == 1 and readers[0].op_type == "ReduceSum" and not constant
