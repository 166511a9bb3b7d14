"""Mixtures of experts: what a worker is asked for, routed and with every expert asked for every token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.checkpoint.loading import load_model
from hecompile.compiler import linear
from hecompile.compiler.options import CompileOptions
from hecompile.errors import InputError
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts
from tests.support.families import Variant, checkpoint
from tests.support.training import make_tokenizer

TOKENS, EXPERTS, CHOSEN = 14, 4, 2


def asked(root: Path, experts: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, int]]:
    """The logits of one row of 14 tokens, and the rows that each circuit was asked for in a training step."""
    made, out = checkpoint("mixtral", root), root / f"mixtral-{experts}"
    monkeypatch.setattr(linear, "export_onnx", lambda model: made.exported())
    options = CompileOptions(
        lora=AttachLora(2, target_modules=("q_proj",)), batch_size=1, sequence_buckets=(16,), experts=experts,  # type: ignore[arg-type]
        public_seed=PublicSeed.from_hex("11" * 32),
    )
    linear.compile_checkpoint(str(made.directory), out, options)
    bundle = ClientBundle.open(out / CLIENT)
    with pytest.warns(UserWarning, match="NOTHING IS ENCRYPTED"):
        model = EncryptedCausalLM(bundle, CleartextProducts(bundle, WorkerBundle.open(out / WORKER)))
    rows: dict[str, int] = {}
    product = model.products.product

    def counting(circuit: str, x: Tensor, **scales: Tensor) -> Tensor:
        rows[circuit.partition(".mlp.")[2]] = len(x)
        return product(circuit, x, **scales)

    tokens = torch.randint(3, 259, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens, torch.ones_like(tokens)).logits
    model.products.product = counting  # type: ignore[method-assign]
    loss = model(tokens, torch.ones_like(tokens), labels=tokens).loss
    loss.backward()
    return logits, {name: count for name, count in rows.items() if name}


def test_what_the_worker_is_asked_for(family_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step runs 13 of 14 tokens: the last one predicts nothing."""
    logits, routed = asked(family_root, "routed", monkeypatch)
    everything, padded = asked(family_root, "all", monkeypatch)
    torch.testing.assert_close(logits, everything, rtol=0, atol=1e-3 * float(logits.max() - logits.min()))
    run = TOKENS - 1
    for part in ("gate_up_proj.forward", "down_proj.forward", "gate_up_proj.backward", "down_proj.backward"):
        counts = [routed.get(f"experts.{expert}.{part}", 0) for expert in range(EXPERTS)]
        assert sum(counts) == CHOSEN * run and len(set(counts)) > 1, "each token goes to two experts of four"
    # Every expert reads the same rows: one product for the first linears of all of them.
    stacked = f"experts.0-{EXPERTS - 1}.gate_up_proj"
    first = {name: count for name, count in padded.items() if "gate_up" in name}
    assert set(first.values()) == {run} and len(first) == 2 and stacked in next(iter(first))
    down = [padded[f"experts.{expert}.down_proj.{way}"] for expert in range(EXPERTS) for way in ("forward", "backward")]
    assert down == [run] * 2 * EXPERTS


def test_the_experts_of_a_single_token_tell_which_it_is() -> None:
    """Why THREAT_MODEL.md says that routed answers are given away: who has the weights compares all tokens' experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, num_experts=16, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    context = torch.randint(0, 300, (12,))
    with torch.no_grad():
        candidates = torch.cat([context.expand(300, 12), torch.arange(300)[:, None]], dim=1)
        scores = model(candidates, output_router_logits=True).router_logits
    chosen = torch.cat([layer.view(300, 13, 16)[:, -1].topk(2).indices.sort().values for layer in scores], dim=1)
    assert len(chosen.unique(dim=0)) > 280  # of 300


def test_another_word_for_experts_is_refused() -> None:
    with pytest.raises(InputError, match="experts must be one of routed, all, got 'some'"):
        CompileOptions(experts="some")  # type: ignore[arg-type]


def test_experts_of_any_width_are_loaded_so_that_they_run(tmp_path: Path) -> None:
    """transformers' own choice of a product takes rows of whole 16 bytes alone, and a model writes its calibration text."""
    made = Variant("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 29}).make()
    made.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    made.set_experts_implementation("eager")
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)[0](input_ids=tokens).logits, made(input_ids=tokens).logits)
