"""Load a Hugging Face checkpoint and export it to a float ONNX graph by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass

import onnx_ir as ir
import torch
import transformers
from torch import Tensor

from hecompile.checkpoint.loading import load_configuration, load_model
from hecompile.checkpoint.place import find_checkpoint
from hecompile.graph.ir import NAME_SCOPES

OPSET = 23
_GRAPH_INPUTS = ("input_ids", "attention_bias", "position_ids")


@dataclass(frozen=True)
class Checkpoint:
    """Hold a causal language model, its tokenizer and the name that it was loaded by."""

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


class _ExportWrapper(torch.nn.Module):
    """Fix the calling convention of the exported graph: explicit additive mask and positions, logits only.

    With the mask as an input the graph holds no mask arithmetic, so padding and packing are decided by the caller.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.checkpoint = model

    def forward(self, input_ids: Tensor, attention_bias: Tensor, position_ids: Tensor) -> Tensor:
        return self.checkpoint(
            input_ids=input_ids, attention_mask=attention_bias, position_ids=position_ids, use_cache=False
        ).logits  # [B, S, vocabulary]


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


def export_onnx(model: transformers.PreTrainedModel) -> ir.Model:
    """Export to a float ONNX graph: input_ids [B, S] i64, attention_bias [B, 1, S, S] f32, position_ids [B, S] i64 →
    logits [B, S, vocabulary] f32. Weights are shared with `model`, not copied."""
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    # Sizes 2 and 3 only stand for "any": the exporter specialises dimensions of size 0 and 1.
    example = (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, dtype=torch.int64))
    shapes = ({0: batch, 1: sequence}, {0: batch, 2: sequence, 3: sequence}, {0: batch, 1: sequence})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exporter_log = logging.getLogger("torch.onnx")
        level = exporter_log.level
        exporter_log.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _ExportWrapper(model).eval(),
                example,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(_GRAPH_INPUTS),
                output_names=["logits"],
                dynamic_shapes=dict(zip(_GRAPH_INPUTS, shapes, strict=True)),
                opset_version=OPSET,
            )
        finally:
            exporter_log.setLevel(level)
    assert program is not None
    exported = program.model
    exported.producer_name = "hecompile"
    _drop_exporter_notes(exported)
    return exported


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
