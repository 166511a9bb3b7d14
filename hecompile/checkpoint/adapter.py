"""Read LoRA adapters in PEFT's format, and refuse one whose settings mean another function than B·A·lora_alpha/r.

PEFT has some thirty settings, and adds more: some change the base model's weights (PiSSA, OLoRA), some where or when the
matrices act. Each setting must therefore be the one wanted, but for those of a list that change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hecompile.checkpoint.folder import check_links
from hecompile.checkpoint.values import show
from hecompile.errors import InputError
from hecompile.files import missing_path_hint, reason_of

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Those that leave the base model as it is: they only drew the matrices, which are in the file (peft/tuners/lora/layer.py).
pissa, olora, corda, loftq and lora_ga change its weights, and their matrices are differences to the changed ones."""


def _any(value: object) -> bool:
    return True


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are(value: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(kind, value))


_HARMLESS: dict[str, Callable[[object], bool]] = {
    "peft_version": _any,  # who wrote the file
    "base_model_name_or_path": _any,  # where the base came from; `base.sha256` tells models apart
    "revision": _any,  # of that base
    "auto_mapping": _any,  # the classes that PEFT would load the base by; here it is loaded already
    "task_type": lambda value: (
        value in (None, "CAUSAL_LM")
    ),  # PEFT's wrapper around the same function; others add a head
    "inference_mode": _any,  # whether PEFT lets the matrices be trained on
    "lora_dropout": _any,  # acts in training alone, where the model's own counts
    "runtime_config": _any,  # where PEFT computes
    "init_lora_weights": lambda value: isinstance(value, (bool, str)) and value in _INITIALISATIONS,
    "megatron_core": _any,  # a module that PEFT imports where megatron_config is set, and that must not be
    # Which modules have matrices is compared with the matrices in `check_targets`.
    "target_modules": lambda value: isinstance(value, (list, str)),
    "layers_to_transform": lambda value: value is None or _is_index(value) or _are(value, _is_index),
    "layers_pattern": lambda value: value is None or isinstance(value, str) or _are(value, _is_text),
    "qalora_group_size": _any,  # read where use_qalora is set, and that must not be
}
"""The settings that may differ, each with the values for which it changes nothing."""
_SUPPORTED = {
    "init_lora_weights": ", ".join(map(str, _INITIALISATIONS)) + "; others change the base model's weights",
    "task_type": "CAUSAL_LM",
    "target_modules": "a list of names, or a regular expression",
    "layers_to_transform": "a layer's index, or a list of them",
    "layers_pattern": "a name, or a list of names",
}


def read_settings(directory: Path) -> dict[str, Any]:
    """Return every setting of an adapter; one that its file lacks has PEFT's default.

    Raises InputError where there is no adapter, its file cannot be read, or a setting is none of this PEFT.
    """
    if (missing := missing_path_hint(directory)) is not None:
        raise InputError(f"the PEFT adapter {missing}")
    if not directory.is_dir():
        raise InputError(f"no PEFT adapter in {directory}: it is no directory")
    check_links(directory, (CONFIG_FILE, WEIGHTS_FILE))
    path = directory / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError
    except OSError as error:
        meant = directory / "adapter"  # of a run
        found = (meant / CONFIG_FILE).is_file()
        reason = f"did you mean {meant}?" if found else f"{CONFIG_FILE}: {reason_of(error)}"
        raise InputError(f"no PEFT adapter in {directory}: {reason}") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"the adapter in {directory} is damaged: {CONFIG_FILE} holds no JSON object; save it again"
        ) from None
    defaults = default_settings()
    if unknown := sorted(settings.keys() - defaults.keys() - _HARMLESS.keys()):
        raise InputError(
            f"adapter {directory}: {CONFIG_FILE} has the setting {show(unknown[0])}, which PEFT {peft.__version__} does not "
            "know: what it changes is not known either"
        )
    return defaults | settings


def default_settings() -> dict[str, Any]:
    """Return PEFT's defaults of all settings of LoRA, as its files have them."""
    return plain_settings(peft.LoraConfig())


def plain_settings(config: peft.LoraConfig) -> dict[str, Any]:
    """Return a configuration as PEFT's files have it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=jsonable))
    return plain


def check_settings(
    directory: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any], free: Iterable[str] = ()
) -> None:
    """Raise InputError for the first setting that is not the one wanted and may change what the adapter computes.

    wanted: the model's own settings, as `plain_settings` returns them. free: settings that the caller takes over.
    """
    for name, value in settings.items():
        if name in free or (name in _HARMLESS and _HARMLESS[name](value)) or _same(value, wanted.get(name)):
            continue
        if name in _HARMLESS:
            raise InputError(f"adapter {directory}: {name} is {show(value)}; supported: {_SUPPORTED[name]}")
        raise InputError(f"adapter {directory}: {name} is {show(value)} but the model's is {show(wanted.get(name))}")


def check_targets(directory: Path, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError unless the settings name exactly the modules that have matrices, by PEFT's own rule.

    settings: as `read_settings` returns them, `target_modules`, `layers_to_transform` and `layers_pattern` checked.
    """
    modules = {match["module"] for name in names if (match := _MATRIX.fullmatch(name))}
    targets = settings["target_modules"]
    if targets == "all-linear":  # PEFT writes what it found in place of this
        return
    layers = settings.get("layers_to_transform")
    pattern = None if layers is None else settings.get("layers_pattern")  # without layers it means nothing
    try:
        config = peft.LoraConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
        left_out = sorted(module for module in modules if not is_target(config, module))
    except re.error as error:
        which = "target_modules" if isinstance(targets, str) else "layers_pattern"
        raise InputError(f"adapter {directory}: {which} is no regular expression: {error}") from None
    except ValueError as error:  # settings that PEFT does not take together
        raise InputError(f"adapter {directory}: {error}") from None
    unused = [] if isinstance(targets, str) else [t for t in targets if not any(_targets(t, module) for module in modules)]
    if left_out:
        which = "target_modules" if layers is None else "target_modules with layers_to_transform"
        raise InputError(f"adapter {directory}: there are matrices for {left_out[0]}, which {which} leaves out")
    if unused:
        raise InputError(f"adapter {directory}: target_modules has {show(unused[0])}, and there are no matrices for it")


def is_target(config: peft.LoraConfig, module: str) -> bool:
    """Tell whether PEFT puts an adapter with this configuration on the module of that path in the base model."""
    return bool(check_target_module_exists(config, module))


def read_matrices(directory: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors by name. Raises InputError where they cannot be read or are not finite."""
    path = directory / WEIGHTS_FILE
    if not path.is_file() and (pickle := directory / "adapter_model.bin").is_file():
        raise InputError(
            f"no PEFT adapter in {directory}: {pickle.name} is a pickle, which can run code and is not opened; load it "
            "where you trust it, and save it again"
        )
    try:
        state: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise InputError(f"no PEFT adapter in {directory}: {reason_of(error)}") from None
    except (ValueError, SafetensorError):
        raise InputError(
            f"the adapter in {directory} is damaged: {WEIGHTS_FILE} cannot be read; save it again"
        ) from None
    for name, value in state.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise InputError(f"adapter {directory}: {name} has values that are not finite")
    return state


def jsonable(value: object) -> object:
    """Turn what PEFT keeps as a set into a list in a fixed order, for `json.dumps`."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)  # PEFT keeps target_modules as a set, whose order differs from run to run
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _targets(target: object, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _same(value: object, wanted: object) -> bool:
    """Compare settings. PEFT takes null for an empty object, and a number for true or false is none of its values."""
    if value in (None, {}) and wanted in (None, {}):
        return True
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted
