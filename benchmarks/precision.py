"""What precision costs and what it gives: gradients, loss and bytes per token against plaintext float32 PEFT.

    python benchmarks/precision.py [--batch-size 15]

One batch of the private data, from one adapter state in which neither A nor B is zero; the small Llama is compiled once per
row, in a temporary directory. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.client_bundle import ClientBundle
from hecompile.compiler import CLIENT, WORKER, CompileOptions, compile_checkpoint
from hecompile.errors import InputError
from hecompile.inspection import circuits_without_gradient, predicted_traffic
from hecompile.worker_bundle import WorkerBundle
from models import PRIVATE_TRAIN, TINY_LLAMA
from runtime.adapter import AdapterModel
from runtime.client import EncryptedCausalLM
from runtime.data import PadToBucket, eos_and_pad, load_examples
from runtime.plaintext import PlaintextPeftModel
from runtime.products import EncryptedProducts
from runtime.session import load_tokenizer
from runtime.transports import InProcessTransport
from runtime.worker import Worker

BUCKETS = (32, 48)
SETTINGS = [(8, 4.0), (8, 6.0), (8, 8.0), (8, 10.0), (10, 4.0), (10, 6.0), (10, 8.0), (10, 10.0), (10, 11.0), (12, 8.0)]


def gradients(model: AdapterModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    output = model(**batch)
    assert output.loss is not None
    output.loss.backward()
    found = {}
    for name, parameter in model.adapter_state().items():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return output.loss.item(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=15)
    batch_size = parser.parse_args().batch_size
    print("| weight bits | bits asked | loss difference | smallest gradient cosine | median | bytes/token up | down |")
    print("|---|---|---|---|---|---|---|")
    for weight_bits, precision in SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            build = Path(scratch) / "build"
            options = CompileOptions(
                batch_size=batch_size, sequence_buckets=BUCKETS, effective_bits=precision, weight_bits=weight_bits
            )
            try:
                compile_checkpoint(str(TINY_LLAMA), build, options)
            except InputError as error:
                print(f"| {weight_bits} | {precision:g} | cannot be reached: {error} | | | | |", flush=True)
                continue
            print(row(build, batch_size, weight_bits, precision), flush=True)


def row(build: Path, batch_size: int, weight_bits: int, precision: float) -> str:
    bundle = ClientBundle.open(build / CLIENT)
    worker = Worker(WorkerBundle.open(build / WORKER))
    encrypted = EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(worker)))
    plain = PlaintextPeftModel.from_pretrained(TINY_LLAMA, encrypted.peft_config, BUCKETS, batch_size)
    generator = torch.Generator().manual_seed(7)
    state = {name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in encrypted.adapter_state().items()}
    tokenizer = load_tokenizer(bundle)
    examples = load_examples(PRIVATE_TRAIN, tokenizer, BUCKETS)
    batch = PadToBucket(BUCKETS, eos_and_pad(tokenizer)[1])([examples[10 * i] for i in range(batch_size)])
    results = []
    for model in (encrypted, plain):
        model.load_adapter_state(state)
        results.append(gradients(model, batch))
    (loss, own), (reference_loss, reference) = results
    cosines = torch.stack([F.cosine_similarity(own[n].flatten(), reference[n].flatten(), dim=0) for n in own])
    traffic = predicted_traffic(bundle.circuits, circuits_without_gradient(bundle.graph()))
    return (
        f"| {weight_bits} | {precision:g} | {loss - reference_loss:+.4f} of {reference_loss:.3f} | "
        f"{cosines.min():.5f} | {cosines.median():.6f} | {traffic.bytes_up} | {traffic.bytes_down} |"
    )


if __name__ == "__main__":
    main()
