"""Read a model's config.json: every setting that decides what is computed is checked, and no other one is taken over.

A library that reads the file itself obeys keys that nobody asked for (a precision, a quantiser, defaults of generation) and
meets a malformed value somewhere in the middle of its work. Here the error comes first, and names file, key and value. A
setting that a family (`hecompile.checkpoint.families`) does not list must have the value that transformers takes by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from hecompile.checkpoint.families import FAMILIES, SUPPORTED, Family
from hecompile.checkpoint.folder import CONFIG, GENERATION_CONFIG, read_object, refuse_code
from hecompile.checkpoint.quantised import check_quantisation
from hecompile.checkpoint.rope import RopeRules, read_rope
from hecompile.checkpoint.values import show
from hecompile.errors import InputError

POLYNOMIAL_KEY = "hecompile_polynomial"
"""What a converted checkpoint was trained for (`hecompile.compiler.polynomial_options`)."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,), "is_decoder": (False, True),
}  # fmt: skip
_HANDLED = frozenset(
    {"rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "layer_types", "no_rope_layers"}
)
_WITHOUT_EFFECT = frozenset(
    {
        "initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "classifier_dropout", "summary_type",
        "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        *(field.name for field in dataclasses.fields(PretrainedConfig)),
    }
)  # fmt: skip
"""Keys that do not change the logits of a text. Dropout of the frozen model is off: LoRA has its own."""
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_configuration(directory: Path) -> PretrainedConfig:
    """Return the configuration of the checkpoint in `directory`, made of checked values alone.

    Raises InputError naming file, key and value, and what is supported.
    """
    path = directory / CONFIG
    config, where = read_object(path), str(path)
    family = _check_architecture(path, config)
    kind: Any = getattr(transformers, family.configuration)
    names = kind.attribute_map
    config = {names[key]: value for key, value in config.items() if key in names} | {
        key: value for key, value in config.items() if key not in names
    }
    defaults = {names.get(each.name, each.name): each.default for each in dataclasses.fields(kind)}
    settings = _read_settings(where, config, family, defaults)
    named = _Named(names, defaults | settings)
    _check_sizes(where, named, turned=bool(family.rope))
    settings |= _read_layers(where, config, defaults, named["num_hidden_layers"])
    settings |= _read_tokens(where, config, defaults, named["vocab_size"])
    if family.rope:
        settings["rope_parameters"] = _read_rope(where, config, family, kind, named)
    if config.get(POLYNOMIAL_KEY) is not None:
        settings[POLYNOMIAL_KEY] = config[POLYNOMIAL_KEY]
    try:
        made: PretrainedConfig = kind(**settings, **family.fixed)
    except Exception as error:  # transformers' own checks, of what is left
        raise InputError(f"{where}: transformers refuses it: {' '.join(str(error).split())}") from error
    if "sliding_attention" in (getattr(made, "layer_types", None) or ()) and made.sliding_window is None:
        raise InputError(
            f"{where}: layer_types has sliding_attention, and there is no window: sliding_window is "
            f"{show(config.get('sliding_window'))}, use_sliding_window {show(config.get('use_sliding_window', False))}"
        )
    return made


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a configuration. Raises InputError where it is none of the table."""
    if config.model_type not in FAMILIES:
        raise InputError(f"the model has architecture {config.model_type!r}; supported: {SUPPORTED}")
    return FAMILIES[config.model_type]


def read_answer_ends(directory: Path, config: PretrainedConfig) -> list[int]:
    """Return the ids of the tokens that end an answer: those of generation_config.json, then those of config.json.

    Nothing else of generation_config.json is read. Raises InputError for ids that are outside of the vocabulary.
    """
    path, own = directory / GENERATION_CONFIG, config.eos_token_id
    found: list[int] = []
    if path.is_file():
        value = read_object(path).get("eos_token_id")
        found = _tokens(str(path), "eos_token_id", value, config.vocab_size)
    return list(dict.fromkeys([*found, *(own if isinstance(own, list) else [] if own is None else [own])]))


@dataclasses.dataclass(frozen=True)
class _Named:
    """Look up settings by their common names, as transformers' `attribute_map` has them."""

    names: Mapping[str, str]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.settings.get(self.names.get(name, name))


def _check_architecture(path: Path, config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    refuse_code(path, config, () if family is None else family.own_code)
    if family is None:
        raise InputError(f"{path}: the model has architecture {show(kind)}; supported: {SUPPORTED}")
    classes = config.get("architectures")
    known = (family.model, family.decoder)
    if classes is not None and not (isinstance(classes, list) and any(name in known for name in classes)):
        raise InputError(f"{path}: architectures is {show(classes)}; supported: {family.model}")
    check_quantisation(path, config)
    for key, supported in _FIXED.items():
        if config.get(key) is not None and config[key] not in supported:
            raise InputError(f"{path}: {key} is {show(config[key])}; supported: {show(supported[0])}")
    return family


def _read_settings(
    where: str, config: Mapping[str, Any], family: Family, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that the file has and the family lists; everything else must be the default."""
    settings = {}
    for key, rule in family.settings.items():
        if key not in config and rule.required:
            raise InputError(f"{where} lacks {key}; save the model again by save_pretrained")
        if key in config and (config[key] is not None or rule.required or rule.nullable):
            settings[key] = rule.read(where, key, config[key])
    known = family.settings.keys() | _HANDLED | _WITHOUT_EFFECT | _FIXED.keys() | family.fixed.keys()
    for key in defaults.keys() & config.keys() - known:
        if config[key] not in (None, [], defaults[key]):
            raise InputError(f"{where}: {key} is {show(config[key])}; supported: {show(defaults[key])}")
    return settings


def _check_sizes(where: str, named: _Named, turned: bool) -> None:
    heads, hidden = named["num_attention_heads"], named["hidden_size"]
    groups, width = named["num_key_value_heads"], named["head_dim"]
    if hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if groups is not None and heads % groups:
        raise InputError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
    width = hidden // heads if width is None else width
    experts, chosen = named["num_local_experts"], named["num_experts_per_tok"]
    if experts is not None and chosen > experts:
        raise InputError(f"{where}: num_experts_per_tok is {chosen}, and there are {experts} experts")
    if turned and width % 2:
        raise InputError(f"{where}: a head has {width} features, and the rotary embedding turns pairs of them")


def _read_layers(
    where: str, config: Mapping[str, Any], defaults: Mapping[str, Any], layers: int
) -> dict[str, list[Any]]:
    """Return the lists with one entry per layer: which attend within a window, which have rotary embeddings."""
    read: dict[str, list[Any]] = {}
    for key, words in (("layer_types", _LAYER_TYPES), ("no_rope_layers", (0, 1))):
        value = config.get(key)
        if value is None or key not in defaults:
            continue
        if not isinstance(value, list) or len(value) != layers or any(each not in words for each in value):
            choice = " or ".join(map(str, words))
            raise InputError(f"{where}: {key} must be a list of {layers}, each {choice}, got {show(value)}")
        read[key] = value
    return read


def _read_tokens(
    where: str, config: Mapping[str, Any], defaults: Mapping[str, Any], vocabulary: int
) -> dict[str, int | list[int] | None]:
    ends = _tokens(where, "eos_token_id", _or_default(config, defaults, "eos_token_id", vocabulary), vocabulary)
    read: dict[str, int | list[int] | None] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for key in ("bos_token_id", "pad_token_id"):
        read[key] = _token(where, key, _or_default(config, defaults, key, vocabulary), vocabulary)
    return read


def _or_default(config: Mapping[str, Any], defaults: Mapping[str, Any], key: str, vocabulary: int) -> object:
    """Return a value of the file, or the default where that is a token of this vocabulary."""
    default = defaults.get(key)
    return config.get(key, default if isinstance(default, int) and default < vocabulary else None)


def _read_rope(where: str, config: Mapping[str, Any], family: Family, kind: Any, named: _Named) -> dict[str, Any]:
    width = named["head_dim"] or named["hidden_size"] // named["num_attention_heads"]
    sizes = {"max_position_embeddings": named["max_position_embeddings"]}
    if (original := named["original_max_position_embeddings"]) is not None:
        sizes["original_max_position_embeddings"] = original
    given = {**config, **sizes}
    if isinstance(kind.default_theta, Mapping):  # one embedding for each type of layer
        return _read_two_ropes(where, given, family, kind.default_theta, width)
    for name, own in family.rope_keys.items():
        if own in config:
            given.setdefault(name, config[own])
    rules = RopeRules(family.rope, kind.default_theta, width, family.partial, family.rope_aliases)
    return read_rope(where, given, rules)


def _read_two_ropes(
    where: str, config: Mapping[str, Any], family: Family, thetas: Mapping[str, float], width: int
) -> dict[str, Any]:
    """Read the embeddings of full and of windowed attention; older files have the first beside rope_local_base_freq."""
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise InputError(f"{where}: rope_parameters must be an object, got {show(nested)}")
    base = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    full = {"rope_scaling": config.get("rope_scaling"), "rope_theta": config.get("rope_theta", thetas["global"])}
    local = {"rope_theta": config.get("rope_local_base_freq", thetas["local"])}
    if unknown := sorted(nested.keys() - set(_LAYER_TYPES)):
        raise InputError(f"{where}: rope_parameters has {show(unknown[0])}; supported: {', '.join(_LAYER_TYPES)}")
    return {
        name: read_rope(
            where,
            {**base, **older, "rope_parameters": nested.get(name)},
            RopeRules(family.rope, thetas["local"], width),
        )
        for name, older in (("full_attention", full), ("sliding_attention", local))
    }


def _token(where: str, key: str, value: object, vocabulary: int) -> int | None:
    """Return the id of a token, None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
        raise InputError(
            f"{where}: {key} is {show(value)}, which is no token: the vocabulary has ids 0 to {vocabulary - 1}"
        )
    return value


def _tokens(where: str, key: str, value: object, vocabulary: int) -> list[int]:
    """Return the ids of a token or of a list of tokens, none for null."""
    ids = [_token(where, key, each, vocabulary) for each in (value if isinstance(value, list) else [value])]
    return [each for each in ids if each is not None]
