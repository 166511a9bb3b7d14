"""Show what a client keeps on its disk, by part: predicted for the shape of Llama-3.2-1B, and measured on a real export.

python -m benchmarks client_disk [--quick]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from benchmarks.report import table
from benchmarks.training.builds import scratch_folder
from benchmarks.training.checkpoints import llama_1b_config
from hecompile.bundles.client import CHECKS, TOKENIZER, ClientBundle
from hecompile.bundles.hint_files import HINTS
from hecompile.bundles.kinds import CLIENT
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.he.check_store import SERIES
from hecompile.he.check_vectors import VARIANTS, check_count
from hecompile.he.parameters import CATALOGUE
from hecompile.inspection.linear import bytes_below
from hecompile.inspection.prediction import LIKELY_HINT_BITS, ModelSize, megabytes
from hecompile.models import TINY_LLAMA

RING = CATALOGUE["512x3"]
PROSE = f"""\
## What a client keeps on its disk

*1B shape*: predicted from the configuration, {LIKELY_HINT_BITS} bits a word of a hint, ring 512 x 3. *Small Llama*: its
files, exported with 8-bit weights. With `--hints fetched` or `computed` the row of hints is 0."""


def run(quick: bool) -> str:
    """Return Markdown: a row per part of a client bundle."""
    predicted = _predicted(llama_1b_config(2 if quick else 16))
    with scratch_folder() as folder:
        options = CompileOptions(weight_bits=8, ring="512x3")
        compile_checkpoint(str(TINY_LLAMA), folder / "out", options)
        measured = _measured(folder / "out" / CLIENT)
    rows: list[list[object]] = []
    for part, size in predicted.items():
        rows.append([part, megabytes(size), megabytes(measured[part])])
    for name, left_out in (("all, hints stored", ()), ("all, hints fetched or computed", ("hints",))):
        sums = [sum(size for part, size in sizes.items() if part not in left_out) for sizes in (predicted, measured)]
        rows.append([f"**{name}**", *(f"**{megabytes(total)}**" for total in sums)])
    return "\n\n".join([PROSE, table(["part", "1B shape, predicted", "small Llama, measured"], rows)])


def _predicted(config: PretrainedConfig) -> Mapping[str, int]:
    size = ModelSize.of(config)
    checks = sum(VARIANTS * (rows + 4 * check_count(rows) * inputs) for inputs, rows in size.products)
    embedding = 4 * config.vocab_size * config.hidden_size
    return {
        "hints": size.hint_file_bytes(RING),
        "embedding, float32": embedding,
        "rest of the plan": size.plan_bytes - embedding,
        "check vectors": SERIES * checks,
        "tokenizer": bytes_below(TINY_LLAMA) - sum(path.stat().st_size for path in TINY_LLAMA.glob("*.safetensors")),
    }


def _measured(directory: Path) -> Mapping[str, int]:
    bundle = ClientBundle.open(directory)
    parts = {part: bytes_below(directory / part) for part in (HINTS, CHECKS, TOKENIZER)}
    constants = [value.const_value for value in bundle.graph().graph.initializers.values()]
    embedding = max(constant.nbytes for constant in constants if constant is not None)
    return {
        "hints": parts[HINTS],
        "embedding, float32": embedding,
        "rest of the plan": bytes_below(directory) - sum(parts.values()) - embedding,
        "check vectors": parts[CHECKS],
        "tokenizer": parts[TOKENIZER],
    }
