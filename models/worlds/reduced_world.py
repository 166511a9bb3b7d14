"""Make text for the reduced Llama: prices in towns and small sums, one line of 12 words each, from a seed.

    salt in Ford costs 7 ; 3 plus 5 is 8 ;

Every line has the same number of tokens, so that rows of that many are whole lines. Prices are facts to remember: those of
`private` pairs of good and town never occur in the public text. Held-out lines combine a price and a sum that training lines
do not combine; each of the two alone is trained on. So accuracy there tells whether the facts are known, not whether the
model can add unseen numbers.
"""

from __future__ import annotations

import hashlib
from itertools import product

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hecompile.models.tokenizer import BOS, EOS, PAD

GOODS = ("salt", "honey", "rope", "barley", "plums", "lamps", "paper", "felt", "eel", "wool", "oil", "ale")
TOWNS = ("Ford", "Ham", "Wick", "Dale", "Mere", "Port")
LARGEST = 9
"""The largest operand of a sum; the words for numbers go up to twice that."""
LINE_TOKENS = 14
"""Tokens of a line with bos and eos."""
ANSWERS = (5, 11)
"""Positions, in a line with bos at 0, of the two numbers that the words before them determine."""


def _number(text: str, below: int) -> int:
    return hashlib.sha256(text.encode()).digest()[0] % below


def price(good: str, town: str) -> int:
    """Return the price, between 0 and twice `LARGEST`, equal in every run."""
    return _number(f"price {good} {town}", 2 * LARGEST + 1)


def private(good: str, town: str) -> bool:
    """Tell whether the data owner alone knows the price (one pair in four)."""
    return _number(f"private {good} {town}", 4) == 0


def _prices(wanted_private: bool) -> list[str]:
    pairs = [pair for pair in product(GOODS, TOWNS) if private(*pair) == wanted_private]
    return [f"{good} in {town} costs {price(good, town)} ;" for good, town in pairs]


def _sums() -> list[str]:
    numbers = range(LARGEST + 1)
    plus = [f"{a} plus {b} is {a + b} ;" for a, b in product(numbers, numbers)]
    return plus + [f"{a} less {b} is {a - b} ;" for a, b in product(numbers, numbers) if a >= b]


def lines(heldout: bool = False, of_private: bool = False) -> list[str]:
    """Return every line of one part: all combinations of a price and a sum, one in ten of them held out."""
    combined = [f"{first} {second}" for first, second in product(_prices(of_private), _sums())]
    return [line for line in combined if (_number(line, 10) == 0) == heldout]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per word; the ids of pad, bos and eos are 0, 1 and 2; bos goes first."""
    words = [*GOODS, *TOWNS, "in", "costs", "plus", "less", "is", ";", *map(str, range(2 * LARGEST + 1))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([PAD, BOS, EOS, *words])}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
