"""Train one encrypted step of every family, answer with it, and take its adapter to PEFT."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.checkpoint.families import FAMILIES
from hecompile.compiler import linear
from hecompile.compiler.options import CompileOptions
from hecompile.errors import InputError
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import module_path, nodes_of_type
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.offload.cut_prefix import CutPrefix
from hecompile.passes.offload.fuse import Fuse
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.inference.generation import CachedSteps, generate
from hecompile.runtime.model.adapter import load_adapter, save_adapter
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.offload import offload
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.support.families import BASIC, Checkpoint, checkpoint

BUCKETS, ROWS = (8, 16), 2
COSINE, LOGITS = 0.999, 0.02
"""Smallest cosine of a gradient; largest difference of a logit, of the logits' range. Products have 12 effective bits."""


@dataclass(frozen=True)
class Trained:
    """A family's checkpoint and its encrypted model, with an adapter of which neither A nor B is zero."""

    checkpoint: Checkpoint
    encrypted: EncryptedCausalLM
    build: Path

    def plain(self) -> PlaintextPeftModel:
        base = copy.deepcopy(self.checkpoint.model)
        base.name_or_path = self.encrypted.peft_config.base_model_name_or_path
        made = PlaintextPeftModel(base, self.encrypted.peft_config, BUCKETS, ROWS)
        made.load_adapter_state(self.encrypted.adapter_state())
        return made


@cache
def trained(name: str, root: Path) -> Trained:
    made, out = checkpoint(name, root), root / f"{name}-build"
    options = CompileOptions(
        lora=AttachLora(2, 4.0, target_modules=FAMILIES[name].linears), effective_bits=12, weight_bits=12,
        batch_size=ROWS, sequence_buckets=BUCKETS, public_seed=PublicSeed.from_hex("5eed" * 16),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # What was loaded and exported for the float graph is exported no second time: it takes most of the time.
        patch.setattr(linear, "export_onnx", lambda model: made.exported())
        linear.compile_checkpoint(str(made.directory), out, options)
    bundle = ClientBundle.open(out / CLIENT)
    transport = InProcessTransport(Worker(WorkerBundle.open(out / WORKER), "onnxruntime").exchange)
    model = EncryptedCausalLM(bundle, EncryptedProducts(bundle, transport))
    generator = torch.Generator().manual_seed(7)
    shapes = {key: value.shape for key, value in model.adapter_state().items()}
    model.load_adapter_state({key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    return Trained(made, model, out)


def batch() -> dict[str, Tensor]:
    """Two rows of 14 and 9 tokens, of which the last ten and five are labels."""
    tokens = torch.randint(3, 259, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(14) < torch.tensor([[14], [9]])).long()
    labels = tokens.where((mask == 1) & (torch.arange(14) >= 4), -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", BASIC)
def test_a_step_has_the_gradients_of_plaintext_peft(name: str, family_root: Path) -> None:
    model = trained(name, family_root)
    losses, gradients = [], []
    for either in (model.encrypted, model.plain()):
        loss = either(**batch()).loss
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        gradients.append({key: value.grad.clone() for key, value in either.adapter_state().items()})  # type: ignore[union-attr]
        either.zero_grad()
    assert abs(losses[0] - losses[1]) < 0.01 * losses[1]
    own, reference = gradients
    assert own.keys() == reference.keys()
    for key, gradient in own.items():
        cosine = float(F.cosine_similarity(gradient.flatten(), reference[key].flatten(), dim=0))
        ratio = float(gradient.norm() / reference[key].norm())
        assert cosine >= COSINE and 0.97 < ratio < 1.03, f"{key}: cosine {cosine}, length ratio {ratio}"


@pytest.mark.parametrize("name", BASIC)
def test_the_first_products_are_kept_whole(name: str, family_root: Path) -> None:
    """They read what no adapter changes: all that do leave the plan, whatever the family puts between them and LoRA."""
    model = Fuse()(trained(name, family_root).encrypted.bundle.graph()).model
    constant = {module_path(node) for node in without_gradient(model, "RemoteLinear")}
    cut = CutPrefix()(model)
    assert cut is not None and constant
    assert {module_path(node) for node in nodes_of_type(cut.prefix, "RemoteLinear")} == constant
    assert constant.isdisjoint(module_path(node) for node in nodes_of_type(cut.rest, "RemoteLinear"))


@pytest.mark.parametrize("name", BASIC)
def test_the_adapter_gives_the_same_logits_in_peft_and_comes_back(name: str, family_root: Path, tmp_path: Path) -> None:
    model, given = trained(name, family_root), batch()
    save_adapter(model.encrypted, tmp_path / "adapter")
    base = copy.deepcopy(model.checkpoint.model)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    real = given["attention_mask"].bool()
    with torch.no_grad():
        own = model.encrypted.eval()(given["input_ids"], given["attention_mask"]).logits[real]
        other = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[real]
        with plain.disable_adapter():
            without = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[real]
    limit = LOGITS * float(other.max() - other.min())
    assert float((own - other).abs().max()) < limit
    assert float((own - without).abs().max()) > 2 * limit, "the adapter makes no difference: nothing was tested"
    kept = {key: value.detach().clone() for key, value in model.encrypted.adapter_state().items()}
    load_adapter(model.encrypted, tmp_path / "adapter")
    assert all(torch.equal(value, kept[key]) for key, value in model.encrypted.adapter_state().items())


@pytest.mark.parametrize("name", BASIC)
def test_an_answer_is_that_of_hugging_face_token_for_token(name: str, family_root: Path) -> None:
    model = trained(name, family_root)
    prompt = batch()["input_ids"][0, :6]
    asked = GenerationConfig(
        do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    plain = model.plain()._peft.get_base_model()
    with torch.no_grad():
        expected = plain.generate(
            prompt[None], attention_mask=torch.ones(1, 6, dtype=torch.int64), generation_config=asked
        )
    for logits in expected.logits:
        best = logits[0].topk(2).values
        assert float(best[0] - best[1]) > 1e-3, "a near tie says nothing"
    (answer,) = generate(model.encrypted, CachedSteps(model.encrypted), [prompt.tolist()], 2, 6)
    assert list(answer.tokens) == expected.sequences[0, 6:].tolist()


@pytest.mark.parametrize("name", BASIC)
def test_its_modules_are_offloaded_in_place(name: str, family_root: Path) -> None:
    model, given = trained(name, family_root), batch()
    base = copy.deepcopy(model.checkpoint.model).eval()
    if name in ("mixtral", "qwen3_moe"):
        with pytest.raises(InputError, match="an expert of a mixture"):
            offload(base, model.build / CLIENT, worker_bundle=model.build / WORKER)
        return
    real = given["attention_mask"].bool()
    with torch.no_grad(), offload(base, model.build / CLIENT, worker_bundle=model.build / WORKER):
        own = base(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[real]
        other = model.checkpoint.model.eval()(**{k: v for k, v in given.items() if k != "labels"}).logits[real]
    assert not any(type(module) in (torch.nn.Linear, Conv1D) for module in base.base_model.modules())
    assert float((own - other).abs().max()) < LOGITS * float(other.max() - other.min())
