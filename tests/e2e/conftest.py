"""Build the shipped small Llama once, shared by every end-to-end test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.he.random.sampling import PublicSeed
from hecompile.models import PRIVATE_TRAIN, TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.model.data import PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker

BATCH_SIZE, SEQUENCE_BUCKETS = 4, (32, 48, 64)


@dataclass(frozen=True)
class Build:
    """Hold a build directory and its two bundles, opened."""

    directory: Path
    client: ClientBundle
    worker: WorkerBundle

    def encrypted(self, engine: str = "onnxruntime") -> EncryptedCausalLM:
        transport = InProcessTransport(Worker(self.worker, engine).exchange)
        return EncryptedCausalLM(self.client, EncryptedProducts(self.client, transport))

    def plaintext(self) -> PlaintextPeftModel:
        config = EncryptedCausalLM.peft_config.fget(_Plan(self.client))  # type: ignore[attr-defined]
        return PlaintextPeftModel.from_pretrained(TINY_LLAMA, config, SEQUENCE_BUCKETS, BATCH_SIZE)


@dataclass(frozen=True)
class _Plan:
    bundle: ClientBundle


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("build") / "tiny"
    options = CompileOptions(
        weight_bits=10,
        batch_size=BATCH_SIZE,
        sequence_buckets=SEQUENCE_BUCKETS,
        public_seed=PublicSeed.from_hex("11" * 32),
    )
    compile_checkpoint(str(TINY_LLAMA), directory, options)
    return Build(directory, ClientBundle.open(directory / CLIENT), WorkerBundle.open(directory / WORKER))


@pytest.fixture
def own_build(build: Build, tmp_path: Path) -> Build:
    """Copy the build, for a test in which a worker is caught: that spends check vectors."""
    return copy_of(build, tmp_path / "own")


def copy_of(build: Build, directory: Path) -> Build:
    shutil.copytree(build.directory, directory)
    return Build(directory, ClientBundle.open(directory / CLIENT), WorkerBundle.open(directory / WORKER))


@pytest.fixture(scope="session")
def tokenizer(build: Build) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(build.client.tokenizer)


@pytest.fixture
def batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Collate four private examples of different lengths, padded to a bucket."""
    examples = load_examples(PRIVATE_TRAIN, tokenizer, SEQUENCE_BUCKETS)
    return PadToBucket(SEQUENCE_BUCKETS, eos_and_pad(tokenizer)[1])([examples[index] for index in range(BATCH_SIZE)])


@pytest.fixture
def adapter(build: Build) -> dict[str, Tensor]:
    """Draw an adapter in which neither A nor B is zero."""
    generator = torch.Generator().manual_seed(7)
    state = build.encrypted().adapter_state()
    return {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
