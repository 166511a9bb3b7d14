"""Tokenizers of every kind that text is cut with, trained on a few words: what each adds to a text, and where it cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hecompile.models import TINY_LLAMA

TEXTS = ["Q: A worker plays. Answer: Doctor Frost playing", "user: hi [INST]x[/INST]worker", "the workers play"] * 4
ALPHABET = sorted({*"".join(TEXTS), *"abcdefghijklmnopqrstuvwxyz<>/\n"})
LEAD = [("<s>", 1), ("</s>", 2)]


def _made(
    model: models.Model, trainer: Any, template: str | None, setup: Callable[[Tokenizer], None], **tokens: str
) -> Any:
    backend = Tokenizer(model)
    setup(backend)
    backend.train_from_iterator(TEXTS, trainer)
    if template is not None:
        pieces = [(name, number) for name, number in LEAD if name in template]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=pieces)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def byte_level(template: str | None = "<s> $A", prefix_space: bool = False, **tokens: str) -> Any:
    """Make a byte-level BPE tokenizer, as of GPT-2, with ids 0, 1 and 2 for pad, bos and eos."""

    def setup(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        backend.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
    return _made(models.BPE(), trainer, template, setup, **named)


def metaspace(scheme: str | None) -> Any:
    """Make a BPE tokenizer with U+2581 for spaces: before each text one, by `scheme` or (None) a normalizer."""

    def setup(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme or "always")
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme or "always")

    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=["▁", *ALPHABET]
    )
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = _made(models.BPE(unk_token="<unk>"), trainer, "<s> $A", setup, **tokens)
    if scheme is None:
        backend = made.backend_tokenizer
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def word_piece() -> Any:
    """Make a tokenizer of words and their pieces, which puts `<s>` before a text and `</s>` behind, as BERT does."""

    def setup(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()

    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=ALPHABET
    )
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _made(models.WordPiece(unk_token="<unk>"), trainer, "<s> $A </s>", setup, **tokens)


class WithoutOffsets:
    """Show no more of a tokenizer than one written in Python has: no backend and no offsets."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner = inner
        self.eos_token_id, self.pad_token_id, self.unk_token_id = (
            inner.eos_token_id,
            inner.pad_token_id,
            inner.unk_token_id,
        )
        self.decode, self.get_vocab = inner.decode, inner.get_vocab

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._inner(text, add_special_tokens=add_special_tokens, verbose=verbose)["input_ids"]}


KINDS: dict[str, Callable[[], Any]] = {
    "shipped": lambda: AutoTokenizer.from_pretrained(TINY_LLAMA),
    "byte-level": byte_level,
    "byte-level, a space before a text": lambda: byte_level(prefix_space=True),
    "bos and eos by template": lambda: byte_level("<s> $A </s>"),
    "no bos": lambda: byte_level(None),
    "eos is pad": lambda: byte_level(pad_token="</s>"),
    "eos is bos": lambda: byte_level("</s> $A", bos_token="</s>"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "prepending normalizer": lambda: metaspace(None),
    "word pieces": word_piece,
    "without offsets": lambda: WithoutOffsets(metaspace("first")),
}
