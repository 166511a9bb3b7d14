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


def test_loading_a_missing_or_damaged_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no PEFT adapter in .*nowhere"):
        load_adapter(make_model(), tmp_path / "nowhere")
    directory = save_adapter(make_model(), tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(make_model(), directory)
    (directory / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(make_model(), directory)
