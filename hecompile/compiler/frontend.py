"""Load a Hugging Face checkpoint and export it to a float ONNX graph by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.ir import NAME_SCOPES

SUPPORTED_MODEL_TYPES = ("llama",)
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

    Raises InputError when it cannot be found or read, or when its architecture is not supported.
    """
    local = Path(model_name_or_path)
    if local.exists() and not local.is_dir():
        raise InputError(f"model {model_name_or_path} is a file; give the directory that holds config.json")
    if local.is_dir() and not (local / "config.json").is_file():
        raise InputError(f"model directory {model_name_or_path} has no config.json; is it a save_pretrained directory?")
    try:
        config = transformers.AutoConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the model configuration of {model_name_or_path}: {_first_line(error)}"
        ) from error
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise InputError(
            f"model {model_name_or_path} has architecture {config.model_type!r}; "
            f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise InputError(f"model {model_name_or_path} has biases in its linear layers, which is not supported")
    return config


def load_checkpoint(model_name_or_path: str) -> Checkpoint:
    """Load a Llama checkpoint (local directory or hub id) in float32 for export, with its tokenizer.

    Raises InputError as `load_config` does, and when the weights or the tokenizer cannot be read.
    """
    load_config(model_name_or_path)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        model, info = loaded
    except Exception as error:  # safetensors and torch raise many kinds for a corrupt file
        raise InputError(
            f"cannot load the weights of {model_name_or_path}: {_first_line(error)}; "
            "check that the weight files are complete"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"the weights of {model_name_or_path} lack {len(missing)} tensors, first: {missing[0]}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer of {model_name_or_path}: {_first_line(error)}") from error
    return Checkpoint(model_name_or_path, model.eval(), tokenizer)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
