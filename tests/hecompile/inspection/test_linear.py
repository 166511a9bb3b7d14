"""Show a build in tables and as JSON: totals first, then one row per kind of linear, at 80 columns."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from transformers import LlamaConfig
from typer.testing import CliRunner

from hecompile.bundles.client import ClientBundle
from hecompile.cli.main import app
from hecompile.inspection.ckks import bundle_json, open_bundle
from hecompile.inspection.kinds import inside_layer, kind_of, layer_of, numbers, span
from hecompile.inspection.linear import (
    Product,
    Totals,
    circuits_without_gradient,
    predicted_traffic,
    products_of,
    reached_precision,
)
from hecompile.inspection.linear_json import plan_json
from hecompile.inspection.linear_tables import kinds_table, noise_table, products_table, totals_table
from hecompile.inspection.prediction import ModelSize, megabytes, prediction_json
from tests.conftest import ROOT

QKV = "self_attn.q_proj-k_proj-v_proj"


@pytest.fixture(scope="module")
def bundle(build: Path) -> ClientBundle:
    return ClientBundle.open(build / "client")


@pytest.fixture(scope="module")
def products(bundle: ClientBundle) -> list[Product]:
    return products_of(bundle)


def rendered(table: RenderableType, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def rows_below(text: str, name: str) -> list[list[str]]:
    """Return the cells of the two rows of numbers under a name."""
    lines = text.splitlines()
    start = lines.index(f" {name}")
    return [lines[start + offset].replace(" → ", "→").split() for offset in (1, 2)]


def test_one_row_per_kind_and_direction(products: list[Product]) -> None:
    text = rendered(kinds_table(products))
    assert [line for line in text.splitlines() if line.startswith(" model.")] == [
        f" model.layers.*.{name}" for name in (QKV, "self_attn.o_proj", "mlp.gate_proj-up_proj", "mlp.down_proj")
    ]
    forward, backward = rows_below(text, f"model.layers.*.{QKV}")
    bits = [(p.upload_bits, p.reply_bits) for p in products if p.linear == f"model.layers.1.{QKV}"]
    (up, down), (back_up, back_down) = bits
    assert forward[:4] == ["forward", "2", "32→64", "10"] and forward[5:] == [str(up * 4), str(down * 8)]
    assert backward[:4] == ["backward", "1", "64→32", "10"] and backward[5:] == [str(back_up * 8), str(back_down * 4)]


def test_what_differs_between_layers_is_a_range(products: list[Product]) -> None:
    """Sees weight bits, precision and bytes of each layer, and puts apart only what is of another kind."""
    known = [product for product in products if product.linear == f"model.layers.0.{QKV}"]
    known = [replace(product, weight_bits=8, effective_bits=8.5, bytes_up=3 * 32, bytes_down=128) for product in known]
    other = [
        replace(product, linear=f"model.layers.7.{QKV}", weight_bits=12, effective_bits=11.25, bytes_up=4 * 32)
        for product in known
    ]
    text = rendered(kinds_table([*known, *other]))
    assert rows_below(text, f"model.layers.*.{QKV}")[0][1:] == ["2", "32→64", "8–12", "8.5–11.2", "96–128", "128"]


def test_tables_fit_80_columns_with_whole_names(bundle: ClientBundle, products: list[Product]) -> None:
    large = [
        replace(
            product, linear=product.linear.replace("mlp", "mlp.experts.17"), in_features=14336, out_features=128256,
            effective_bits=value, bytes_up=4 * 14336 * value, bytes_down=256512 - value, noise_std=1.234e5 * value,
        )
        for product in products
        for value in (9, 11)
    ]  # fmt: skip
    for table in (kinds_table(large), products_table(large), noise_table(large), totals_table(bundle, products)):
        text = rendered(table)
        assert max(map(len, text.splitlines())) <= 80
    assert " model.layers.*.mlp.experts.*.gate_proj-up_proj\n" in rendered(kinds_table(large))
    assert " model.layers.1.mlp.experts.17.gate_proj-up_proj\n" in rendered(noise_table(large))


def test_layers_shows_every_product(products: list[Product]) -> None:
    text = rendered(products_table(products))
    assert text.count("\n model.layers.") == text.count("   forward") == 8 and text.count("   backward") == 7
    (forward, _) = rows_below(text, "model.layers.1.mlp.down_proj")
    assert forward[1:3] == ["48→32", "10"] and 8.0 <= float(forward[3]) < 16.0
    noise = rows_below(rendered(noise_table(products)), "model.layers.1.mlp.down_proj")[0]
    (product,) = [p for p in products if p.linear == "model.layers.1.mlp.down_proj" and p.direction == "forward"]
    assert forward[4:] == [str(product.upload_bits * 48 // 8), str(product.reply_bits * 32 // 8)]
    bits = [str(product.upload_bits), str(product.reply_bits)]
    assert noise[1:4] == [*bits, f"{product.noise_std:.4g}"] and noise[5] == str(product.input_bound)


def test_totals(bundle: ClientBundle, products: list[Product], build: Path) -> None:
    """Per layer: qkv 32 → 64, o 32 → 32, gate and up 32 → 96, down 48 → 32. Up to 3 bytes up everywhere. There is
    no backward product of the first layer's qkv: no adapter stands before it."""
    traffic = {
        name: (p.upload_bits * p.in_features // 8, p.reply_bits * p.out_features // 8) for name, p in bundle.circuits.items()
    }
    up, down = (sum(sizes) for sizes in zip(*traffic.values(), strict=True))
    forward_up, forward_down = (sum(sizes) for sizes in zip(
        *(sizes for name, sizes in traffic.items() if name.endswith(".forward")), strict=True
    ))  # fmt: skip
    weights = 2 * (32 * 64 + 32 * 32 + 32 * 96 + 48 * 32)
    totals = Totals.of(bundle, products)
    assert totals.step_tokens == 2 * 16 and totals.remote_weights == weights
    # Two bytes of weight by three of input, of which five products count modulo 2^24.
    assert totals.forward.multiplications == 5 * weights
    assert totals.backward.multiplications == 5 * (weights - 32 * 64)
    assert totals.client_disk == sum(file.stat().st_size for file in (build / "client").rglob("*") if file.is_file())
    assert totals.worker_disk is not None and totals.worker_disk > 4 * weights
    text = rendered(totals_table(bundle, products), 120)
    assert f"{up} up, {down} down" in text
    assert f"{forward_up} up, {forward_down} down" in text
    assert "161 bits (MATZOV, classical): ring LWE, dimension 1536, q = 2^32; ring 128 x 12" in text
    assert f"{weights} of 10 bits" in text
    assert "r = 2, alpha = 4, q_proj, v_proj, down_proj" in text
    assert f"{megabytes(up * 32)} up, {megabytes(down * 32)} down" in text
    first = bundle.circuits[f"model.layers.0.{QKV}.forward"]  # the one product that is not sent again
    kept_up, kept_down = up - first.bytes_up(1), down - first.bytes_down(1)
    assert f"{kept_up} up, {kept_down} down, for 64 values" in text and totals.kept_values == 64


def test_a_remote_heads_bytes_stand_beside_a_tokens(bundle: ClientBundle, products: list[Product]) -> None:
    head = replace(products[0], linear="lm_head.part0", bytes_up=64, bytes_down=518)
    assert "output head" not in rendered(totals_table(bundle, products), 160)
    text = rendered(totals_table(bundle, [*products, head]), 160)
    assert ", of which the output head, where scored: 64 up, 518 down" in text


def test_a_half_that_is_not_there_is_not_counted(build: Path, products: list[Product], tmp_path: Path) -> None:
    alone = ClientBundle.open(shutil.copytree(build / "client", tmp_path / "alone"))
    assert Totals.of(alone, products).worker_disk is None
    assert "worker none beside it" in rendered(totals_table(alone, products))


def test_json_has_what_the_tables_have(bundle: ClientBundle, products: list[Product], build: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(build), "--json"], catch_exceptions=False)
    printed = json.loads(result.output)
    assert printed.pop("format") == "hecompile-inspect-1"
    assert printed == json.loads(json.dumps(plan_json(bundle, products)))
    assert [row["kind"] for row in printed["kinds"][::2]] == list(dict.fromkeys(kind_of(p.linear) for p in products))
    row = printed["kinds"][0]
    assert (row["direction"], row["count"], row["in_features"], row["weight_bits"]) == (
        "forward",
        2,
        [32, 32],
        [10, 10],
    )
    assert len(printed["products"]) == 15 and all(product["trained"] for product in printed["products"])
    traffic = predicted_traffic(bundle.circuits, circuits_without_gradient(bundle.graph()))
    per_token, per_step = printed["totals"]["per_token"]["training"], printed["totals"]["per_step"]
    assert (per_token["bytes_up"], per_token["bytes_down"]) == (traffic.bytes_up, traffic.bytes_down)
    assert (per_step["tokens"], per_step["bytes_up"]) == (32, 32 * traffic.bytes_up)


