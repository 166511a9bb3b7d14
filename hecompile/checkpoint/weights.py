"""Read a model's weights, in whatever format: names and shapes first, then values, a tensor at a time, in float32.

`find_weights` does the first alone: a checkpoint larger than memory is read where its tensors are wanted.

What a library would leave out with a warning (a bias, a matrix of LoRA, anything that the model has no place for) is
refused, for the model without it is another one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from hecompile.checkpoint.configuration import family_of
from hecompile.checkpoint.families import Experts
from hecompile.checkpoint.formats.bitsandbytes import dequantised
from hecompile.checkpoint.formats.safetensors_files import FLOATS
from hecompile.checkpoint.formats.stored import Stored, cannot
from hecompile.checkpoint.weight_files import stored_tensors
from hecompile.errors import InputError

HEAD = "lm_head.weight"
_COMPUTED = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")
"""Older files hold what follows from the configuration, too."""
_EXPERT = re.compile(r"(.+\.experts\.\d+)\.(gate_up_proj|down_proj)\.weight")
"""An expert's linears, where each is on its own."""
_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
"""The linears of all experts, as transformers has them."""
_OLDER = {"embed_out.weight": HEAD}
"""Names that older files have (GPT-NeoX)."""


def empty_model(config: PretrainedConfig) -> Any:
    """Make the transformers model of a configuration without the values of its tensors."""
    kind: Any = getattr(transformers, family_of(config).model)
    with torch.device("meta"):
        return kind(config)


@dataclass(frozen=True)
class _Shape:
    """Hold the names and shapes of a model's tensors as files have them, without those that are tied.

    prefix: what a decoder saved without its head leaves out. tied: the embedding that is the head too, None where none is.
    """

    tensors: Mapping[str, tuple[int, ...]]
    prefix: str
    tied: str | None

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Shape:
        """Read off what the model of a configuration has."""
        model = empty_model(config)
        tied = model._tied_weights_keys.get(HEAD) if config.tie_word_embeddings else None
        experts = family_of(config).experts
        tensors: dict[str, tuple[int, ...]] = {}
        for name, value in model.state_dict().items():
            tensors |= dict(_stored(name, tuple(value.shape), experts))
        if tied is not None:
            del tensors[HEAD]
        return cls(tensors, model.base_model_prefix, tied)

    def name(self, key: str) -> str:
        """Return a tensor's name in the model."""
        key = _OLDER.get(key, key)
        whole = f"{self.prefix}.{key}"
        return whole if key not in self.tensors and whole in self.tensors else key


