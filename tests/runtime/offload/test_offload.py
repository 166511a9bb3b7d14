"""A model of transformers whose frozen linears are computed by the worker is the model that it was."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.errors import InputError
from hecompile.passes.offload.narrow import Narrow
from hecompile.runtime.offload import offload
from hecompile.runtime.offload.modules import OffloadedLinear
from hecompile.runtime.offload.offload import _check_same
from tests.runtime.offload.conftest import Compiled, lora

TOKENS = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(TOKENS)
MASK[0, 8:] = 0
LABELS = TOKENS.masked_fill(MASK == 0, -100)
BATCH = {"input_ids": TOKENS, "attention_mask": MASK, "labels": LABELS}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        assert F.cosine_similarity(found[name].flatten(), value.flatten(), dim=0) > 0.999, name


def test_loss_and_gradients_are_those_of_peft(compiled: Compiled) -> None:
    plain, model = compiled.adapted(), compiled.adapted()
    with compiled.offload(model) as session:
        loss, wanted = model(**BATCH).loss, plain(**BATCH).loss
        loss.backward()
        wanted.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=0.01)
        assert_same_gradients(gradients(model), gradients(plain))
        assert session.costs.bytes_up > 0 and session.costs.client_crypto_seconds > 0


def test_an_adapter_may_be_put_on_afterwards_and_switched_off(compiled: Compiled) -> None:
    plain, base = compiled.adapted(), compiled.model()
    with compiled.offload(base):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, lora(init_lora_weights=False))
        model(**BATCH).loss.backward()
        plain(**BATCH).loss.backward()
        assert_same_gradients(gradients(model), gradients(plain))
        with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
            assert model(**BATCH).loss.item() == pytest.approx(plain(**BATCH).loss.item(), rel=0.01)


def test_linears_that_read_one_input_share_an_upload_and_padding_is_not_sent(compiled: Compiled) -> None:
    model = compiled.model().eval()
    with compiled.offload(model) as session, torch.no_grad():
        model(input_ids=TOKENS, attention_mask=MASK)
        padded = session.costs.bytes_up
        circuits = session.bundle.circuits
        expected = sum(p.bytes_up(int(MASK.sum())) for name, p in circuits.items() if name.endswith("forward"))
        assert expected < padded < 1.2 * expected + 5000  # frames have headers


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_real_tokens_do_not_depend_on_where_padding_is(compiled: Compiled, side: str) -> None:
    plain, model = compiled.model().eval(), compiled.model().eval()
    mask = MASK if side == "right" else MASK.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with compiled.offload(model), torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        wanted = plain(input_ids=TOKENS, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    assert (found - wanted).abs().max() < 0.02 * (wanted.max() - wanted.min())


def test_gradient_checkpointing_and_accumulation(compiled: Compiled) -> None:
    plain, model = compiled.adapted(), compiled.adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    other = {name: value.flip(0) for name, value in BATCH.items()}
    with compiled.offload(model):
        (model(**BATCH).loss + model(**other).loss).backward()  # recomputed after a pass with another mask
    (plain(**BATCH).loss + plain(**other).loss).backward()
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_a_gradient_that_the_plan_has_no_product_for_is_refused(compiled: Compiled, settings: dict[str, Any]) -> None:
    model = compiled.adapted(**settings)
    with compiled.offload(model):
        loss = model(**BATCH).loss
        with pytest.raises(InputError, match=r"before model\.layers\.0\.self_attn\..*no backward product.*export with"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_a_trainer_needs_no_product_before_the_lowest_adapter(
    compiled: Compiled, reentrant: bool
) -> None:
    plain, model = compiled.adapted(), compiled.adapted()
    with compiled.offload(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        model(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    assert_same_gradients(gradients(model), gradients(plain))


def test_several_threads(compiled: Compiled) -> None:
    plain, model = compiled.model().eval(), compiled.model().eval()
    results: dict[int, Tensor] = {}

    def run(row: int) -> None:
        with torch.no_grad():
            results[row] = model(input_ids=TOKENS[row : row + 1]).logits

    with compiled.offload(model):
        threads = [threading.Thread(target=run, args=(row,)) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with torch.no_grad():
        wanted = plain(input_ids=TOKENS).logits
    assert (torch.cat([results[row] for row in range(3)]) - wanted).abs().max() < 0.02 * (wanted.max() - wanted.min())


def test_generation_and_a_pipeline_answer_token_for_token(
    compiled: Compiled, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain, model = compiled.model().eval(), compiled.model().eval()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with compiled.offload(model):
        prompt = TOKENS[:2]
        assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
        answers = [
            pipeline("text-generation", model=one, tokenizer=tokenizer)("ask 3:", **settings) for one in (model, plain)
        ]
        assert answers[0] == answers[1]


def test_inference_mode_whose_tensors_count_no_changes(compiled: Compiled) -> None:
    plain, model = compiled.model().eval(), compiled.model().eval()
    with compiled.offload(model), torch.inference_mode():
        found, wanted = (one(input_ids=TOKENS, attention_mask=MASK).logits[MASK.bool()] for one in (model, plain))
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999


def test_frozen_weights_leave_memory(compiled: Compiled) -> None:
    model = compiled.model()
    weights = [weakref.ref(module.weight) for module in model.model.modules() if type(module) is nn.Linear]
    assert len(weights) == 14
    with compiled.offload(model):
        gc.collect()
        assert not any(weight() for weight in weights)


def test_what_needs_the_weights_is_refused_in_one_line(compiled: Compiled) -> None:
    model = compiled.adapted()
    with compiled.offload(model):
        for act in (model.merge_and_unload, model.merge_adapter, model.get_base_model().save_pretrained):
            with pytest.raises(InputError, match="on the worker"):
                act()
        with pytest.raises(InputError, match="on the worker"):
            peft.get_peft_model(compiled_base(model), lora(use_dora=True))
        model.requires_grad_(True)
        with pytest.raises(InputError, match=r"q_proj\.weight is on the worker and cannot be trained"):
            model(**BATCH)


def compiled_base(model: peft.PeftModel) -> PreTrainedModel:
    return model.get_base_model()


def test_data_parallel_is_refused(compiled: Compiled) -> None:
    model = compiled.model()
    with compiled.offload(model):
        for module in model.modules():
            if isinstance(module, OffloadedLinear):
                module._is_replica = True  # as DataParallel marks its copies
        with pytest.raises(InputError, match="DataParallel"):
            model(**BATCH)


def test_an_adapter_is_saved_as_ever(compiled: Compiled, tmp_path: Any) -> None:
    model = compiled.adapted()
    before = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    with compiled.offload(model):
        model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(compiled.model(), tmp_path)
    after = peft.get_peft_model_state_dict(loaded)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_another_model_is_refused_and_unchanged(compiled: Compiled, tmp_path: Any) -> None:
    other = compiled.model()
    with torch.no_grad():
        other.model.norm.weight[3] += 1
    with pytest.raises(InputError, match=r"model\.norm\.weight of the model differs from the plan's"):
        compiled.offload(other)
    assert type(other.model.layers[0].self_attn.q_proj) is nn.Linear
    merged = compiled.adapted().merge_and_unload()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj-k_proj-v_proj in the model differ from the plan's"):
        compiled.offload(merged)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    with pytest.raises(InputError, match="a model of transformers"):
        compiled.offload(nn.Linear(2, 2))
    with pytest.raises(InputError, match="worker"):
        offload(compiled.model(), compiled.build / CLIENT, "somewhere")
    with pytest.raises(InputError):
        offload(compiled.model(), compiled.build / WORKER, worker_bundle=compiled.build / WORKER)


def test_a_plan_whose_embedding_is_stored_in_16_bits_is_compared(compiled: Compiled) -> None:
    base, graph = compiled.model(), ClientBundle.open(compiled.build / CLIENT).graph()
    embedding = base.model.embed_tokens.weight.data
    embedding.copy_(embedding.bfloat16())
    named = graph.graph.initializers.items()
    (value,) = [value for name, value in named if name.endswith(("embed_tokens.weight", "lm_head.weight"))]  # they are one
    value.const_value = ir.Tensor(embedding.numpy().copy(), name=value.name)
    assert Narrow(elements=1)(graph).modified and value.dtype == ir.DataType.BFLOAT16
    for dtype in (torch.bfloat16, torch.float32):
        _check_same(base.to(dtype), graph)
    base.model.embed_tokens.weight.data[3, 1] += 1
    with pytest.raises(InputError, match=r"weight of the model differs from the plan's"):
        _check_same(base, graph)


def test_dora_and_merged_adapters_are_refused(compiled: Compiled) -> None:
    with pytest.raises(InputError, match="DoRA"):
        compiled.offload(compiled.adapted(use_dora=True))
    merged = compiled.adapted()
    merged.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        compiled.offload(merged)


def test_an_offloaded_model_and_a_linear_of_another_kind_are_refused_and_unchanged(compiled: Compiled) -> None:
    class Other(nn.Linear):
        pass

    model = compiled.model()
    model.model.layers[1].mlp.down_proj.__class__ = Other
    with pytest.raises(InputError, match=r"down_proj is a Other, and can be offloaded as a torch.nn.Linear alone"):
        compiled.offload(model)
    assert not any(isinstance(module, OffloadedLinear) for module in model.modules())
    model.model.layers[1].mlp.down_proj.__class__ = nn.Linear
    compiled.offload(model).close()
    with pytest.raises(InputError, match=r"q_proj is offloaded already, .* load the model from its checkpoint again"):
        compiled.offload(model)
