"""Read the rotary embedding's settings, and refuse those whose frequencies change with the length of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hecompile.checkpoint.values import number, show
from hecompile.errors import InputError

_DEFAULT_THETA = 10000.0
_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Types whose frequencies are constants, and the numbers that each needs."""


def read_rope(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` for transformers' LlamaConfig. Raises InputError naming the key and what is supported.

    Older files have rope_theta beside rope_scaling, and `type` in place of rope_type.
    """
    key = "rope_scaling" if config.get("rope_scaling") is not None else "rope_parameters"
    section = config.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise InputError(f"{where}: {key} must be an object, got {show(section)}")
    section = dict(section or {})
    older = section.pop("type", None)
    kind = section.pop("rope_type", older) or "default"
    if not isinstance(kind, str) or kind not in _SETTINGS:
        raise InputError(f"{where}: {key} has rope_type {show(kind)}; supported: {', '.join(_SETTINGS)}")
    theta = section.pop("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    read: dict[str, Any] = {"rope_type": kind, "rope_theta": number(where, "rope_theta", theta)}
    part = section.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is not None and part != 1:
        raise InputError(f"{where}: partial_rotary_factor is {show(part)}; supported: 1")
    for name in _SETTINGS[kind]:
        fallback = config.get("max_position_embeddings") if name == "original_max_position_embeddings" else None
        if (value := section.pop(name, fallback)) is None:
            raise InputError(f"{where}: {key} lacks {name}, which rope_type {kind} needs")
        read[name] = number(where, f"{key}.{name}", value)
    if unknown := sorted(section):
        raise InputError(f"{where}: {key} has {show(unknown[0])}, which rope_type {kind} does not know")
    if kind == "llama3" and read["low_freq_factor"] >= read["high_freq_factor"]:
        raise InputError(f"{where}: {key}.low_freq_factor must be less than high_freq_factor")
    return read
