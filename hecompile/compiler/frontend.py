"""Load a Hugging Face checkpoint and export it to a float ONNX graph by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from torch import Tensor

from hecompile.checkpoint.loading import load_configuration, load_hollow, load_model
from hecompile.checkpoint.place import find_checkpoint
from hecompile.checkpoint.rope import LENGTH_DEPENDENT
from hecompile.checkpoint.weights import Weights
from hecompile.compiler.experts import experts_apart
from hecompile.graph.ir import ATTENTION_BIAS, NAME_SCOPES, SLIDING_BIAS, WINDOW
from hecompile.graph.lazy import lazy_tensor

OPSET = 23
_MODEL = "checkpoint."
"""What `_ExportWrapper` puts before the names of the model's tensors."""
_LARGE = 2**16
"""Elements from which a tensor stays in its file."""
_GRAPH_INPUTS = ("input_ids", ATTENTION_BIAS, "position_ids")


@dataclass(frozen=True)
class Checkpoint:
    """Hold a causal language model, its tokenizer and the name that it was loaded by.

    weights: where they are, for a model that has zeros in their place; None where it has them.
    """

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    weights: Weights | None = None


class _ExportWrapper(torch.nn.Module):
    """Fix the calling convention of the exported graph: explicit additive mask and positions, logits only.

    With the masks as inputs the graph holds no mask arithmetic, so padding and packing are decided by the caller.
    """

    def __init__(self, model: transformers.PreTrainedModel, masks: Masks) -> None:
        super().__init__()
        self.checkpoint, self._masks = model, masks

    def forward(
        self,
        input_ids: Tensor,
        attention_bias: Tensor,
        position_ids: Tensor,
        sliding_attention_bias: Tensor | None = None,
    ) -> Tensor:
        given = {"full_attention": attention_bias, "sliding_attention": sliding_attention_bias}
        mask = given if self._masks.by_layer else given["sliding_attention" if self._masks.window else "full_attention"]
        return self.checkpoint(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).logits  # [B, S, vocabulary]


@dataclass(frozen=True)
class Masks:
    """Say which masks a model takes.

    window: how many positions a query sees where attention is windowed, itself included; None where none is.
    by_layer: whether some layers are windowed and others not; else all layers have one mask.
    """

    window: int | None
    by_layer: bool

    @classmethod
    def of(cls, config: transformers.PretrainedConfig) -> Masks:
        """Read them off a configuration."""
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        windowed = window is not None and (kinds is None or "sliding_attention" in kinds)
        return cls(window if windowed else None, windowed and kinds is not None)


def load_config(model_name_or_path: str) -> transformers.PretrainedConfig:
    """Load the configuration of a Llama checkpoint (local directory or hub id).

    Raises InputError when it cannot be found or read, or when it asks for what is not supported.
    """
    return load_configuration(find_checkpoint(model_name_or_path, whole=False))


def load_checkpoint(model_name_or_path: str) -> Checkpoint:
    """Load a Llama checkpoint (local directory or hub id) in float32 for export, with its tokenizer.

    Raises InputError as `load_config` does, and when the weights or the tokenizer cannot be read or do not belong together.
    """
    load_config(model_name_or_path)  # what it refuses need not be fetched
    model, tokenizer = load_model(find_checkpoint(model_name_or_path))
    return Checkpoint(model_name_or_path, model, tokenizer)


def open_checkpoint(model_name_or_path: str) -> Checkpoint:
    """Load a checkpoint as `load_checkpoint` does, but leave the weights where they are.

    Raises InputError as `load_checkpoint` does, but for values, which are looked at when they are read.
    """
    load_config(model_name_or_path)
    return Checkpoint(model_name_or_path, *load_hollow(find_checkpoint(model_name_or_path)))


def fill(exported: ir.Model, checkpoint: Checkpoint) -> None:
    """Put the weights of a checkpoint in the place of the zeros that its graph was exported with.

    Large ones are read from there whenever they are wanted (`hecompile.graph.lazy`).
    """
    if (weights := checkpoint.weights) is None:
        return
    hollow = {name for name, _ in checkpoint.model.named_parameters(remove_duplicate=False)}
    for name, value in exported.graph.initializers.items():
        own, zeros = name.removeprefix(_MODEL), value.const_value
        if zeros is None or (own not in hollow and not weights.has(own)):
            continue
        if zeros.size < _LARGE:
            value.const_value = ir.Tensor(weights.read(own).numpy(), name=name)
        else:
            value.const_value = lazy_tensor(name, zeros.shape.numpy(), np.float32, partial(_array, weights, own))


def _array(weights: Weights, name: str) -> np.ndarray:
    return weights.read(name).numpy()


def export_onnx(model: transformers.PreTrainedModel) -> ir.Model:
    """Export to a float ONNX graph: input_ids [B, S] i64, attention_bias [B, 1, S, S] f32, position_ids [B, S] i64 →
    logits [B, S, vocabulary] f32. Weights are shared with `model`, not copied.

    Where attention is windowed there is a further input, sliding_attention_bias, which carries its window
    (`hecompile.graph.ir.window_of`). Rotary frequencies are those of texts up to `longest_exact`.
    """
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    masks = Masks.of(model.config)
    # Sizes 2 and 3 only stand for "any": the exporter specialises dimensions of size 0 and 1.
    example = [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, dtype=torch.int64)]
    names = list(_GRAPH_INPUTS)
    shapes = [{0: batch, 1: sequence}, {0: batch, 2: sequence, 3: sequence}, {0: batch, 1: sequence}]
    if masks.window is not None:
        names, example, shapes = [*names, SLIDING_BIAS], [*example, torch.zeros(2, 1, 3, 3)], [*shapes, shapes[1]]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _prepared(model):
        warnings.simplefilter("ignore")
        exporter_log = logging.getLogger("torch.onnx")
        level = exporter_log.level
        exporter_log.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _ExportWrapper(model, masks).eval(),
                tuple(example),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=dict(zip(names, shapes, strict=True)),
                opset_version=OPSET,
            )
        finally:
            exporter_log.setLevel(level)
    assert program is not None
    exported = program.model
    exported.producer_name = "hecompile"
    _drop_exporter_notes(exported)
    if masks.window is not None:
        exported.graph.inputs[-1].metadata_props[WINDOW] = str(masks.window)
    return exported


@contextlib.contextmanager
def _prepared(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Put what the exporter cannot follow into another form for as long as it runs."""
    with _fixed_frequencies(model), experts_apart(model):
        yield


@contextlib.contextmanager
def _fixed_frequencies(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Keep the frequencies that rotary embeddings begin with, where their type looks at the length of the text.

    They change above a length that no plan crosses (`hecompile.checkpoint.rope.longest_exact`).
    """
    rotary: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) in LENGTH_DEPENDENT]
    types = [module.rope_type for module in rotary]
    for module in rotary:
        module.inv_freq.copy_(module.original_inv_freq)
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, kind in zip(rotary, types, strict=True):
            module.rope_type = kind


def _drop_exporter_notes(model: ir.Model) -> None:
    """Drop all of the exporter's metadata but the name scopes.

    Its stack traces hold paths of this machine: they are private, and equal inputs would give unequal bytes elsewhere.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
        for output in node.outputs:
            output.metadata_props.clear()
