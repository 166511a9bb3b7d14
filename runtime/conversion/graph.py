"""Train the graph that the compiler's own passes make of a checkpoint, its float initializers being the parameters."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hecompile.compiler.frontend import Checkpoint, export_onnx
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import LegalityError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import constant_of, module_path
from hecompile.runtime.conversion.ranges import RangeObserver
from hecompile.runtime.conversion.recipe import ConversionRecipe

_WEIGHTED = {"Linear": 1, "RMSNorm": 1, "PolynomialRMSNorm": 1, "Gather": 0}
"""The input of an operator that is a weight of the module which the node came from."""


class TrainableGraph:
    """Hold the graph of a checkpoint with the polynomials of `options`, and its weights by their names in the checkpoint.

    Polynomials have the domains that `options` give; no calibration is run, for the ranges are measured while it trains. The
    weights are copies, float32; tied ones appear once, under the name of the embedding.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: PolynomialOptions,
        recipe: ConversionRecipe,
        exported: ir.Model | None = None,
    ) -> None:
        """Build the graph with the weights that the checkpoint has now.

        exported: the graph that `export_onnx` made of this checkpoint before, to save another export; it is not changed.
        """
        model = approximate(export_onnx(checkpoint.model) if exported is None else exported.clone(), options)
        self.model = model
        self._interpreter = Interpreter(model)
        self._names = _weight_names(model)  # initializer → checkpoint
        own = dict(checkpoint.model.named_parameters())
        self.weights = {
            checkpoint_name: torch.nn.Parameter(own[checkpoint_name].detach().clone())
            for checkpoint_name in self._names.values()
        }
        self.observer = RangeObserver(model, recipe)

    def logits(self, tokens: Tensor, observer: RangeObserver | None = None) -> Tensor:
        """Return float32 [B, S, V] for tokens int64 [B, S] without padding; `observer` measures the run."""
        inputs = graph_inputs(tokens, torch.ones_like(tokens))
        parameters = {name: self.weights[checkpoint_name] for name, checkpoint_name in self._names.items()}
        observe = None if observer is None else observer.start(inputs)
        return self._interpreter.run(inputs, observer=observe, parameters=parameters)["logits"]

    def loss(self, tokens: Tensor, observer: RangeObserver | None = None) -> Tensor:
        """Return the mean cross entropy of every next token, in nats."""
        logits = self.logits(tokens, observer)
        return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def heldout_loss(self, rows: Tensor, batch_size: int) -> float:
        """Return the mean of `loss` over rows [N, S]."""
        with torch.no_grad():
            total = sum(float(self.loss(batch)) * len(batch) for batch in rows.split(batch_size))
        return total / len(rows)


def _weight_names(model: ir.Model) -> dict[str, str]:
    """Map initializers to names in the checkpoint, by the module that the node reading them came from.

    Raises LegalityError for a float matrix of the graph that no such node reads: it would silently stay untrained.
    """
    names: dict[str, str] = {}
    for node in model.graph:
        index = _WEIGHTED.get(node.op_type)
        if index is None or index >= len(node.inputs):
            continue
        value = node.inputs[index]
        if value is not None and value.is_initializer() and (path := module_path(node)):
            names.setdefault(str(value.name), f"{path}.weight")
    for name, value in model.graph.initializers.items():
        array = constant_of(value)
        large = array is not None and array.dtype.kind == "f" and array.ndim == 2 and min(array.shape) > 1
        if large and name not in names:
            raise LegalityError(f"the graph's constant {name} {array.shape} belongs to no weight of the checkpoint")  # type: ignore[union-attr]
    return names


def write_back(checkpoint: Checkpoint, weights: dict[str, torch.nn.Parameter]) -> None:
    """Copy trained weights into the checkpoint.

    Raises LegalityError for a name or shape that it does not have, and when one of its parameters is left out.
    """
    own = dict(checkpoint.model.named_parameters())  # a tied parameter once, under the embedding's name
    if own.keys() != weights.keys():
        raise LegalityError(f"trained and loaded weights differ in {', '.join(sorted(own.keys() ^ weights.keys())[:3])}")
    with torch.no_grad():
        for name, value in weights.items():
            if own[name].shape != value.shape:
                raise LegalityError(f"{name} has shape {tuple(own[name].shape)}, trained {tuple(value.shape)}")
            own[name].copy_(value)
