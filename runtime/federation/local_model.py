"""Open the model that an owner or the server has: in plaintext, or through an encrypted worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hecompile.bundles.client import ClientBundle
from hecompile.checkpoint.loading import load_configuration
from hecompile.checkpoint.tokenizer import load_tokenizer
from hecompile.errors import InputError
from hecompile.files import explain_missing
from hecompile.runtime.client.session import open_session
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.recipe import FederationRecipe, OwnerSection
from hecompile.runtime.model.adapter import AdapterModel, save_adapter
from hecompile.runtime.model.data import Examples, eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import Evaluation, evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import LoraSection, check_lora


@dataclass(frozen=True)
class LocalModel:
    """Hold a model to train or to evaluate, and its tokenizer. Adapters are vectors, float32 `[size]` of the layout."""

    model: AdapterModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model.adapter_state())

    @property
    def pad_token_id(self) -> int:
        return eos_and_pad(self.tokenizer)[1]

    def examples(self, path: Path) -> Examples:
        """Read and tokenise the examples of a file of JSON lines."""
        return load_examples(path, self.tokenizer, self.model.sequence_buckets)

    def evaluate(self, adapter: NDArray[np.float32], examples: Examples) -> Evaluation:
        """Evaluate the adapter on the examples; the model keeps it."""
        self.model.load_adapter_state(self.layout.unflatten(adapter))
        return evaluate(self.model, examples, self.pad_token_id)

    def save(self, adapter: NDArray[np.float32], directory: Path, base: Path) -> Path:
        """Save the adapter in PEFT's format as one for the checkpoint `base`, and return its directory."""
        self.model.load_adapter_state(self.layout.unflatten(adapter))
        return save_adapter(self.model, directory, base)


def plaintext_model(recipe: FederationRecipe, plans: Sequence[Path] = ()) -> LocalModel:
    """Load the recipe's checkpoint with an adapter drawn from its seed, the same for all.

    It takes lines as long, and batches as large, as the recipe says and as any of the client bundles `plans` does. Raises
    InputError without a checkpoint, and where a bundle cannot be opened.
    """
    if not recipe.model.is_dir():
        raise InputError(f"recipe: no model directory {explain_missing(recipe.model)}")
    opened = [ClientBundle.open(path).plan for path in plans]
    buckets = sorted({*recipe.sequence_buckets, *(bucket for plan in opened for bucket in plan.sequence_buckets)})
    batch_size = max(recipe.batch_size, *(plan.batch_size for plan in opened), 1)
    torch.manual_seed(recipe.training.seed)
    model = PlaintextPeftModel.from_pretrained(recipe.model, recipe.lora.config(), tuple(buckets), batch_size)
    return LocalModel(model, load_tokenizer(recipe.model, load_configuration(recipe.model)))


@contextmanager
def owner_model(recipe: FederationRecipe, owner: OwnerSection) -> Iterator[LocalModel]:
    """Open the owner's model: on this machine, or through the encrypted worker that its section names.

    Raises InputError for a plan that was exported with another LoRA.
    """
    place = owner.workplace()
    if place is None:
        yield plaintext_model(recipe)
        return
    with open_session(place) as session:
        check_lora(LoraSection(**recipe.lora.model_dump()), session.model.peft_config)
        yield LocalModel(session.model, session.tokenizer)
