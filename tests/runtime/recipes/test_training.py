from __future__ import annotations

from pathlib import Path

import peft
import pytest

from hecompile.errors import InputError
from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.recipes.training import LoraSection, check_lora, load_recipe
from hecompile.runtime.training.trainer import training_arguments
from tests.conftest import ROOT

DEMO = ROOT / "models" / "recipes" / "demo.yaml"
MINIMAL = """\
model: client
worker: tcp://127.0.0.1:7700
data:
  train_file: train.jsonl
training:
  output_dir: /runs/a
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_demo_recipe_is_valid_and_its_data_exist() -> None:
    recipe = load_recipe(DEMO)
    assert recipe.worker == "inprocess"
    assert recipe.data.validation_file is not None
    assert recipe.data.train_file.is_file() and recipe.data.validation_file.is_file()


def test_relative_paths_belong_to_where_they_are_written(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(recipe_file, ["data.validation_file=heldout.jsonl", "worker=unix://w.sock"])
    assert recipe.model == tmp_path / "client"
    assert recipe.data.train_file == tmp_path / "train.jsonl"
    assert recipe.training.output_dir == Path("/runs/a")
    assert recipe.data.validation_file == elsewhere / "heldout.jsonl"
    assert recipe.worker == f"unix://{elsewhere}/w.sock"


def test_overrides_are_yaml_scalars_and_the_last_one_wins(recipe_file: Path) -> None:
    overrides = ["training.max_steps=20", "training.learning_rate=1e-3", "training.max_steps=30", "lora.r=4"]
    recipe = load_recipe(recipe_file, [*overrides, "training.disable_tqdm=true", "training.save_total_limit=null"])
    assert recipe.training.max_steps == 30
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.disable_tqdm is True
    assert recipe.training.save_total_limit is None
    assert recipe.lora == LoraSection(r=4)


def test_training_arguments_have_the_recipes_values(recipe_file: Path) -> None:
    overrides = ["training.warmup_ratio=0.25", "training.seed=5", "training.adam_beta2=0.95", "training.max_steps=8"]
    arguments = training_arguments(load_recipe(recipe_file, overrides).training)
    assert arguments.get_warmup_steps(8) == 2
    assert (arguments.seed, arguments.data_seed, arguments.adam_beta2, arguments.max_steps) == (5, 5, 0.95, 8)
    assert (arguments.use_cpu, arguments.report_to, arguments.push_to_hub) == (True, [], False)
    assert load_recipe(recipe_file, ["training.data_seed=9"]).training.order_seed == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rte=1", "unknown key training.learning_rte; did you mean training.learning_rate?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean training.learning_rate?"),
        ("data.max_steps=1", "unknown key data.max_steps; did you mean training.max_steps?"),
        ("trainning.max_steps=1", "unknown key trainning; did you mean training?"),
        ("lora.rank_of_everything=1", "unknown key lora.rank_of_everything"),
        ("model.x=1", "override model.x: model is not a section of the recipe"),
        ("training.max_steps", "must have the form key=value"),
        ("training.max_steps=[", "override training.max_steps: the value is not valid YAML"),
        ("training.max_steps=two", "training.max_steps: Input should be a valid integer, got 'two'"),
        ("training.max_steps=0", "training.max_steps: must be at least 1, or -1"),
        ("training.learning_rate=-1", "training.learning_rate: Input should be greater than 0"),
        ("training.learning_rate=.nan", "training.learning_rate: Input should be"),
        ("training.warmup_steps=2.5", "training.warmup_steps: must be a whole number"),
        ("training.eval_strategy=steps", "training: eval_strategy: steps needs eval_steps"),
        ("training.eval_steps=2", "give data.validation_file"),
        ("training.lr_scheduler_type=cosin", "training.lr_scheduler_type: Input should be 'linear'"),
        ("worker=ftp://x:1", "needs tcp://, grpc://, grpcs://, flight:// or flights://host:port"),
        ("worker=[tcp://a:1,tcp://a:1]", "worker names an address twice"),
        ("worker=unix://", "or unix:///path, or a fleet's directory at http:// or https://, or inprocess"),
        ("worker=[]", "yaml: worker: needs an address, such as tcp://127.0.0.1:7700, or a list of addresses"),
        ("worker=[tcp://a:1,2]", "yaml: worker: needs an address"),
        ("worker=7700", "yaml: worker: needs an address"),
        ("range_loss.alhpa=1", "unknown key range_loss.alhpa; did you mean range_loss.alpha?"),
        ("worker=inprocess", "worker: inprocess needs worker_bundle"),
        ("engine=torch", "engine is the worker's own choice"),
        ("engine=cuda", "engine: Input should be 'auto', 'vnni', 'torch', 'torch-cuda', 'onnxruntime' or 'cleartext'"),
    ],
)
def test_a_wrong_override_gives_one_line_that_names_the_key(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_suggested_is_another_key_and_one_of_that_kind_of_recipe(recipe_file: Path) -> None:
    power = DEMO.with_name("convert-power.yaml")
    for path, overrides, message in (
        (power, ["training.save_strategy=no"], "unknown key training.save_strategy"),  # a key of training recipes
        (power, ["training.step=1"], "unknown key training.step; did you mean training.steps?"),
    ):
        with pytest.raises(InputError) as caught:
            load_conversion(path, overrides)
        assert str(caught.value) == f"recipe {path}: {message}"
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, ["training.steps=1"])  # a key of conversion recipes
    assert str(caught.value).endswith("unknown key training.steps; did you mean training.max_steps?")
    recipe_file.write_text(MINIMAL.replace("data:\n  train_file: train.jsonl", "data:"))
    with pytest.raises(InputError, match=r"override data\.train_file: data is not a section of the recipe$"):
        load_recipe(recipe_file, ["data.train_file=x"])


def test_conflicting_warmups_are_refused(recipe_file: Path) -> None:
    with pytest.raises(InputError, match="warmup_steps or warmup_ratio, not both"):
        load_recipe(recipe_file, ["training.warmup_steps=2", "training.warmup_ratio=0.1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a YAML mapping with the keys model, worker"),
        ("- a\n", "must be a YAML mapping"),
        ("model: [\n", "is not valid YAML"),
        ("model: a\nmodel: b\n", "repeated or non-text key 'model'"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (MINIMAL.replace("  train_file: train.jsonl", "  {}"), "the key data.train_file is missing"),
        (MINIMAL.replace("train_file", "train_fil"), "unknown key data.train_fil; did you mean data.train_file?"),
        (MINIMAL.replace("train.jsonl", "7"), "data.train_file: needs a path, got 7"),
    ],
)
def test_a_wrong_file_gives_one_error(recipe_file: Path, text: str, message: str) -> None:
    recipe_file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)


def test_a_missing_or_binary_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the recipe .*none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_lora_settings_may_only_repeat_the_exported_ones() -> None:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "q_proj"])
    check_lora(None, config)
    check_lora(LoraSection(r=8, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj"]), config)
    with pytest.raises(InputError, match=r"lora\.r is 4 but the model was exported with 8"):
        check_lora(LoraSection(r=4), config)
    with pytest.raises(InputError, match=r"lora\.target_modules is .* exported with \['q_proj', 'v_proj'\]"):
        check_lora(LoraSection(target_modules=["q_proj"]), config)
    with pytest.raises(InputError, match=r"lora\.layers_to_transform is \[1\] but the model was exported with None"):
        check_lora(LoraSection(layers_to_transform=[1]), config)
    upper = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern=["layers"])
    check_lora(LoraSection(layers_to_transform=[2, 1], layers_pattern=["layers"]), upper)
    with pytest.raises(InputError, match=r"lora\.layers_to_transform is \[1\] but the model was exported with \[1, 2\]"):
        check_lora(LoraSection(layers_to_transform=[1]), upper)


def test_a_prefix_cache_is_a_size_or_a_section(recipe_file: Path) -> None:
    short = load_recipe(recipe_file, ["prefix_cache=2GB"]).prefix_cache
    assert short is not None and (short.size, short.directory, short.dtype) == (2 * 10**9, None, "bfloat16")
    other = load_recipe(recipe_file, ["prefix_cache={size: 1.5GiB, directory: kept, dtype: float32}"]).prefix_cache
    assert other is not None and other.size == 3 * 2**29 and other.directory == Path.cwd() / "kept"


@pytest.mark.parametrize("size", ["banana", "true", "-1", "2 XB", "2GB\\n"])
def test_a_prefix_cache_without_a_size_is_refused(recipe_file: Path, size: str) -> None:
    with pytest.raises(InputError, match="prefix_cache"):
        load_recipe(recipe_file, [f"prefix_cache={size}"])


@pytest.mark.parametrize("size", ["-5", "lots", "null", "true", "[1]"])
def test_a_hint_cache_that_is_no_size_is_refused(recipe_file: Path, size: str) -> None:
    with pytest.raises(InputError, match=r"connection\.hint_cache: must be a number of bytes, such as 2GB"):
        load_recipe(recipe_file, [f"connection.hint_cache={size}"])


def test_a_prefix_cache_is_not_for_range_loss(recipe_file: Path) -> None:
    with pytest.raises(InputError, match="range_loss looks into the layers that prefix_cache computes once: drop one"):
        load_recipe(recipe_file, ["prefix_cache=2GB", "range_loss={}"])
