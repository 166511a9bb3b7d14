"""Every token that a checkpoint names as an end ends an answer, as in Hugging Face, and travels with the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hecompile.bundles.client import ClientBundle
from hecompile.checkpoint.tokenizer import read_answer_ends
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.runtime.client.session import open_session
from hecompile.runtime.inference.answers import Prompt, Reply, infer
from hecompile.runtime.model.data import Example, Examples
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.workplace import make_workplace
from tests.support.tiny import OPTIONS, save_checkpoint, tiny_llama
from tests.support.training import make_tokenizer

TEXT, MOST = "abc", 4
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def first_answer() -> int:
    ids = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])
    return int(tiny_llama()(ids).logits[0, -1].argmax())


def build(directory: Path, **eos: Any) -> tuple[Path, Path]:
    """Save the tiny Llama with this eos in config.json and generation_config.json, and compile it."""
    checkpoint = save_checkpoint(directory / "model")
    if "generation_config" not in eos:  # Hugging Face goes by it alone where it is there
        (checkpoint / "generation_config.json").unlink()
    for name, ids in eos.items():
        path = checkpoint / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    compile_checkpoint(str(checkpoint), directory / "build", OPTIONS)
    return checkpoint, directory / "build"


def answer(build: Path, completion: str | None = None) -> Reply:
    settings = {"model": build / "client", "worker_bundle": build / "worker", "worker": "inprocess", "engine": "torch"}
    with open_session(make_workplace(settings)) as session:
        return infer(session, [Prompt(TEXT, completion)], MOST)[0]


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_answer_ends_where_hugging_faces_does(tmp_path: Path, file: str) -> None:
    first = first_answer()
    assert first != 2
    checkpoint, made = build(tmp_path, **{file: [2, first]})
    reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])
    wanted = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False)
    assert wanted.shape[1] - ids.shape[1] == 1
    reply = answer(made)
    assert (reply.tokens, reply.finish) == (1, "eos")


def test_the_ids_of_both_files_count(tmp_path: Path) -> None:
    checkpoint, made = build(tmp_path, config=7, generation_config=[9])
    assert read_answer_ends(made / "client" / "tokenizer") == {7, 9}
    assert PlaintextPeftModel.from_pretrained(checkpoint, LORA, (8,), 2).answer_ends == {7, 9}


def test_a_plan_without_them_goes_by_the_tokenizer(tmp_path: Path) -> None:
    _, made = build(tmp_path)
    without = answer(made)
    manifest = json.loads((made / "client" / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if not file["path"].endswith("generation_config.json")]
    (made / "client" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"generation_config\.json is not part of the bundle"):
        ClientBundle.open(made / "client")
    (made / "client" / "tokenizer" / "generation_config.json").unlink()
    assert answer(made) == without and without.finish == "length"


def test_evaluation_ends_there_too(tmp_path: Path) -> None:
    first = first_answer()
    prompt = tuple(make_tokenizer()(TEXT)["input_ids"])
    wanted = Examples([Example((*prompt, 2), len(prompt), has_prompt=True)])
    within = Examples([Example((*prompt, first, 2), len(prompt), has_prompt=True)])
    checkpoint = save_checkpoint(tmp_path / "model")
    plain = PlaintextPeftModel.from_pretrained(checkpoint, LORA, (8,), 2)
    assert evaluate(plain, wanted, 0).exact_match == 0.0
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    several = PlaintextPeftModel.from_pretrained(checkpoint, LORA, (8,), 2)
    assert evaluate(several, wanted, 0).exact_match == 1.0
    assert evaluate(several, within, 0).exact_match == 0.0
