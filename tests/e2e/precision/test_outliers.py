"""Gradients of a model with planted outliers: the default plan follows plaintext as it does without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.he.random.sampling import PublicSeed
from hecompile.models import TINY_LLAMA
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from tests.e2e.conftest import BATCH_SIZE, SEQUENCE_BUCKETS, Build
from tests.e2e.precision.test_gradients import COSINE, gradients
from tests.support.outliers import ATTENTION, RESIDUAL, TIMES, plant_outliers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_outliers(TINY_LLAMA, tmp_path_factory.mktemp("outliers") / "model")


@pytest.fixture(scope="module")
def outliers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("outliers") / "build"
    seed = PublicSeed.from_hex("11" * 32)
    options = CompileOptions(batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS, public_seed=seed)
    compile_checkpoint(str(checkpoint), directory, options)
    return Build(directory, ClientBundle.open(directory / CLIENT), WorkerBundle.open(directory / WORKER))


def test_the_outliers_are_there(checkpoint: Path, batch: dict[str, Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[2]
    layer.register_forward_pre_hook(lambda _, given: seen.update(residual=given[0]))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    first, later = seen["residual"][:, 0].abs(), seen["read"][:, 1:].abs()
    assert float(first[:, RESIDUAL].min() / first.median()) > TIMES / 10
    assert float(later[..., ATTENTION].median() / later.median()) > TIMES / 10


def test_every_gradient_follows_plaintext(
    checkpoint: Path, outliers: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    encrypted = outliers.encrypted()
    plain = PlaintextPeftModel.from_pretrained(checkpoint, encrypted.peft_config, SEQUENCE_BUCKETS, BATCH_SIZE)
    # A reads the outliers: where it did so at full size, the adapter would drown the model.
    small = {name: value / (TIMES if ".lora_A." in name else 1) for name, value in adapter.items()}
    for model in (encrypted, plain):
        model.load_adapter_state(small)
    loss, own = gradients(encrypted, batch)
    reference_loss, reference = gradients(plain, batch)
    assert abs(loss - reference_loss) < 0.01 * reference_loss
    for name, gradient in own.items():
        cosine = float(F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0))
        assert cosine >= COSINE, f"{name}: {cosine}"
        ratio = float(gradient.norm() / reference[name].norm())
        assert 0.97 < ratio < 1.03, f"{name}: length ratio {ratio}"
