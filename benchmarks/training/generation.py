"""Measure generation through the encrypted worker with and without the key-value cache, beside Hugging Face's answers.

Trains the demo's adapter first: about two minutes in all on two cores.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import table
from benchmarks.training.builds import PRECISION
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.demonstrations.small import BATCH_SIZE, RECIPE, SEQUENCE_BUCKETS
from hecompile.models import PRIVATE_HELDOUT, TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.session import Session, open_session
from hecompile.runtime.inference.generation import CachedSteps, PrefixSteps, generate
from hecompile.runtime.model.adapter import load_adapter
from hecompile.runtime.model.data import encode_prompt, eos_and_pad
from hecompile.runtime.model.tokens import TextEncoder
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.train import run_training

NEW_TOKENS, ANSWER_TOKENS = 12, 16
AT_ONCE = (1, 4, 16)
REPEATS = 3
PROSE = """\
## Generation

The small Llama with the adapter of the demo ({steps} encrypted steps), 10-bit weights, precision {precision:g}, worker in
process, {prompts} held-out prompts of {shortest} to {longest} tokens, {new} new tokens each, greedy; *at once* is how many
answers are written together. Without the cache every token computes its whole prefix again. *kB per token*: whole frames
up and down over the new tokens, prompts included; one token forward is {forward:.1f} kB by the plan's byte counts. Medians
of {repeats} runs in turn.
"""
AGREEMENT = """\
Greedy answers to all {count} held-out prompts, to their end of at most {limit} tokens: {same} are token for token those of
Hugging Face's `generate` on the float32 checkpoint with the same adapter in PEFT; {right} are the right answer, as are
{theirs} of Hugging Face's. With the cache and without it {cached} of {count} are the same (encryption noise is drawn
afresh in each).
"""


def run(quick: bool) -> str:
    """Return Markdown: speed and bytes by answers at once, then the agreement with Hugging Face."""
    steps = 2 if quick else load_recipe(RECIPE, ["worker=tcp://127.0.0.1:1"]).training.max_steps
    repeats = 1 if quick else REPEATS
    records = [json.loads(line) for line in PRIVATE_HELDOUT.read_text("utf-8").splitlines() if line]
    records = records[: 4 if quick else None]
    with tempfile.TemporaryDirectory() as scratch:
        recipe = _compile(Path(scratch), steps)
        with open_session(recipe) as session:
            adapter = run_training(session.model, session.tokenizer, recipe).adapter_dir
            load_adapter(session.model, adapter)
            prompts = [encode_prompt(session.tokenizer, record["prompt"]) for record in records]
            some = prompts[:16]
            rows = _speed(session, some, repeats)
            agreement = _agreement(session, adapter, prompts, records)
    prose = PROSE.format(
        steps=steps, precision=PRECISION, prompts=len(some), shortest=min(map(len, some)), longest=max(map(len, some)),
        new=NEW_TOKENS, repeats=repeats, forward=forward_bytes(session.bundle) / 1e3,
    )  # fmt: skip
    headings = ["at once", "cache", "tokens/s", "client cryptography, s", "worker, s", "tokens computed"]
    return "\n\n".join([prose, table([*headings, "kB per token"], rows), agreement])


def _compile(scratch: Path, steps: int) -> Recipe:
    """Compile the small Llama, and return the demo's recipe for it."""
    build = scratch / "build"
    options = CompileOptions(
        batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS, effective_bits=PRECISION, weight_bits=10
    )
    compile_checkpoint(str(TINY_LLAMA), build, options)
    changes = [f"model={build / CLIENT}", f"worker_bundle={build / WORKER}", f"training.max_steps={steps}"]
    changes += [f"training.output_dir={scratch / 'run'}", "training.save_strategy=no"]
    changes += ["training.disable_tqdm=true", f"training.warmup_steps={min(10, steps - 1)}"]
    return load_recipe(RECIPE, changes)


def _speed(session: Session, prompts: list[list[int]], repeats: int) -> list[list[object]]:
    """Measure a row for each number of answers at once, with the cache and without it: medians of runs in turn."""
    settings = [(n, cached) for n in AT_ONCE if n <= len(prompts) for cached in (True, False)]
    runs = [[_row(session, prompts, *setting) for setting in settings] for _ in range(repeats)]
    return [_median(list(of_one_setting)) for of_one_setting in zip(*runs, strict=True)]


def forward_bytes(bundle: ClientBundle) -> int:
    """Count the payload bytes of one token forward through every circuit, up and down."""
    circuits = [parameters for name, parameters in bundle.circuits.items() if name.endswith(".forward")]
    return sum(p.bytes_up(1) + p.bytes_down(1) for p in circuits)


def _median(runs: list[list[object]]) -> list[object]:
    """Return the median of each cell that is a float; the others are the same in every run."""
    cells = zip(*runs, strict=True)
    return [statistics.median(cell) if isinstance(cell[0], float) else cell[0] for cell in cells]


def _row(session: Session, prompts: Sequence[Sequence[int]], at_once: int, cached: bool) -> list[object]:
    model = session.model
    steps = CachedSteps(model) if cached else PrefixSteps(model, eos_and_pad(session.tokenizer)[1])
    steps.rows = at_once
    before, start = model.stats(), time.perf_counter()
    answers = generate(model, steps, prompts, -1, NEW_TOKENS)
    seconds, after = time.perf_counter() - start, model.stats()
    used = {name: after[name] - before[name] for name in after}
    tokens = sum(len(answer.tokens) for answer in answers)
    kilobytes = (used["bytes_up"] + used["bytes_down"]) / tokens / 1e3
    spent = [used["client_crypto_seconds"], used["worker_seconds"]]
    return [at_once, "yes" if cached else "no", tokens / seconds, *spent, int(used["tokens"]), kilobytes]


def _agreement(session: Session, adapter: Path, prompts: list[list[int]], records: list[dict[str, str]]) -> str:
    model, tokenizer = session.model, session.tokenizer
    eos, pad = eos_and_pad(tokenizer)
    cached = [list(a.tokens) for a in generate(model, CachedSteps(model), prompts, eos, ANSWER_TOKENS)]
    plain = [list(a.tokens) for a in generate(model, PrefixSteps(model, pad), prompts, eos, ANSWER_TOKENS)]
    theirs = _hugging_face(adapter, prompts, eos, pad, model)
    encoder = TextEncoder(tokenizer, eos)
    wanted = [encoder.completion(record["prompt"], record["completion"]) for record in records]

    def same(one: list[list[int]], other: list[list[int]]) -> int:
        return sum(a == b for a, b in zip(one, other, strict=True))

    return AGREEMENT.format(
        count=len(prompts), limit=ANSWER_TOKENS, same=same(cached, theirs), right=same(cached, wanted),
        theirs=same(theirs, wanted), cached=same(cached, plain),
    )  # fmt: skip


def _hugging_face(
    adapter: Path, prompts: list[list[int]], eos: int, pad: int, model: EncryptedCausalLM
) -> list[list[int]]:
    """Generate answers by PEFT, one prompt at a time, each as long as the plan allows."""
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, adapter).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        room = min(ANSWER_TOKENS, model.sequence_buckets[-1] - len(prompt))
        with torch.inference_mode():
            whole = tuned.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
                eos_token_id=eos, pad_token_id=pad,
            )  # fmt: skip
        answers.append(whole[0, len(prompt) :].tolist())
    return answers
