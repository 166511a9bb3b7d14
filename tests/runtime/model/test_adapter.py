from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from hecompile.errors import InputError
from hecompile.runtime.model.adapter import load_adapter, save_adapter
from tests.support.training import make_base, make_model

IDS = torch.tensor([[1, 70, 80, 90, 100, 2, 0, 0], [1, 75, 2, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 6 + [0] * 2, [1] * 3 + [0] * 5])
Q_PROJ_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_peft_loads_the_saved_adapter_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = make_model().eval()
    directory = save_adapter(model, tmp_path / "adapter", "some/base")
    loaded = peft.PeftModel.from_pretrained(make_base(), directory).eval()
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        actual = loaded(input_ids=IDS, attention_mask=MASK).logits
        without = make_base().eval()(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(actual, expected)
    assert (without - expected).abs().max() > 1e-3
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_a_base_that_is_a_directory_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    save_adapter(make_model(), tmp_path / "adapter", "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_the_files_have_the_keys_that_peft_itself_writes(tmp_path: Path) -> None:
    model = make_model()
    model._peft.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    assert load_file(tmp_path / "ours/adapter_model.safetensors").keys() == model.adapter_state().keys()
    theirs = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert theirs.keys() == model.adapter_state().keys() and Q_PROJ_A in theirs
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_saving_is_deterministic_replaces_an_adapter_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_adapter(make_model(seed=3), tmp_path / "a")
    save_adapter(make_model(), tmp_path / "a")
    save_adapter(make_model(), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_saving_refuses_a_directory_that_is_not_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="precious exists and is not an adapter directory"):
        save_adapter(make_model(), tmp_path / "precious")
    assert contents(tmp_path) == {"precious/thesis.txt": b"x"}


def test_an_adapter_of_another_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(make_model(), tmp_path / "a", "first/model")
    load_adapter(make_model(), tmp_path / "a")
    assert not caplog.records
    load_adapter(make_model(seed=3), tmp_path / "a")
    assert "was trained on another model (first/model)" in caplog.text
    caplog.clear()
    (tmp_path / "a/base.sha256").unlink()  # as PEFT wrote it
    load_adapter(make_model(seed=3), tmp_path / "a")
    assert not caplog.records


def test_loading_restores_every_value_in_place(tmp_path: Path) -> None:
    saved, model = make_model(), make_model(seed=3)
    parameters = model.adapter_state()
    load_adapter(model, save_adapter(saved, tmp_path / "a"))
    for key, value in saved.adapter_state().items():
        assert torch.equal(model.adapter_state()[key], value)
        assert model.adapter_state()[key] is parameters[key]
    assert parameters.keys() == set(saved.adapter_state())
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, state: config.update(lora_alpha=3), "lora_alpha is 3 but the model's is 8"),
        (lambda config, state: config.update(use_rslora=True), "use_rslora is True but the model's is False"),
        (lambda config, state: state.pop(Q_PROJ_A), f"has no values for {Q_PROJ_A}"),
        (lambda config, state: state.update(extra=torch.zeros(1)), "has values that the model has no place for: extra"),
        (
            lambda config, state: state.update({Q_PROJ_A: torch.zeros(4, 31)}),
            f"the shape of {Q_PROJ_A} is [4, 31] but the model's is [4, 32]",
        ),
        (
            lambda config, state: state.update({Q_PROJ_A: torch.full((4, 32), float("nan"))}),
            f"{Q_PROJ_A} has values that are not finite",
        ),
    ],
)
def test_loading_names_what_differs_and_changes_nothing(tmp_path: Path, change, message: str) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    config = json.loads((directory / "adapter_config.json").read_text())
    state = load_file(directory / "adapter_model.safetensors")
    change(config, state)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, directory / "adapter_model.safetensors")
    model = make_model(seed=3)
    before = {key: value.detach().clone() for key, value in model.adapter_state().items()}
    with pytest.raises(InputError) as caught:
        load_adapter(model, directory)
    assert message in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.adapter_state().items())


def saved_settings(directory: Path, **changes: object) -> dict[str, object]:
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))
    return settings


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_matrices_that_are_differences_to_a_changed_base_are_refused(tmp_path: Path, init: str) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=init
    )
    adapted = peft.get_peft_model(make_base(), config)
    adapted.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=f"init_lora_weights is '{init}'; supported: True, False, gaussian, orthogonal"):
        load_adapter(make_model(), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("init_lora_weights", "eva"),
        ("init_lora_weights", "lora_ga"), ("init_lora_weights", "mica"), ("init_lora_weights", 1),
        ("alora_invocation_tokens", [5]), ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("lora_bias", True),
        ("fan_in_fan_out", True), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", None), ("layers_to_transform", "0"), ("layers_to_transform", [0, True]),
        ("modules_to_save", ["lm_head"]), ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [3]), ("loftq_config", {"loftq_bits": 4}), ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}), ("target_parameters", ["q_proj.weight"]), ("exclude_modules", ["q_proj"]),
        ("use_qalora", True), ("use_bdlora", {"nblocks": 2}), ("arrow_config", {"top_k": 1}), ("kasa_config", {"beta": 1}),
        ("lora_ga_config", {"x": 1}), ("velora_config", {"x": 1}), ("monteclora_config", {"x": 1}),
        ("megatron_config", {"tensor_model_parallel_size": 1}), ("ensure_weight_tying", True), ("peft_type", "ADALORA"),
        ("peft_type", None), ("task_type", "SEQ_CLS"), ("r", "4"), ("r", True), ("lora_alpha", None),
        ("lora_alpha", float("nan")), ("target_modules", None), ("a_setting_of_next_year", None),
    ],
)  # fmt: skip
def test_every_setting_must_be_the_models_but_for_those_that_change_nothing(
    tmp_path: Path, name: str, value: object
) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    saved_settings(directory, **{name: value})
    with pytest.raises(InputError, match=rf"a: (adapter_config.json has the setting '{name}'|{name} is )"):
        load_adapter(make_model(seed=3), directory)


def test_every_setting_of_this_peft_is_refused_or_is_on_the_list(tmp_path: Path) -> None:
    """What a later PEFT adds is looked at by nobody: it must be refused until somebody says that it is harmless."""
    directory = save_adapter(make_model(), tmp_path / "a")
    settings, harmless = saved_settings(directory), set()
    for name in sorted(settings):
        saved_settings(directory, **(settings | {name: "of another kind"}))
        try:
            load_adapter(make_model(seed=3), directory)
        except InputError as error:
            assert name in str(error)
        else:
            harmless.add(name)
    assert harmless == {
        "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "lora_dropout",
        "megatron_core", "layers_pattern", "qalora_group_size",
    }  # fmt: skip


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal"])
def test_how_the_matrices_were_drawn_changes_nothing(tmp_path: Path, value: object) -> None:
    directory, model = save_adapter(make_model(), tmp_path / "a"), make_model(seed=3)
    saved_settings(directory, init_lora_weights=value, lora_dropout=0.5, task_type=None)
    load_adapter(model, directory)
    assert torch.equal(model.adapter_state()[Q_PROJ_A], make_model().adapter_state()[Q_PROJ_A])


def test_a_setting_that_is_missing_has_pefts_default(tmp_path: Path) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    settings = saved_settings(directory)
    assert settings.pop("lora_alpha") == 8 == peft.LoraConfig().lora_alpha
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    load_adapter(make_model(seed=3), directory)
    other = save_adapter(make_model(), tmp_path / "b")
    assert settings.pop("r") == 4
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="r is 8 but the model's is 4"):
        load_adapter(make_model(seed=3), other)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj"], "there are matrices for .*down_proj, which target_modules leaves out"),
        (["q_proj", "v_proj", "down_proj", "o_proj"], "target_modules has 'o_proj', and there are no matrices for it"),
        (r".*\.q_proj", "which target_modules leaves out"),
        ("(", "target_modules is no regular expression"),
    ],
)
def test_targets_are_the_modules_with_matrices(tmp_path: Path, targets: object, said: str) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    saved_settings(directory, target_modules=targets)
    with pytest.raises(InputError, match=said):
        load_adapter(make_model(), directory)


@pytest.mark.parametrize(
    ("layers", "pattern", "said"),
    [
        ([0], None, r"matrices for model\.layers\.1\..*, which target_modules with layers_to_transform leaves out"),
        (1, None, r"matrices for model\.layers\.0\..*, which target_modules with layers_to_transform leaves out"),
        ([0, 1], "blocks", r"matrices for model\.layers\.0\..*, which target_modules with layers_to_transform leaves out"),
        ([0, 1], "(", "layers_pattern is no regular expression"),
        ([1, 0], ["layers"], None), ([], None, None), (None, "blocks", None),
    ],
)  # fmt: skip
def test_layers_are_those_with_matrices(
    tmp_path: Path, layers: object, pattern: object, said: str | None
) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    saved_settings(directory, layers_to_transform=layers, layers_pattern=pattern)
    if said is None:
        load_adapter(make_model(), directory)
        return
    with pytest.raises(InputError, match=said):
        load_adapter(make_model(), directory)


def test_an_adapter_that_is_a_pickle_is_not_opened(tmp_path: Path) -> None:
    directory = save_adapter(make_model(), tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle"):
        load_adapter(make_model(), directory)


def test_loading_a_missing_or_damaged_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the PEFT adapter .*nowhere does not exist"):
        load_adapter(make_model(), tmp_path / "nowhere")
    save_adapter(make_model(), tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match=r"no PEFT adapter in .*run: did you mean .*run/adapter\?$"):
        load_adapter(make_model(), tmp_path / "run")
    directory = save_adapter(make_model(), tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(make_model(), directory)
    (directory / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(make_model(), directory)
