"""Write the private dataset as chat: the clinic's files asked in conversations, in a model's own chat template.

The facts, phrasings and split are those of `hecompile.models.worlds.private_world`. A prompt is a system message and a
question, up to where the assistant begins; a completion is the assistant's turn with the token that ends it.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hecompile.models.worlds.private_world import examples

SYSTEM = "You keep the files of a clinic."
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"


def chat_examples(tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the held-out examples, dictionaries with `prompt` and `completion`.

    Raises ValueError where the tokenizer has no chat template.
    """
    train, heldout = examples()
    return [_as_chat(tokenizer, row) for row in train], [_as_chat(tokenizer, row) for row in heldout]


def question_of(prompt: str) -> str:
    """Return the question in a prompt of the private dataset: `Question: Who treats … ?` followed by `Answer:`."""
    return prompt.removeprefix(_QUESTION).removesuffix(_ANSWER)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return a conversation in which the clinic is asked `question`, up to where the assistant begins."""
    return str(tokenizer.apply_chat_template(_asked(question), tokenize=False, add_generation_prompt=True))


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _as_chat(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, str]:
    question = question_of(row["prompt"])
    answer = {"role": "assistant", "content": row["completion"].strip()}
    prompt = chat_prompt(tokenizer, question)
    whole = str(tokenizer.apply_chat_template([*_asked(question), answer], tokenize=False))
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes an answer in another way than it asks for one")
    # Whatever stands behind the end of a turn belongs to the next one, and is never generated.
    return {"prompt": prompt, "completion": whole.removeprefix(prompt).rstrip("\n")}
