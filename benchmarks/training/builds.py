"""Compile models for the sections that need one: of the 1B shape, or of any other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.report import ROOT
from benchmarks.training.checkpoints import llama_1b_config, make_checkpoint
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.options import Head, WeightBits
from hecompile.errors import InputError
from hecompile.inspection.linear import Traffic, circuits_without_gradient, predicted_traffic
from hecompile.models import TINY_LLAMA

PRECISION, WEIGHT_BITS = 8.0, 8
"""Effective bits and bits of the weights in most sections; the precision section shows what they cost."""

DEFAULTS = (CompileOptions().effective_bits, CompileOptions().weight_bits)
"""Effective bits and bits of the weights of a plan with the default options."""

ONE_B = "HECOMPILE_BENCHMARK_1B"


@dataclass(frozen=True)
class Built:
    """Hold a checkpoint and the folder of the bundles compiled from it."""

    checkpoint: Path
    build: Path

    def traffic(self) -> Traffic:
        """Return what `inspect` predicts for a training step, bytes per token."""
        bundle = ClientBundle.open(self.build / CLIENT)
        return predicted_traffic(bundle.circuits, circuits_without_gradient(bundle.graph()))


def forward_weights(bundle: ClientBundle) -> int:
    """Count the frozen weights that the worker multiplies by."""
    return sum(p.in_features * p.out_features for name, p in bundle.circuits.items() if name.endswith(".forward"))


def stored_weight_bytes(bundle: ClientBundle) -> int:
    """Count the bytes of the frozen weights on the worker, of one direction."""
    forward = {name: p for name, p in bundle.circuits.items() if name.endswith(".forward")}
    sizes = {name: p.in_features * p.out_features for name, p in forward.items()}
    return sum(size * (1 if bundle.plan.bits_of(name) <= 8 else 2) for name, size in sizes.items())


def options(
    batch_size: int, length: int, precision: float = PRECISION, weight_bits: WeightBits = WEIGHT_BITS
) -> CompileOptions:
    """Return options with LoRA of rank 8 on all seven linears, and defaults for the rest."""
    return CompileOptions(
        effective_bits=precision, weight_bits=weight_bits, batch_size=batch_size, sequence_buckets=(length,)
    )


@contextmanager
def llama_1b(
    layers: int, batch_size: int, length: int, precision: float = PRECISION, weight_bits: WeightBits = WEIGHT_BITS,
    head: Head = "local",
) -> Iterator[Built]:  # fmt: skip
    """Open a model of the 1B shape with `layers` layers.

    It is that in the folders `checkpoint` and `build` of $HECOMPILE_BENCHMARK_1B where this is set (made for at least that
    batch, in any precision), `build-remote` for a remote head. Otherwise it is made under build/ and removed
    afterwards (15 GB). Raises InputError where one of these folders is missing.
    """
    given = os.environ.get(ONE_B)
    if given:
        built = Built(Path(given) / "checkpoint", Path(given) / ("build-remote" if head == "remote" else "build"))
        for path in (built.checkpoint, built.build / CLIENT, built.build / WORKER):
            if not path.is_dir():
                raise InputError(f"{ONE_B}={given}: there is no {path}")
        yield built
        return
    with scratch_folder() as scratch:
        checkpoint = make_checkpoint(scratch / "checkpoint", layers)
        chosen = replace(options(batch_size, length, precision, weight_bits), head=head)
        compile_checkpoint(str(checkpoint), scratch / "build", chosen)
        yield Built(checkpoint, scratch / "build")


@contextmanager
def llama_of(hidden: int, layers: int, batch_size: int, length: int) -> Iterator[Built]:
    """Make a random Llama of another size: the 1B configuration with this hidden size.

    Heads have 64 features, with 4 query heads for each key-value head, ffn = 4 × hidden, and the vocabulary is the small
    Llama's 1024 tokens.
    """
    config = llama_1b_config(layers)
    config.hidden_size, config.intermediate_size, config.vocab_size = hidden, 4 * hidden, 1024
    config.num_attention_heads, config.num_key_value_heads = hidden // 64, max(1, hidden // 256)
    with scratch_folder() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(scratch / "checkpoint")
        AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(scratch / "checkpoint")
        compile_checkpoint(str(scratch / "checkpoint"), scratch / "build", options(batch_size, length))
        yield Built(scratch / "checkpoint", scratch / "build")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder on disk, under build/: /tmp may be memory."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="benchmark-") as scratch:
        yield Path(scratch)
