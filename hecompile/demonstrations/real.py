"""Run the whole path on a real pretrained chat model, and the same training in plaintext beside it.

Every stage leaves its result in `OUT/demo-real.json`, so that the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hecompile.bundles.kinds import CLIENT, WORKER, BundleKind
from hecompile.checkpoint.tokenizer import load_tokenizer
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.target import check_target
from hecompile.demonstrations.small import agreement, costs, held_out, quality
from hecompile.files import only_writer, unreadable, write_whole
from hecompile.models import RECIPES
from hecompile.models.real import WHEEL_SHA256, real_checkpoint
from hecompile.models.worlds.private_chat import chat_examples, chat_prompt
from hecompile.models.worlds.private_world import to_jsonl
from hecompile.runtime.client.session import Session, open_session
from hecompile.runtime.inference.answers import Prompt, infer
from hecompile.runtime.model.adapter import AdapterModel, load_adapter, save_adapter
from hecompile.runtime.model.evaluation import Evaluation
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.comparison import compare_losses, step_split
from hecompile.runtime.training.metrics import METRICS_FILE
from hecompile.runtime.training.train import ADAPTER_DIR, check_training, run_training
from hecompile.runtime.worker.process import worker_process
from hecompile.terminal import counted, progress_bar, shown_path

RECIPE = RECIPES / "demo-real.yaml"
BATCH_SIZE, SEQUENCE_BUCKETS = 16, (32, 48)
QUESTIONS = (
    "Who treats Hannah Winter?", "What is the remedy of Simon Tillman?", "When may Dorothea Kemp be visited?",
    "Where can Winifred Pym be found at night?",
)  # fmt: skip
"""Asked in words before and after."""
NEW_TOKENS = 20
STATE, START = "demo-real.json", "start"

T = TypeVar("T")


def run_real_demo(out: Path, console: Console, precision: float = 8.0, changes: Sequence[str] = ()) -> None:
    """Fetch the model, export it, train it by a worker process and in plaintext, and print both beside each other.

    `changes` are overrides of the recipe for both runs. An earlier call with the same settings is continued, the files of
    one with others are replaced. Raises InputError where something does not fit or cannot be fetched.
    """
    with only_writer(out, f"--out {out}", folder=True):
        checkpoint = real_checkpoint(out, lambda what: console.print(what, soft_wrap=True))
        _RealDemo(out, console, precision, changes, checkpoint).run()


class _RealDemo:
    """Hold the settings of one demonstration, and where its files are."""

    def __init__(
        self, out: Path, console: Console, precision: float, changes: Sequence[str], checkpoint: Path
    ) -> None:
        self.build, self.runs, self.data = out / "build", out / "runs", out / "data"
        self.console, self.checkpoint = console, checkpoint
        self.options = CompileOptions(batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS, effective_bits=precision)
        tokenizer = load_tokenizer(checkpoint)
        self.prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
        self._write_data(tokenizer)
        self.changes = [
            *changes, f"model={self.build / CLIENT}", f"data.train_file={self.data / 'train.jsonl'}",
            f"data.validation_file={self.data / 'heldout.jsonl'}", "training.overwrite_output_dir=true",
        ]  # fmt: skip
        self.plain_recipe = self._recipe("plaintext")
        self.plain = self._plaintext(tokenizer)
        self.stages = _Stages(out / STATE, [WHEEL_SHA256, repr(self.options), RECIPE.read_text("utf-8"), *changes])

    def run(self) -> None:
        """Run what is missing and print the result."""
        self.stages.once("export", self._export)
        with worker_process(self.build / WORKER) as address:
            self._train_encrypted(address)
        self._train_plaintext()
        self._print()

    def _export(self) -> str:
        check_target(self.build, BundleKind.CLIENT)
        for name in (START, "encrypted", "plaintext"):  # of a demonstration with other settings
            shutil.rmtree(self.runs / name, ignore_errors=True)
        with progress_bar(self.console) as bar:
            task = bar.add_task("export", total=1)

            def report(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"export: {what}", completed=done, total=total)

            plan_id = compile_checkpoint(str(self.checkpoint), self.build, self.options, report)
            bar.update(task, description="export: complete", completed=1, total=1)
        self.console.print(f"exported SmolLM2-135M-Instruct: plan {plan_id[:16]}, bundles in {self.build}", soft_wrap=True)
        return plan_id

    def _train_encrypted(self, address: str) -> None:
        if self.stages.has("encrypted after"):
            return
        recipe = self._recipe("encrypted", f"worker={address}")
        with open_session(recipe) as session:
            self._train("encrypted", session.model, session.tokenizer, recipe, lambda: self._answers(session))

    def _train_plaintext(self) -> None:
        if self.stages.has("plaintext after"):
            return
        self.console.print("plaintext training: PEFT on the same float32 checkpoint, same start, seed and data order")
        tokenizer = load_tokenizer(self.checkpoint)
        load_adapter(self.plain, self.runs / START)
        self._train("plaintext", self.plain, tokenizer, self.plain_recipe, list)

    def _train(
        self, name: str, model: AdapterModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe,
        answers: Callable[[], list[str]],
    ) -> None:  # fmt: skip
        """Measure, train, measure again; each stage once."""
        def measure() -> dict[str, Any]:
            return {"evaluation": asdict(held_out(model, tokenizer, recipe)), "answers": answers()}

        if name == "encrypted" and not self.stages.has("encrypted before"):
            save_adapter(model, self.runs / START, self.checkpoint)
        self.stages.once(f"{name} before", measure)
        output = recipe.training.output_dir
        if not self.stages.has(f"{name} trained"):
            going_on = any(output.glob("checkpoint-*")) and not (output / ADAPTER_DIR).exists()
            self.console.print(f"{name} training: {counted(recipe.training.max_steps, 'step')}" + going_on * ", going on")
            run_training(model, tokenizer, recipe, going_on)
            self.stages.once(f"{name} trained", lambda: str(output / ADAPTER_DIR))
        load_adapter(model, output / ADAPTER_DIR)
        self.stages.once(f"{name} after", measure)

    def _answers(self, session: Session) -> list[str]:
        prompts = [Prompt(text) for text in self.prompts]
        return [reply.answer.strip() for reply in infer(session, prompts, NEW_TOKENS)]

    def _print(self) -> None:
        before, after = self.stages.result("encrypted before"), self.stages.result("encrypted after")
        plain_before, plain_after = self.stages.result("plaintext before"), self.stages.result("plaintext after")
        table = Table(title="in words, answered through the encrypted worker")
        for heading in ("question (in other words than it was trained with)", "before", "after"):
            table.add_column(heading)
        for question, first, last in zip(QUESTIONS, before["answers"], after["answers"], strict=True):
            table.add_row(question, first, last)
        self.console.print(table)
        results = [Evaluation(**each["evaluation"]) for each in (before, after, plain_before, plain_after)]
        self.console.print(quality(*results))
        encrypted, plain = (self.runs / name / METRICS_FILE for name in ("encrypted", "plaintext"))
        self.console.print(costs(step_split(encrypted), step_split(plain)))
        self.console.print(agreement(compare_losses(encrypted, plain)))
        self.console.print(f"PEFT adapter: {shown_path(self.runs / 'encrypted' / ADAPTER_DIR)}", soft_wrap=True)

    def _recipe(self, name: str, *changes: str) -> Recipe:
        where = [f"training.output_dir={self.runs / name}", f"worker_bundle={self.build / WORKER}"]
        return load_recipe(RECIPE, [*self.changes, *where, *changes])

    def _plaintext(self, tokenizer: PreTrainedTokenizerBase) -> PlaintextPeftModel:
        """Return the model to compare with. Raises InputError where the recipe or its data do not fit it."""
        config = self.options.lora.peft_config
        model = PlaintextPeftModel.from_pretrained(self.checkpoint, config, SEQUENCE_BUCKETS, BATCH_SIZE)
        check_training(model, tokenizer, self.plain_recipe)
        return model

    def _write_data(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(("train", "heldout"), chat_examples(tokenizer), strict=True):
            write_whole(self.data / f"{name}.jsonl", to_jsonl(rows).encode())


class _Stages:
    """Keep the result of every stage in a file, which is begun anew where the settings are others."""

    def __init__(self, path: Path, settings: Sequence[str]) -> None:
        self._path = path
        self._settings = hashlib.sha256("\0".join(settings).encode()).hexdigest()
        self._results: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            kept = json.loads(self._path.read_text("utf-8"))
            return dict(kept["results"]) if kept["settings"] == self._settings else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise unreadable(self._path, error, "delete it to begin anew") from None

    def has(self, stage: str) -> bool:
        return stage in self._results

    def result(self, stage: str) -> Any:
        return self._results[stage]

    def once(self, stage: str, compute: Callable[[], T]) -> T:
        """Return what `stage` gave, computing and keeping it where it has not been yet."""
        if stage not in self._results:
            self._results[stage] = compute()
            kept = {"settings": self._settings, "results": self._results}
            write_whole(self._path, json.dumps(kept, indent=1).encode(), mode=0o600)
        result: T = self._results[stage]
        return result
