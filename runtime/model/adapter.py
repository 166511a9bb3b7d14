"""Define the interface of a model to the trainer (`AdapterModel`), and keep LoRA adapters on disk in PEFT's format."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import peft
import torch
from safetensors.torch import save_file
from transformers.modeling_outputs import CausalLMOutput

from hecompile.checkpoint.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_settings,
    check_targets,
    jsonable,
    plain_settings,
    read_matrices,
    read_settings,
)
from hecompile.errors import InputError
from hecompile.files import found_anywhere, reason_of, replace_directory

_LOG = logging.getLogger(__name__)

BASE_FILE = "base.sha256"
"""The digest of the model that the matrices were trained on. PEFT ignores it; an adapter need not have it."""


class AdapterModel(Protocol):
    """Predict the next token with a frozen base and a trainable LoRA adapter; such a model is also a `torch.nn.Module`.

    Its trainable parameters are the matrices of `adapter_state()`, float32, and nothing else. `train()` and `eval()`
    switch LoRA's dropout.
    """

    @property
    def sequence_buckets(self) -> tuple[int, ...]:
        """Return the sequence lengths S that a batch may have."""

    @property
    def batch_size(self) -> int:
        """Return the most rows B that a batch may have; fewer are as good."""

    @property
    def max_batch_tokens(self) -> int:
        """Return the most tokens B * S that a batch may have, padding included."""

    @property
    def peft_config(self) -> peft.LoraConfig:
        """Return the LoRA settings, fixed when the model was exported."""

    @property
    def digest(self) -> str:
        """Return `head_digest` of the output head, which tells models of one shape apart; encryption does not change it."""

    @property
    def answer_ends(self) -> frozenset[int]:
        """Return the ids of the tokens that end an answer, as the checkpoint names them, besides the tokenizer's eos."""

    @property
    def concurrent(self) -> bool:
        """Say whether it may be called, and differentiated, in several threads at once."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CausalLMOutput:
        """Predict from int64 [B, S] each; padding is on the right, `attention_mask` is 0 there and `labels` -100.

        With labels: returns the loss and no logits. The loss is the cross entropy in nats of the logits at i against
        the label at i + 1, summed over the unmasked labels and divided by `num_items_in_batch`, or by how many they are
        (as transformers does it). The head works on those positions alone.

        Without: returns logits float32 and no loss, at the real tokens where `logits_to_keep` (bool [B, S]) is true, row
        by row: [N, V]; without it [B, S, V], unspecified at padding.

        `generator` draws LoRA's dropout; torch's own if None.
        """

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters themselves, keyed as in PEFT's `adapter_model.safetensors`.

        A key is `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, for example; A is [r, in] and B [out, r].
        """

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the existing parameters; keys and shapes are those of `adapter_state()`."""

    def stats(self) -> dict[str, float]:
        """Return cumulative figures since the model was made.

        They are `client_crypto_seconds`, `worker_seconds`, `wire_seconds`, `bytes_up`, `bytes_down`, `repeated_rows` (sent
        again as a product had wrapped) and `tokens`: the attended tokens that went forward (a token after the last scored
        one of its row need not).
        """


def save_adapter(model: AdapterModel, directory: str | Path, base_model_name_or_path: str | Path | None = None) -> Path:
    """Write the adapter for `PeftModel.from_pretrained(base, directory)`; same adapter, same bytes.

    `base_model_name_or_path` is only recorded, a directory by its absolute path; by default it is the one in
    `model.peft_config`. The directory appears whole or not at all. One that exists is replaced if it holds an adapter, and
    is an `InputError` otherwise.
    """
    directory = Path(directory)
    if directory.exists() and not (directory / CONFIG_FILE).is_file():
        raise InputError(f"{directory} exists and is not an adapter directory; give another place to save the adapter")
    config = model.peft_config.to_dict()
    config["inference_mode"] = True  # as PEFT saves it: a loaded adapter is frozen unless asked otherwise
    base = config["base_model_name_or_path"] if base_model_name_or_path is None else base_model_name_or_path
    config["base_model_name_or_path"] = None if base is None else found_anywhere(base)
    text = json.dumps(config, indent=2, sort_keys=True, default=jsonable) + "\n"
    tensors = {key: value.detach().cpu().contiguous() for key, value in sorted(model.adapter_state().items())}
    directory.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent, so that the move is a rename; with the usual permissions, which mkdtemp itself does not give.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        staged = Path(scratch) / directory.name
        staged.mkdir()
        (staged / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        (staged / BASE_FILE).write_text(model.digest + "\n", encoding="ascii")
        replace_directory(staged, directory)
    return directory


def load_adapter(model: AdapterModel, directory: str | Path) -> None:
    """Copy the values of the adapter in `directory` into the model's parameters.

    Raises `InputError` if files are missing or unreadable, or if the adapter differs from the model in any setting that may
    change what it computes, in its matrices or in their shapes; the message names what differs. Warns of one that was
    trained on another model of the same shape.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    check_settings(directory, settings, plain_settings(model.peft_config))
    state, base = read_matrices(directory), _base_of(directory)
    check_targets(directory, settings, state)
    expected = model.adapter_state()
    _refuse(directory, "has no values for", sorted(expected.keys() - state.keys()))
    _refuse(directory, "has values that the model has no place for:", sorted(state.keys() - expected.keys()))
    for key, value in state.items():
        if value.shape != expected[key].shape:
            shapes = f"{list(value.shape)} but the model's is {list(expected[key].shape)}"
            raise InputError(f"adapter {directory}: the shape of {key} is {shapes}")
    if base is not None and base != model.digest:
        # Not refused: a copy of the model in another precision has another digest, too.
        _LOG.warning(
            "adapter %s was trained on another model (%s): what it answers here may mean nothing",
            directory, settings["base_model_name_or_path"],
        )  # fmt: skip
    model.load_adapter_state({key: value.to(torch.float32) for key, value in state.items()})


def _refuse(directory: Path, what: str, keys: list[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise InputError(f"adapter {directory} {what} {', '.join(keys[:3])}{more}; was it made for another export?")


def _base_of(directory: Path) -> str | None:
    """Return the digest of the model that an adapter was trained on; None where it is not known."""
    try:
        return (directory / BASE_FILE).read_text(encoding="ascii").strip() if (directory / BASE_FILE).is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the adapter in {directory} is damaged: {BASE_FILE}: {reason_of(error)}") from None
