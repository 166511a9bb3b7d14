"""Make the reduced Llama, and its text, from nothing.

`python -m hecompile.models.making.reduce` writes models/reduced-llama in a minute or two. The model is small enough to be
evaluated wholly under CKKS; `hecompile convert models/recipes/convert-reduced.yaml` converts it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM

from hecompile.models import REDUCED_LLAMA
from hecompile.models.worlds.reduced_world import ANSWERS, LINE_TOKENS, lines, make_tokenizer

SEED, BATCH, PEAK = 0, 64, 4e-3


def _tokens(texts: list[str]) -> torch.Tensor:
    """Return int64 [lines, LINE_TOKENS]."""
    tokenizer = make_tokenizer()
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    tokens = torch.tensor(rows)
    assert tokens.shape[1] == LINE_TOKENS
    return tokens


def accuracy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the share of answers that the argmax of logits f32 [B, S, V] gives right for tokens int64 [B, S]."""
    at = torch.tensor(ANSWERS)
    return float((logits[:, at - 1].argmax(-1) == tokens[:, at]).float().mean())


def build_model() -> LlamaForCausalLM:
    """Make an untrained model: 2 layers, hidden 32, 2 heads, FFN 64."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(make_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def make(out: Path, steps: int) -> dict[str, object]:
    """Train, save to `out`, and return the report that is saved with it."""
    train, heldout = _tokens(lines()), _tokens(lines(heldout=True))
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.05)
    rng = Random(SEED)  # noqa: S311  order of public text
    for _ in (progress := tqdm(range(steps), desc="pretrain", mininterval=5)):
        batch = train[rng.choices(range(len(train)), k=BATCH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    with torch.no_grad():
        result = model(input_ids=heldout, labels=heldout)
    report: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "heldout_loss": round(float(result.loss), 4),
        "heldout_answers_right": round(accuracy(result.logits, heldout), 4),
    }
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def write_text(directory: Path) -> None:
    """Write the public and the private lines as JSONL files, for the recipes."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, of_private in (("public", False), ("private", True)):
        for part, heldout in (("train", False), ("heldout", True)):
            texts = lines(heldout, of_private)
            Random(SEED).shuffle(texts)  # noqa: S311
            limit = 160 if of_private or heldout else 2000
            text = "".join(json.dumps({"text": line}) + "\n" for line in texts[:limit])
            (directory / f"{name}-{part}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Make the reduced Llama from nothing.")
    parser.add_argument("--out", type=Path, default=REDUCED_LLAMA)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    write_text(REDUCED_LLAMA.parent / "reduced-text")
    print(make(args.out, args.steps))


if __name__ == "__main__":
    main()