def test_the_page_lists_every_key(bundle: ClientBundle, products: list[Product]) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    old = bundle_json(open_bundle(ROOT / "tests" / "e2e" / "old_files" / "ckks"))
    plan = plan_json(bundle, products) | {"lora": {}}  # PEFT's names
    size = prediction_json(ModelSize.of(LlamaConfig()), 8, 32)

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value) | set().union(*map(keys, value.values())) if isinstance(value, dict) else set()

    parameters = old.pop("parameters")
    assert {key for key in keys([plan, old, size]) if f"`{key}`" not in page} == set() and parameters


def test_names_of_kinds_and_layers() -> None:
    assert (
        kind_of("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1" and kind_of("fc2.x") == "fc2.x"
    )
    assert layer_of("transformer.h.3.attn") == 3 and layer_of("model.norm2") is None
    assert (
        inside_layer("model.layers.12.mlp.experts.3.w1") == "mlp.experts.3.w1" and inside_layer("lm_head") == "lm_head"
    )
    assert span([2, 1, 3]) == "1–3" and span([8.04, 8.0], "{:.1f}".format) == "8.0"
    assert numbers(range(30)) == "0–29" and numbers([4, 0, 2]) == "0, 2, 4" and numbers([0, 2, 3, 4]) == "0, 2–4"
    assert numbers(range(0, 30, 2)) == "0, 2, … 28" and numbers([5]) == "5"


def test_the_precision_that_was_reached_stands_beside_the_one_asked_for(
    bundle: ClientBundle, products: list[Product]
) -> None:
    low, high = bundle.plan.reached_bits()
    assert 8.0 == bundle.plan.effective_bits <= low <= high
    assert f"{low:.1f} to {high:.1f} effective bits, 8 asked for" in rendered(totals_table(bundle, products), 120)
    asked = bundle.plan.model_copy(update={"effective_bits": low - 2.0})
    assert f"{low - 2.0:g} asked for; up to {math.floor(10 * low) / 10:g} the plan is the same" in reached_precision(
        asked
    )


def test_a_backward_circuit_that_training_never_calls_is_not_there(bundle: ClientBundle) -> None:
    first = "model.layers.0.self_attn.q_proj-k_proj-v_proj"
    assert circuits_without_gradient(bundle.graph()) == {f"{first}.backward"}
    assert f"{first}.forward" in bundle.circuits and f"{first}.backward" not in bundle.circuits
    down = "model.layers.1.mlp.down_proj.forward"
    every, used = predicted_traffic(bundle.circuits), predicted_traffic(bundle.circuits, frozenset({down}))
    skipped = bundle.circuits[down]
    wanted = (skipped.upload_bits * 48 // 8, skipped.reply_bits * 32 // 8)
    assert (every.bytes_up - used.bytes_up, every.bytes_down - used.bytes_down) == wanted
    assert used.total == used.bytes_up + used.bytes_down
