"""Offer what others build on: export a model, open a plan, offload a model, train, and see what it cost.

The names of `hecompile.__all__` are these, and stay. Everything else in the package may change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import CompileOptions
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import Costs
from hecompile.runtime.client.session import open_session
from hecompile.runtime.federation.launch import check_output, run_processes
from hecompile.runtime.federation.recipe import load_federation
from hecompile.runtime.federation.records import RoundRecord
from hecompile.runtime.inference.answers import Prompt, Reply, infer
from hecompile.runtime.inference.generation import Sampling
from hecompile.runtime.model.adapter import load_adapter
from hecompile.runtime.offload import Offload, offload
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.recipes.workplace import make_workplace
from hecompile.runtime.training.train import TrainingResult, run_training

__all__ = [
    "Build",
    "CompileOptions",
    "Costs",
    "Lora",
    "Offload",
    "PrivacySpent",
    "Reply",
    "RoundRecord",
    "Session",
    "TrainingResult",
    "export",
    "federate",
    "load",
    "offload",
    "privacy_spent",
    "train",
]

Lora = AttachLora
"""LoRA's settings in `CompileOptions.lora`, under PEFT's names."""


@dataclass(frozen=True)
class Build:
    """Say where the halves of an export are. client: stays with the data owner. worker: goes to the worker."""

    client: Path
    worker: Path
    plan_id: str


def export(
    checkpoint: str | Path,
    out: str | Path,
    options: CompileOptions | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Build:
    """Compile a checkpoint, as `hecompile export` does.

    Args:
        checkpoint: a directory of `save_pretrained`, a GGUF file, or a hub id.
        out: the directory to make; an earlier build there is replaced.
        options: of the plan; the command's defaults if None.
        progress: called with a phase's name, how much of it is done, and of how much.

    Raises:
        HecompileError: bad input, named; `out` is as it was.
    """
    plan_id = compile_checkpoint(str(checkpoint), Path(out), options or CompileOptions(), progress)
    return Build(Path(out) / CLIENT, Path(out) / WORKER, plan_id)


class Session:
    """Hold an open plan: a model whose frozen linears are on the worker, and its tokenizer. Use it in a `with` statement.

    Attributes:
        model: a torch module; its parameters are the LoRA matrices.
        tokenizer: the one that travels with the plan.

    `load` makes one.
    """

    def __init__(self, stack: ExitStack, settings: Mapping[str, Any]) -> None:
        self._stack = stack
        self._open = stack.enter_context(open_session(make_workplace(dict(settings))))

    @property
    def model(self) -> EncryptedCausalLM:
        return self._open.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._open.tokenizer

    @property
    def costs(self) -> Costs:
        """Return what was spent up to now: seconds by who spent them, and bytes on the wire."""
        return replace(self._open.model.products.costs)

    def load_adapter(self, directory: str | Path) -> None:
        """Read a PEFT adapter. Raises InputError for one that does not fit the plan."""
        load_adapter(self._open.model, Path(directory))

    def answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Reply]:
        """Answer prompts, several at a time, as `hecompile infer` does.

        Raises:
            InputError: a prompt is too long, or a number out of range.
            WorkerError, VerificationError: of the worker.
        """
        asked = [Prompt(text, where=f"prompt {number}") for number, text in enumerate(prompts)]
        return infer(self._open, asked, max_new_tokens, Sampling(temperature, top_p, seed))

    def close(self) -> None:
        """Close the connection to the worker."""
        self._stack.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load(
    plan: str | Path,
    worker: str | Sequence[str] = "inprocess",
    *,
    worker_bundle: str | Path | None = None,
    engine: str | None = None,
    connection: Mapping[str, Any] | None = None,
) -> Session:
    """Open a plan over its worker. The arguments are those of `offload` after the model.

    Raises:
        InputError: an argument is wrong, or the plan cannot be read.
        WorkerError: no worker of the plan answers.
    """
    settings: dict[str, Any] = {"model": plan, "worker": worker if isinstance(worker, str) else list(worker)}
    given = {"worker_bundle": worker_bundle, "engine": engine, "connection": connection}
    return Session(ExitStack(), settings | {name: value for name, value in given.items() if value is not None})


def train(recipe: str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> TrainingResult:
    """Train by a recipe, as `hecompile train` does. overrides: as on the command line, `training.max_steps=10`.

    Raises:
        HecompileError: bad input, named, or a worker that fails or lies; the last checkpoint is kept.
    """
    loaded = load_recipe(recipe, overrides)
    with open_session(loaded) as session:
        return run_training(session.model, session.tokenizer, loaded, resume=resume)


@dataclass(frozen=True)
class PrivacySpent:
    """Say what all releases about a dataset have spent.

    Attributes:
        epsilon: with the samples kept secret; infinite where a release had no noise.
        epsilon_of_known_samples: against who knows which examples each step drew.
        delta: at which both hold.
        releases: how many there were.
    """

    epsilon: float
    epsilon_of_known_samples: float
    delta: float
    releases: int


def privacy_spent(ledger: str | Path) -> PrivacySpent:
    """Read a privacy ledger (by default TRAIN_FILE.ledger), as `hecompile privacy` does.

    Raises:
        InputError: there is none.
        PrivacyError: it is damaged.
    """
    subject = Subject.of_ledger(ledger)
    with PrivacyLedger(Path(ledger), subject) as opened:
        history = opened.history
    unsampled = [(Mechanism(mechanism.noise_multiplier, 1.0), count) for mechanism, count in history]
    releases = sum(count for _, count in history)
    return PrivacySpent(
        spent_epsilon(history, subject.delta), spent_epsilon(unsampled, subject.delta), subject.delta, releases
    )


def federate(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    *,
    resume: bool = False,
) -> list[RoundRecord]:
    """Train one adapter for several owners, each a process of its own on this machine, as `hecompile federate` does.

    recipe, overrides: of a federation (docs/federation.md). say: called with what happens. The PEFT adapter is then in
    `training.output_dir`/adapter; the result has a record per round.

    Raises:
        InputError: bad input, named.
        FederationError: the reason why it failed; the rounds before are kept.
    """
    check_output(load_federation(recipe, overrides), resume)
    return run_processes(Path(recipe), overrides, say, resume=resume)
