"""Make the tiny Llama from nothing: corpus, tokenizer, training and report.

`python -m hecompile.models.making.pretrain --out models/tiny-llama` takes about a quarter of an hour on two CPU cores. With
`--resume` it goes on from the last checkpoint, which is kept outside of the output directory. On a machine whose cores
are shared, set `OMP_WAIT_POLICY=PASSIVE`: threads that spin while they wait for each other slow it down by a factor of
ten there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hecompile.errors import InputError
from hecompile.models import TINY_LLAMA
from hecompile.models.making.baselines import bigram_loss, unigram_loss
from hecompile.models.tokenizer import train_tokenizer
from hecompile.models.worlds.public_world import documents


@dataclass(frozen=True)
class Recipe:
    """Hold everything that determines the run; lengths are in tokens, `learning_rate` is the peak of the schedule."""

    seed: int = 0
    documents: int = 40_000
    heldout_documents: int = 400
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    max_position_embeddings: int = 256
    steps: int = 1600
    batch: int = 16
    length: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    grad_clip: float = 1.0


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained float32 Llama of the recipe's shape, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> NDArray[np.int64]:
    """Return bos, text, eos of each text, one after the other, as one vector [n]."""
    encoded = tokenizer(texts)["input_ids"]
    return np.concatenate([[*ids, tokenizer.eos_token_id] for ids in encoded]).astype(np.int64)


def _rows(stream: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Cut `stream` [n] into rows [n // length, length]; the rest is dropped."""
    return stream[: len(stream) // length * length].reshape(-1, length)


def mean_loss(model: LlamaForCausalLM, stream: NDArray[np.int64], length: int) -> float:
    """Return the model's nats per token on `stream` [n], cut into windows of `length` tokens."""
    model.eval()
    rows = torch.from_numpy(_rows(stream, length))
    losses = []
    with torch.inference_mode():
        for batch in rows.split(32):
            losses += [model(input_ids=batch, labels=batch).loss.item()] * len(batch)
    return float(np.mean(losses))


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of a linear warm-up, then a cosine decay to a twentieth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def _batch(rows: NDArray[np.int64], step: int, recipe: Recipe) -> torch.Tensor:
    """Return the batch [batch, length] of `step`: it depends on nothing else, so a resumed run is the same run."""
    per_epoch = len(rows) // recipe.batch
    epoch, index = divmod(step, per_epoch)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(rows))
    return torch.from_numpy(rows[order[index * recipe.batch : (index + 1) * recipe.batch]])


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def train(
    model: LlamaForCausalLM,
    stream: NDArray[np.int64],
    recipe: Recipe,
    checkpoint: Path,
    resume: bool = False,
    checkpoint_every: int = 200,
) -> None:
    """Train `model` in place on `stream` [n], saving `checkpoint` now and then and removing it at the end.

    Raises InputError if `resume` is asked for without a checkpoint, or with one of another recipe.
    """
    rows = _rows(stream, recipe.length)
    if len(rows) < recipe.batch:
        raise InputError(f"the corpus has {len(rows)} rows of {recipe.length} tokens; one batch needs {recipe.batch}")
    optimizer = _optimizer(model, recipe)
    start = 0
    if resume:
        if not checkpoint.exists():
            raise InputError(f"there is no checkpoint {checkpoint} to resume from; run without --resume")
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise InputError(f"{checkpoint} was made with other options; give the same ones or run without --resume")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="pretrain", mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        batch = _batch(rows, step, recipe)
        # bfloat16 products with float32 weights and sums: faster than float32 on processors that have them.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % checkpoint_every == 0:
            state = {"recipe": asdict(recipe), "step": step + 1, "model": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, checkpoint)
    checkpoint.unlink(missing_ok=True)


def make(recipe: Recipe, out: Path, checkpoint: Path, resume: bool = False) -> dict[str, object]:
    """Make corpus, tokenizer and model, save all to `out`, and return the report that is saved with them."""
    begun = time.monotonic()
    torch.set_num_threads(2)
    train_texts = documents(recipe.documents, recipe.seed)
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size, recipe.max_position_embeddings)
    stream = token_stream(tokenizer, train_texts)
    seen = set(train_texts)
    heldout_texts = [t for t in documents(recipe.heldout_documents, recipe.seed, heldout=True) if t not in seen]
    heldout = token_stream(tokenizer, heldout_texts)

    model = build_model(recipe, tokenizer)
    train(model, stream, recipe, checkpoint, resume)
    # The measurements below are of the shipped weights, after rounding.
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()
    report: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(stream),
        "tokens_seen": recipe.steps * recipe.batch * recipe.length,
        "heldout_tokens": len(heldout),
        "heldout_loss": round(mean_loss(model, heldout, recipe.length), 4),
        "heldout_loss_bigram": round(bigram_loss(stream, heldout, len(tokenizer)), 4),
        "heldout_loss_unigram": round(unigram_loss(stream, heldout, len(tokenizer)), 4),
        "seconds": round(time.monotonic() - begun),
        "recipe": asdict(recipe),
    }
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny Llama from nothing.")
    parser.add_argument("--out", type=Path, default=TINY_LLAMA)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/pretrain/checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    report = make(Recipe(seed=args.seed, steps=args.steps), args.out, args.checkpoint, args.resume)
    print({k: v for k, v in report.items() if k != "recipe"})


if __name__ == "__main__":
    main()
