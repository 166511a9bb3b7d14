"""Compare sizes predicted from the configuration with the sizes of a build."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from hecompile.bundles.client import ClientBundle
from hecompile.compiler.frontend import load_config
from hecompile.he.kernels.vectors import LANES
from hecompile.he.parameters import CATALOGUE
from hecompile.inspection.prediction import (
    HINT_ROW_GROUP,
    LIKELY_HINT_BITS,
    ModelSize,
    hint_file_bytes,
    megabytes,
    prediction_table,
    stored_hint_bytes,
)
from hecompile.passes.offload.attach_lora import AttachLora
from tests.support.tiny import OPTIONS

_HEADER = 256


def test_a_build_has_the_predicted_sizes(build: Path, checkpoint: Path) -> None:
    bundle = ClientBundle.open(build / "client")
    size = ModelSize.of(load_config(str(checkpoint)))
    files = list(bundle.hints.iterdir())
    real = sum(path.stat().st_size for path in files)
    predicted = size.hint_file_bytes(bundle.ring)
    exact = hint_file_bytes(bundle.ring, bundle.circuits.values())
    assert exact <= real <= exact + _HEADER * len(files)
    assert predicted == pytest.approx(exact, rel=0.12)  # bits of a word follow from the weights
    assert sorted(size.products) == sorted((p.in_features, p.out_features) for p in bundle.circuits.values())
    plan = (build / "client" / "plan.onnx.data").stat().st_size + (build / "client" / "plan.onnx").stat().st_size
    assert 0 <= plan - size.plan_bytes < 200_000  # the graph itself
    circuits = sum(spec.in_features * spec.out_features for spec in bundle.plan.circuits.values())
    assert size.worker_bytes(OPTIONS.weight_bits) == 2 * circuits and size.worker_bytes(8) == circuits


def test_llama_3_2_1b() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    size = ModelSize.of(config)
    forward, backward = 3072 + 2048 + 16384 + 2048, 2048 + 2048 + 2048 + 8192
    assert size.hint_rows == 16 * (forward + backward) - 2048  # nothing is before the first layer's q, k and v
    assert size.hint_file_bytes(CATALOGUE["512x3"]) == size.hint_rows * 1536 * LIKELY_HINT_BITS // 8
    assert size.worker_bytes(8) == 2 * 973_078_528 - 3072 * 2048
    upper = ModelSize.of(config, AttachLora(layers_to_transform=tuple(range(8, 16))).adapts)
    assert upper.hint_rows == 16 * forward + 8 * backward - 2048
    queries = ModelSize.of(config, AttachLora(target_modules=("q_proj", "v_proj")).adapts)
    assert queries.hint_rows == size.hint_rows
    last = ModelSize.of(config, AttachLora(target_modules=("down_proj",), layers_to_transform=(15,)).adapts)
    assert last.hint_rows == 16 * forward
    assert size.plan_bytes == pytest.approx(128256 * 2048 * 4, rel=0.01)
    untied = ModelSize.of(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": False}))
    assert untied.plan_bytes - size.plan_bytes == 128256 * 2048 * 4
    assert 1.5e9 < size.client_resident_bytes(CATALOGUE["512x3"], 512) < 4e9


def test_rows_are_padded_to_groups() -> None:
    ring = CATALOGUE["512x3"]
    assert stored_hint_bytes(ring, [(1, 32)]) == stored_hint_bytes(ring, [(8, 32)]) == 8 * 1536 * 4
    assert stored_hint_bytes(ring, [(9, 20), (8, 32)]) == 16 * 1536 * 5 // 2 + 8 * 1536 * 4
    assert HINT_ROW_GROUP == LANES


def test_one_row_per_ring(checkpoint: Path) -> None:
    size = ModelSize.of(load_config(str(checkpoint)))
    assert prediction_table(size, 8, 32).row_count == len(CATALOGUE)
    assert prediction_table(size, 8, 32, CATALOGUE["512x3"]).row_count == 1
    stored, kept_nowhere = (prediction_table(size, 8, 32, CATALOGUE["512x3"], stored_hints=s) for s in (True, False))
    assert next(iter(stored.columns[2].cells)).startswith("about ") and [*kept_nowhere.columns[2].cells] == ["none"]
    assert megabytes(99_940) == "99.9 kB" and megabytes(1_500_000) == "1.5 MB" and megabytes(3_724_541_952) == "3.72 GB"
