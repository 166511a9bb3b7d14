"""Put a trainable low-rank branch beside each targeted Linear.

    y = Linear(x, W)   →   y = Add(Linear(x, W), Lora(x, A, B; scaling = lora_alpha / r, dropout = lora_dropout))

A [r, in] and B [out, r] become graph inputs named as in PEFT's adapter file, so that the compiled plan holds no adapter and
any PEFT adapter of the same shape can be run with it (Hu et al., arXiv 2106.09685; names and semantics of PEFT's
LoraConfig, whose own rule says which modules are meant). Exact where B = 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
import peft

from hecompile.checkpoint.adapter import is_target
from hecompile.checkpoint.families import LLAMA_LINEARS, all_linears
from hecompile.errors import InputError
from hecompile.graph.ir import DOMAIN, ORIGIN, module_path, nodes_of_type, replace_node


@dataclass(frozen=True)
class AttachLora(ir.passes.InPlacePass):
    """Add LoRA branches; options as in PEFT's LoraConfig.

    layers_to_transform: indices of the layers that get an adapter, counted from 0; None for all. layers_pattern: names of
    the list of layers, where a model has several. Raises InputError for a target or a layer that no Linear of the graph has,
    or options out of range.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = LLAMA_LINEARS
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"LoRA r must be at least 1, got {self.r}")
        if not math.isfinite(self.lora_alpha):
            raise InputError(f"LoRA alpha must be finite, got {self.lora_alpha}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise InputError(f"LoRA dropout must be in [0, 1), got {self.lora_dropout}")
        if not self.target_modules:
            raise InputError(f"target_modules is empty; give one or more of {', '.join(all_linears())}")
        unknown = sorted(set(self.target_modules) - set(all_linears()))
        if unknown:
            raise InputError(f"target module {unknown[0]!r} does not exist; choose from {', '.join(all_linears())}")
        self._check_layers()

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if layers is None:
            if pattern is not None:
                raise InputError("layers_pattern says where layers_to_transform counts: give that as well, or neither")
            return
        if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise InputError(f"layers_to_transform must be different indices from 0 on, got {list(layers)}")
        if pattern is not None and not (pattern and all(name.isidentifier() for name in pattern)):
            raise InputError(f"layers_pattern must be names of lists of layers, such as layers or h, got {list(pattern)}")

    @property
    def peft_config(self) -> peft.LoraConfig:
        """Return the options as PEFT's own."""
        return peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number and declares an int
            lora_dropout=self.lora_dropout,
            target_modules=list(self.target_modules),
            layers_to_transform=None if self.layers_to_transform is None else list(self.layers_to_transform),
            layers_pattern=None if self.layers_pattern is None else list(self.layers_pattern),
            task_type="CAUSAL_LM",
        )

    def adapts(self, path: str) -> bool:
        """Tell whether the linear at the module path `path` gets an adapter, by PEFT's own rule."""
        return path.rpartition(".")[2] in self.target_modules and is_target(self.peft_config, path)

    def check_paths(self, paths: Iterable[str]) -> None:
        """Raise InputError where a target module, or a layer, is none of those with the module paths `paths`."""
        linears = [path for path in paths if path.rpartition(".")[2] in self.target_modules]
        for target in self.target_modules:
            if not any(path.endswith(f".{target}") for path in linears):
                raise InputError(f"target module {target!r} does not exist in this model")
        where = f" under {', '.join(self.layers_pattern)} (layers_pattern)" if self.layers_pattern else ""
        for layer in self.layers_to_transform or ():
            alone = dataclasses.replace(self, layers_to_transform=(layer,)).peft_config
            if not any(is_target(alone, path) for path in linears):
                raise InputError(
                    f"layers_to_transform: layer {layer} does not exist in this model{where}, or has no target module"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        linears = [n for n in nodes_of_type(model, "Linear") if module_path(n).rpartition(".")[2] in self.target_modules]
        self.check_paths(map(module_path, linears))
        config = self.peft_config
        targets = [node for node in linears if is_target(config, module_path(node))]
        for node in targets:
            self._attach(model.graph, node)
        return ir.passes.PassResult(model, bool(targets))

    def _attach(self, graph: ir.Graph, node: ir.Node) -> None:
        path = module_path(node)
        x, weight = node.inputs
        assert x is not None and weight is not None and weight.shape is not None
        out_features, in_features = weight.shape
        lora_a = _trainable(graph, lora_name(path, "lora_A"), (self.r, in_features))
        lora_b = _trainable(graph, lora_name(path, "lora_B"), (out_features, self.r))
        frozen = ir.node("Linear", [x, weight], domain=DOMAIN, metadata_props={ORIGIN: path})
        attributes = {"scaling": float(self.lora_alpha / self.r), "dropout": float(self.lora_dropout)}
        branch = ir.node("Lora", [x, lora_a, lora_b], attributes, domain=DOMAIN, metadata_props={ORIGIN: path})
        total = ir.node("Add", [frozen.outputs[0], branch.outputs[0]], metadata_props={ORIGIN: path})
        for part, suffix in ((frozen, "frozen"), (branch, "lora")):
            part.outputs[0].name = f"{path}.{suffix}"
            part.outputs[0].type, part.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        replace_node(node, [frozen, branch, total], total.outputs)


def lora_name(path: str, matrix: str) -> str:
    """Return the key of a LoRA matrix (`lora_A` or `lora_B`) in PEFT's adapter_model.safetensors."""
    return f"base_model.model.{path}.{matrix}.weight"


def _trainable(graph: ir.Graph, name: str, shape: tuple[int | ir.SymbolicDim, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value
