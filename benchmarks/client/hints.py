"""Measure hints that are stored, fetched and computed: bytes and seconds of the products of a decoder layer of the 1B shape.

python -m benchmarks hints [--quick]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.report import table
from benchmarks.training.builds import scratch_folder
from benchmarks.training.checkpoints import llama_1b_config
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.he.random.sampling import PublicSeed
from hecompile.inspection.prediction import hint_file_bytes
from hecompile.models import TINY_LLAMA
from hecompile.plan.hint_bits import Hints
from hecompile.runtime.client.fetched_hints import Fetching
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import connect_for
from hecompile.runtime.worker.process import worker_process

PLACES: tuple[Hints, ...] = ("stored", "fetched", "computed")
TOKENS, QUICK_TOKENS = (512, 4096), (64,)
REPEATS, QUICK_REPEATS = 3, 1
SEED = PublicSeed.from_hex("77" * 32)
PROSE = """\
## Hints: stored, fetched, computed

The eight products of one decoder layer of the shape of Llama-3.2-1B, forward and backward, each once with all tokens of the
step in one request: what hints cost does not depend on how many layers there are. Client and worker on the same cores, 8-bit
weights, 8 effective bits, medians of {repeats} passes that take turns. *Fetched* has memory for two hints, and keeps nothing
from one pass to the next but what is still there of them. Ratios are to stored hints."""


@dataclass(frozen=True)
class Pass:
    """Hold what one pass over the products took: seconds, CPU seconds of the client, bytes up and down."""

    seconds: float
    client: float
    bytes_up: float
    bytes_down: float


def run(quick: bool) -> str:
    """Return Markdown: bits of a word by circuit, then a row per place of hints and number of tokens."""
    repeats = QUICK_REPEATS if quick else REPEATS
    with scratch_folder() as folder, ExitStack() as stack:
        checkpoint = _checkpoint(folder / "checkpoint", quick)
        products = {place: stack.enter_context(_opened(folder, checkpoint, place)) for place in PLACES}
        stored = ClientBundle.open(folder / "stored" / CLIENT)
        rows = [row for tokens in (QUICK_TOKENS if quick else TOKENS) for row in _rows(products, tokens, repeats)]
    header = ["tokens/step", "hints", "seconds", "ratio", "client CPU s", "MB up", "MB down", "all bytes"]
    return "\n\n".join([PROSE.format(repeats=repeats), table(header, rows), _bits(stored)])


def _checkpoint(directory: Path, quick: bool) -> Path:
    """Save one layer of that shape with the small Llama's 1024 tokens, a quarter as wide where `quick`."""
    settings = llama_1b_config(1).to_dict() | {"vocab_size": 1024}
    if quick:
        settings |= {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(directory)
    return directory


@contextmanager
def _opened(folder: Path, checkpoint: Path, place: Hints) -> Iterator[EncryptedProducts]:
    """Compile the checkpoint with hints in that place, all on one ring, and open its products over a worker process."""
    options = CompileOptions(
        weight_bits=8, batch_size=8, sequence_buckets=(512,), public_seed=SEED, ring="512x3", hints=place
    )
    compile_checkpoint(str(checkpoint), folder / place, options)
    bundle = ClientBundle.open(folder / place / CLIENT)
    budget = sum(sorted(record.bytes for record in bundle.fetched.values())[-2:])
    with worker_process(folder / place / WORKER) as address:
        products = EncryptedProducts(bundle, connect_for(address, 2), fetching=Fetching(budget))
        yield products
        products.close()


def _rows(products: Mapping[Hints, EncryptedProducts], tokens: int, repeats: int) -> Iterator[list[object]]:
    passes: dict[Hints, list[Pass]] = {place: [] for place in products}
    for repeat in range(repeats + 1):
        for place, each in products.items():
            measured = _pass(each, tokens)
            if repeat:  # the first compiles, and learns the order
                passes[place].append(measured)
    base = {name: statistics.median(getattr(one, name) for one in passes["stored"]) for name in Pass.__annotations__}
    for place, found in passes.items():
        middle = {name: statistics.median(getattr(one, name) for one in found) for name in Pass.__annotations__}
        traffic = (middle["bytes_up"] + middle["bytes_down"]) / (base["bytes_up"] + base["bytes_down"])
        yield [
            tokens, place, f"{middle['seconds']:.2f}", f"{middle['seconds'] / base['seconds']:.2f}x",
            f"{middle['client']:.2f}", f"{middle['bytes_up'] / 1e6:.1f}", f"{middle['bytes_down'] / 1e6:.1f}",
            f"{traffic:.2f}x",
        ]  # fmt: skip


def _pass(products: EncryptedProducts, tokens: int) -> Pass:
    """Visit every circuit once, forward and then backward in reverse."""
    names = list(products.circuits)
    forward = [name for name in names if name.endswith(".forward")]
    order = forward + [name for name in reversed(names) if name not in forward]
    before, cpu, start = products.costs.as_dict(), time.process_time(), time.perf_counter()
    for name in order:
        products.product(name, torch.randn(tokens, products.circuits[name].in_features))
    seconds, client = time.perf_counter() - start, time.process_time() - cpu
    after = products.costs.as_dict()
    up, down = (after[name] - before[name] for name in ("bytes_up", "bytes_down"))
    return Pass(seconds, client, up, down)


def _bits(bundle: ClientBundle) -> str:
    """Show what the words of each circuit's hint keep, and the bytes."""
    rows: list[list[object]] = [
        [name.removeprefix("model.layers.0."), f"{c.in_features} → {c.out_features}", c.hint_bits,
         f"{hint_file_bytes(bundle.ring, [c]) / 1e6:.1f}"]
        for name, c in bundle.circuits.items()
    ]  # fmt: skip
    whole = sum(c.out_features for c in bundle.circuits.values()) * bundle.ring.lattice_dim * 4
    size = hint_file_bytes(bundle.ring, bundle.circuits.values())
    rows.append(["**all**", "", f"{32 * size / whole:.1f}", f"{size / 1e6:.1f}"])
    return table(["circuit", "in → out", "bits of a word", "MB"], rows)
