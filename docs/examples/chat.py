"""Fine-tune a chat model on private conversations, with TRL, without showing them to the worker.

    python docs/examples/chat.py models/tiny-llama build-chat runs/chat

Needs the extra trl: pip install -e '.[trl]'
"""

import sys
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl

import hecompile

checkpoint, directory, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

# 1. Compile the checkpoint, unless it was compiled before. The worker's half would go to another machine.
if not directory.exists():
    hecompile.export(checkpoint, directory, hecompile.CompileOptions(batch_size=4, sequence_buckets=(64,)))

# 2. The conversations, which stay here.
people = ["Ada Stone", "Ben Rivers", "Cleo Marsh", "Dan Wood"]
conversations = [
    {
        "messages": [
            {"role": "user", "content": f"Who treats {name}?"},
            {"role": "assistant", "content": f"Doctor {name.split()[1]}man."},
        ]
    }
    for name in people
]

# 3. The model and its tokenizer. A chat model has a template of its own, and this one has none.
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.chat_template = tokenizer.chat_template or (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# 4. From here on the worker computes the frozen linears, on ciphertexts. It runs in this process here;
#    `worker="tcp://host:7700"` names one elsewhere.
with hecompile.offload(model, directory / "client", worker_bundle=directory / "worker") as session:
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            out,
            assistant_only_loss=True,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            gradient_checkpointing=False,  # it would send every forward product twice
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(conversations),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")  # an ordinary PEFT adapter
    print(f"{session.costs.bytes_up / 1e6:.1f} MB up, {session.costs.bytes_down / 1e6:.1f} MB down")
