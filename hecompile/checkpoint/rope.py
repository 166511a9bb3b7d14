"""Read the rotary embedding's settings, and say up to which length of a text its frequencies are constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hecompile.checkpoint.values import flag, number, show
from hecompile.errors import InputError

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types whose frequencies are others for texts beyond a length."""
_ORIGINAL = "original_max_position_embeddings"


def _numbers(where: str, key: str, value: object) -> list[float | int]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {key} must be a list of numbers, got {show(value)}")
    return [number(where, key, each) for each in value]


@dataclass(frozen=True)
class _Type:
    """Hold the keys that a type needs, and those that it may have."""

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


_TYPES = {
    "default": _Type(),
    "linear": _Type(("factor",)),
    "dynamic": _Type(("factor",)),
    "yarn": _Type(
        ("factor", _ORIGINAL), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": _Type(("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    "llama3": _Type(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
}
_READERS: dict[str, Callable[[str, str, object], Any]] = {
    "short_factor": _numbers, "long_factor": _numbers, "truncate": flag,
}  # fmt: skip
"""How values are read that are no numbers."""


@dataclass(frozen=True)
class RopeRules:
    """Say what a family's rotary embedding may be.

    types: the names of types. theta: the default base. partial: the part of a head that is turned, by default; None where
    it must be all. width: features of a head. aliases: older names of types.
    """

    types: tuple[str, ...]
    theta: float
    width: int
    partial: float | None = None
    aliases: Mapping[str, str] | None = None


def read_rope(where: str, config: Mapping[str, Any], rules: RopeRules) -> dict[str, Any]:
    """Return `rope_parameters` for a configuration of transformers. Raises InputError naming the key and what is supported.

    Older files have rope_theta beside rope_scaling, and `type` in place of rope_type.
    """
    key = "rope_scaling" if config.get("rope_scaling") is not None else "rope_parameters"
    section = config.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise InputError(f"{where}: {key} must be an object, got {show(section)}")
    section = dict(section or {})
    older = section.pop("type", None)
    kind = section.pop("rope_type", older) or "default"
    if isinstance(kind, str):
        kind = (rules.aliases or {}).get(kind, kind)
    if not isinstance(kind, str) or kind not in rules.types:
        raise InputError(f"{where}: {key} has rope_type {show(kind)}; supported: {', '.join(rules.types)}")
    theta = section.pop("rope_theta", config.get("rope_theta", rules.theta))
    read: dict[str, Any] = {"rope_type": kind, "rope_theta": number(where, "rope_theta", theta)}
    if (part := _part(where, section, config, rules)) is not None:
        read["partial_rotary_factor"] = part
    fallbacks = {_ORIGINAL: config.get(_ORIGINAL) or config.get("max_position_embeddings")}
    for name in (*_TYPES[kind].needs, *_TYPES[kind].may):
        value = section.pop(name, None)
        value = fallbacks.get(name) if value is None else value
        if value is not None:
            read[name] = _READERS.get(name, number)(where, f"{key}.{name}", value)
        elif name in _TYPES[kind].needs:
            raise InputError(f"{where}: {key} lacks {name}, which rope_type {kind} needs")
    if unknown := sorted(section):
        raise InputError(f"{where}: {key} has {show(unknown[0])}, which rope_type {kind} does not know")
    if kind == "llama3" and read["low_freq_factor"] >= read["high_freq_factor"]:
        raise InputError(f"{where}: {key}.low_freq_factor must be less than high_freq_factor")
    pairs = int(rules.width * (part or 1)) // 2
    for name in ("short_factor", "long_factor"):
        if len(read.get(name, ())) not in (0, pairs):
            raise InputError(f"{where}: {key}.{name} has {len(read[name])} numbers, and a head turns {pairs} pairs")
    return read


def _part(where: str, section: dict[str, Any], config: Mapping[str, Any], rules: RopeRules) -> float | None:
    """Return the part of a head that is turned; None where it must be all."""
    part = section.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rules.partial is None:
        if part is not None and part != 1:
            raise InputError(f"{where}: partial_rotary_factor is {show(part)}; supported: 1")
        return None
    part = number(where, "partial_rotary_factor", rules.partial if part is None else part)
    if part > 1 or int(rules.width * part) % 2 or int(rules.width * part) == 0:
        raise InputError(f"{where}: partial_rotary_factor {part} of {rules.width} features are no pairs to turn")
    return part


def longest_exact(config: Any) -> tuple[int, str]:
    """Return how long a text of this model may be, and what that is: longer ones have other frequencies, or no positions.

    config: of transformers, read by `hecompile.checkpoint.configuration.read_configuration`.
    """
    longest = int(config.max_position_embeddings)
    what = f"the model's {longest} positions"
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]
    for part in nested or [parameters]:
        if part.get("rope_type") == "longrope" and part[_ORIGINAL] < longest:
            longest = int(part[_ORIGINAL])
            what = f"the {longest} positions up to which longrope has its short factors; all of a longer text has others"
    return longest, what
