"""Run the integer weights of a plan on real numbers, without encryption: what is left of its error is their rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.training.real_model import BATCH_SIZE, BUCKET
from hecompile.compiler.options import CompileOptions, WeightBits
from hecompile.compiler.pipeline import approximate
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.operators import Context
from hecompile.he.parameters import LinearParameters
from hecompile.inspection.linear import circuits_without_gradient, predicted_traffic
from hecompile.passes.approximation.calibrate import Calibrate, Samples
from hecompile.passes.offload.annotate_secrecy import AnnotateSecrecy
from hecompile.passes.offload.place import Place
from hecompile.passes.offload.rotate import Rotate
from hecompile.passes.offload.split import Split
from hecompile.passes.offload.stack_projections import StackProjections
from hecompile.plan.circuits import SplitPlan, weight_bits
from hecompile.plan.costs import CostModel
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM


def calibrated(exported: ir.Model, samples: Samples, rotated: bool, feedback: bool) -> ir.Model:
    """Lower a copy of an export up to calibration; `feedback`: with the samples that rounding needs."""
    model = CompileOptions().lora(approximate(exported.clone())).model
    model = Calibrate(samples, feedback)(model).model
    return Rotate()(model).model if rotated else model


def split_plan(model: ir.Model, bits: WeightBits, budget: float = 0.0) -> SplitPlan:
    """Lower a calibrated graph (consumed) to a split plan."""
    options = CompileOptions(weight_bits=bits, error_budget=budget, batch_size=BATCH_SIZE, sequence_buckets=(BUCKET,))
    if bits == "auto":
        model = options.select_weight_bits()(model).model
    for transform in (options.quantize(), AnnotateSecrecy(), Place(), StackProjections(), options.select_parameters()):
        model = transform(model).model
    return Split()(model)


class RoundedModel(torch.nn.Module):
    """Run a split plan in float32 with its integer weights, as far as a benchmark needs an `AdapterModel`."""

    def __init__(self, plan: SplitPlan) -> None:
        super().__init__()
        self._interpreter = Interpreter(plan.client)
        self._weights = {circuit.name: torch.from_numpy(circuit.weight) for circuit in plan.circuits}
        inputs = [value for value in plan.client.graph.inputs if ".lora_" in str(value.name)]
        self._adapter = {str(v.name): torch.nn.Parameter(torch.zeros(v.shape.numpy())) for v in inputs if v.shape}

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        """Return the LoRA matrices by name."""
        return self._adapter

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy LoRA matrices."""
        with torch.no_grad():
            for name, value in state.items():
                self._adapter[name].copy_(value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput:
        """Return the loss, its mean over the labelled tokens."""

        inputs = graph_inputs(input_ids, attention_mask) | self._adapter
        logits = self._interpreter.run(inputs, Context(remote=self.product))["logits"]  # [B, S, V]
        return CausalLMOutput(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def product(self, linear: str, x: Tensor, scale: Tensor) -> Tensor:
        """Compute a product as a worker and its client do, differentiable in x."""
        return x @ self._weights[f"{linear}.forward"].float() * scale


@dataclass(frozen=True)
class MeasuredPlan:
    """Hold a model that a plan makes, and what the plan costs."""

    model: RoundedModel | EncryptedCausalLM
    circuits: dict[str, LinearParameters]
    bits: dict[str, int]
    skipped: frozenset[str]

    @classmethod
    def rounded(cls, plan: SplitPlan) -> MeasuredPlan:
        """Take a split plan, to be run without encryption."""
        circuits = {circuit.name: circuit.parameters for circuit in plan.circuits}
        bits = {circuit.name: weight_bits(circuit.weight) for circuit in plan.circuits}
        return cls(RoundedModel(plan), circuits, bits, circuits_without_gradient(plan.client))

    @classmethod
    def encrypted(cls, model: EncryptedCausalLM) -> MeasuredPlan:
        """Take an opened plan."""
        bundle = model.bundle
        bits = {name: bundle.plan.bits_of(name) for name in bundle.circuits}
        return cls(model, bundle.circuits, bits, circuits_without_gradient(bundle.graph()))

    @property
    def two_byte_share(self) -> float:
        """Return the share of the weights that takes two bytes."""
        sizes = {name: p.in_features * p.out_features for name, p in self.circuits.items()}
        return sum(size for name, size in sizes.items() if self.bits[name] > 8) / sum(sizes.values())

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes on the wire of a training step, both ways, per token."""
        return predicted_traffic(self.circuits, self.skipped).total

    @property
    def worker_seconds_per_token(self) -> float:
        """Return what the cost model predicts of a training step."""
        used = {name: p for name, p in self.circuits.items() if name not in self.skipped}
        return sum(CostModel().worker(p, 1, 1 if self.bits[name] <= 8 else 2) for name, p in used.items())