def _stored(name: str, shape: tuple[int, ...], experts: Experts | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what files have in the place of a tensor: of experts, one matrix for each, and gate and up apart."""
    if experts is None or ".mlp." not in name:
        yield name, shape
        return
    renamed = name.replace(".mlp.", f".{experts.block}.")
    base, _, last = renamed.rpartition(".")
    if last not in ("gate_up_proj", "down_proj"):
        yield renamed, shape
        return
    count, outputs, inputs = shape
    parts = (experts.gate, experts.up) if last == "gate_up_proj" else (experts.down,)
    for number in range(count):
        for part in parts:
            yield f"{base}.{number}.{part}.weight", (outputs // len(parts), inputs)


@dataclass(frozen=True)
class Weights:
    """Hold where the weights of a model are, whose names and shapes are those of its configuration.

    Attributes:
        place: the checkpoint.
        stored: the tensors by their names in the files, without those that are tied.
        experts: of the family.
        tied: the embedding that is the head too, None where none is.
    """

    place: Path
    stored: Mapping[str, Stored]
    experts: Experts | None
    tied: str | None = None

    @property
    def elements(self) -> int:
        """Count the weights."""
        return sum(math.prod(stored.shape) for stored in self.stored.values())

    def has(self, name: str) -> bool:
        """Tell whether this is the name of a tensor in transformers, or of an expert's linear on its own."""
        return all(part in self.stored for part in self.parts(name))

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in transformers, or an expert's linear, float32. It may be mapped from the file.

        Raises InputError naming a tensor that cannot be read or is not finite.
        """
        if self.experts is not None and (stacked := _EXPERTS.fullmatch(name)) is not None:
            base, last = stacked.groups()
            names = (f"{base}.{number}.{last}.weight" for number in count())
            return torch.stack([self.read(each) for each in takewhile(self.has, names)])
        parts = self.parts(name)
        return _read(self.place, parts[0], self.stored[parts[0]]) if len(parts) == 1 else self._read_parts(parts)

    def _read_parts(self, parts: list[str]) -> Tensor:
        return torch.cat([_read(self.place, part, self.stored[part]) for part in parts])

    def parts(self, name: str) -> list[str]:
        """Return the names in the files of what makes up a tensor."""
        if name == HEAD and self.tied is not None:
            return [self.tied]
        if self.experts is None or ".mlp." not in name:
            return [name]
        renamed = name.replace(".mlp.", f".{self.experts.block}.")
        found = _EXPERT.fullmatch(renamed)
        if found is None:
            return [renamed]
        base, last = found.groups()
        parts = (self.experts.gate, self.experts.up) if last == "gate_up_proj" else (self.experts.down,)
        return [f"{base}.{part}.weight" for part in parts]


def find_weights(place: Path, config: PretrainedConfig) -> Weights:
    """Find every weight of the model, and read none of them.

    Raises InputError naming the tensor that is missing, superfluous, or of another shape or kind.
    """
    shape = _Shape.of(config)
    with _readable(place):
        stored = dequantised(place, stored_tensors(place, config))
        found = {shape.name(key): tensor for key, tensor in stored.items() if not _COMPUTED.fullmatch(key)}
        _check_names(place, shape.tensors, found)
        found = _drop_tied_head(place, shape, found)
    return Weights(place, dict(sorted(found.items())), family_of(config).experts, shape.tied)


def read_weights(place: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    """Return every weight of the model by its name in the files, float32; tensors may be mapped from the files.

    Raises InputError as `find_weights` does, and naming a tensor that is not finite.
    """
    weights = find_weights(place, config)
    return {name: _read(place, name, stored) for name, stored in weights.stored.items()}


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise cannot(place, f"{' '.join(str(error).split())}; check that the weight files are complete") from error


def _check_names(place: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]) -> None:
    missing = []
    for name, shape in expected.items():
        if name not in found:
            missing.append(name)
            continue
        stored = found[name]
        if stored.shape != shape:
            raise cannot(place, f"{name} is {list(stored.shape)}, but config.json asks for {list(shape)}")
        if not stored.is_float:
            raise cannot(place, f"{name} is {stored.kind}; supported: {', '.join(FLOATS)}")
    if missing:
        raise InputError(f"the weights of {place} lack {len(missing)} tensors, first: {missing[0]}")
    if superfluous := sorted(found.keys() - expected.keys() - {HEAD}):
        more = f" and {len(superfluous) - 1} more" if superfluous[1:] else ""
        raise cannot(place, f"{superfluous[0]}{more}: the model of config.json has no place for it")


def _read(place: Path, name: str, stored: Stored) -> Tensor:
    with _readable(place):
        value = stored.read()
        if not torch.isfinite(torch.stack(torch.aminmax(value))).all():  # no copy of the tensor, as isfinite of it makes
            raise cannot(place, f"{name} has values that are infinite or not a number")
        return value


def _drop_tied_head(place: Path, shape: _Shape, found: dict[str, Stored]) -> dict[str, Stored]:
    """Leave out a head that is the embedding. Raises InputError where it is said to be, and is not."""
    if shape.tied is None or HEAD not in found:
        return found
    if not torch.equal(found[HEAD].read(), found[shape.tied].read()):
        raise cannot(place, f"{HEAD} is not {shape.tied}, and config.json says tie_word_embeddings")
    return {name: stored for name, stored in found.items() if name != HEAD}
