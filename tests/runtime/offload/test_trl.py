"""Trainers that nobody here wrote run on an offloaded model as they do on the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from tests.runtime.offload.conftest import Compiled, lora

trl = pytest.importorskip("trl", reason="needs the extra trl")
datasets = pytest.importorskip("datasets", reason="needs the extra trl")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "use_cpu": True, "bf16": False,
    "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
}  # fmt: skip


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]


def assert_same(compiled: Compiled, train: Any, *logged: str) -> None:
    """Train the model, and the model offloaded, and compare what was logged at every step."""
    histories = []
    for wanted in (False, True):
        transformers.set_seed(3)
        model: nn.Module = compiled.model()
        session = compiled.offload(model) if wanted else None
        trainer = train(model)
        trainer.train()
        histories.append([[entry[key] for key in logged] for entry in trainer.state.log_history if "loss" in entry])
        if session is not None:
            assert session.costs.bytes_up > 0
            session.close()
    plain, encrypted = torch.tensor(histories)
    assert len(plain) == 3
    torch.testing.assert_close(encrypted, plain, rtol=0.01, atol=0.01)


def test_sft_on_messages_with_assistant_only_loss(
    compiled: Compiled, chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = datasets.Dataset.from_list([{"messages": turns(f"n {i}", f"it is {7 * i}")} for i in range(6)])
    options = trl.SFTConfig(tmp_path, assistant_only_loss=True, gradient_checkpointing=False, **SETTINGS)

    def train(model: nn.Module) -> Any:
        return trl.SFTTrainer(model, options, train_dataset=data, processing_class=chat, peft_config=lora())

    assert_same(compiled, train, "loss")


def test_dpo_with_the_adapter_switched_off_as_its_reference(
    compiled: Compiled, chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    pairs = [
        {
            "prompt": turns(f"n {i}"),
            "chosen": [{"role": "assistant", "content": f"it is {7 * i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(6)
    ]
    options = trl.DPOConfig(tmp_path, gradient_checkpointing=False, **SETTINGS)

    def train(model: nn.Module) -> Any:
        data = datasets.Dataset.from_list(pairs)
        return trl.DPOTrainer(model, args=options, train_dataset=data, processing_class=chat, peft_config=lora())

    assert_same(compiled, train, "loss", "rewards/margins")


def test_trainer_of_transformers(compiled: Compiled, tmp_path: Path) -> None:
    tokens = torch.randint(3, 259, (6, 10), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    options = transformers.TrainingArguments(tmp_path, gradient_accumulation_steps=2, **SETTINGS)

    def train(model: Any) -> Any:
        model.add_adapter(lora())  # transformers' own way to PEFT
        return transformers.Trainer(model, options, train_dataset=data)

    assert_same(compiled, train, "loss")
