"""Find the words of a text that a tokenizer has no token for, and replaces by one that means nothing."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the parts of `text` that become the tokenizer's unknown token, in order; none where it has no such token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = getattr(getattr(backend, "model", None), "unk_token", None)
    names = {name for name in (tokenizer.unk_token, own) if isinstance(name, str)}
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
    if not ids or backend is None:
        return []
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    parts = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    words = [text[start:stop] for token, (start, stop) in parts if token in ids and stop > start]
    return [word for word in words if word.strip() not in names]  # who writes the token itself means it
