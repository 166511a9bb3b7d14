"""Polynomial plans from a checkpoint: options and where they come from, the report, merged adapters, inspect."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.polynomial.approximation_report import approximation_report
from benchmarks.polynomial.softmax_cost import softmax_cost
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.ckks.parameters import MAX_MODULUS_BITS, select
from hecompile.cli.main import app
from hecompile.compiler.ckks import lower_checkpoint
from hecompile.compiler.frontend import load_checkpoint
from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import CkksOptions, CompileOptions
from hecompile.compiler.pipeline import approximate, lower_linear, run_step
from hecompile.compiler.polynomial_options import CONFIG_KEY, PolynomialOptions
from hecompile.errors import InputError, LegalityError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import ATTENTION_OPERATORS, nodes_of_type
from hecompile.graph.legality import ADAPTED, CANONICAL, POLYNOMIAL, REFRESHED
from hecompile.graph.operators import Context
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.polynomial.depth import levels
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.support.graphs import product_of
from tests.support.tiny import OPTIONS, exported, samples, save_checkpoint, tiny_llama

GAUSSIAN = PolynomialOptions(
    ApproximateSoftmax("gaussian_kernel"), ApproximateRMSNorm(), ApproximateSiLU(form="composed")
)
SOFTMAX = PolynomialOptions(ApproximateSoftmax("chebyshev"), ApproximateRMSNorm(), ApproximateSiLU())
POWER = PolynomialOptions(
    ApproximateSoftmax("power", form="length_agnostic", division="goldschmidt"), ApproximateRMSNorm(), ApproximateSiLU()
)
IDS = torch.tensor(samples())
INPUTS = graph_inputs(IDS, torch.ones_like(IDS))
EMBEDS = tiny_llama().get_input_embeddings()(IDS).detach()


def approximated(options: PolynomialOptions) -> ir.Model:
    return approximate(exported(), options, Calibrate(samples()))


def expanded_for(model: ir.Model, length: int, last_only: bool = False) -> ir.Model:
    return run_step(model, "expand_polynomials", ExpandPolynomials(length, last_only), POLYNOMIAL)


def run(model: ir.Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return Interpreter(model).run(inputs)["logits"]


def test_softmax_by_polynomials_keeps_the_model() -> None:
    with torch.no_grad():
        expected = tiny_llama()(input_ids=IDS).logits
    found = run(approximated(SOFTMAX), INPUTS)
    assert 1e-5 < float((found - expected).abs().max()) < 0.06  # logits of size 4; SiLU's error of 1e-2 is the largest


@pytest.mark.parametrize("options", [GAUSSIAN, SOFTMAX, POWER], ids=["gaussian", "chebyshev", "power"])
def test_no_error_is_above_its_bound(options: PolynomialOptions) -> None:
    rows = approximation_report(approximated(options), samples())
    assert len(rows) == 2 + 5 + 2  # attentions, norms, activations
    for row in rows:
        assert 0 < row.on_data <= row.bound * 1.01 + 1e-7, row
        assert row.at_edge <= row.bound * 1.01 + 1e-7, row


def adapter(model: ir.Model, size: float = 0.01) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        str(value.name): torch.randn(value.shape.numpy(), generator=generator) * size
        for value in model.graph.inputs
        if ".lora_" in str(value.name) and value.shape is not None
    }


def test_expanded_with_adapters_as_inputs_and_for_the_last_position() -> None:
    model = run_step(approximated(SOFTMAX), "attach_lora", AttachLora(r=2), ADAPTED)
    matrices = adapter(model)
    expected = run(model, INPUTS | matrices)
    assert float((expected - run(model, INPUTS | adapter(model, 0.0))).abs().max()) > 1e-3
    expanded = expanded_for(model, IDS.shape[1])
    assert expanded.graph.inputs[0].name == "inputs_embeds"
    torch.testing.assert_close(run(expanded, {"inputs_embeds": EMBEDS} | matrices), expected, atol=2e-4, rtol=0)
    last = expanded_for(model, IDS.shape[1], last_only=True)
    torch.testing.assert_close(run(last, {"inputs_embeds": EMBEDS} | matrices), expected[:, -1:], atol=2e-4, rtol=0)
    assert [str(v.name) for v in expanded_for(approximated(SOFTMAX), IDS.shape[1]).graph.inputs] == ["inputs_embeds"]


def test_expansion_refuses_exact_parts_and_short_sequences() -> None:
    with pytest.raises(LegalityError, match="run approximate_softmax"):
        expanded_for(approximated(replace(SOFTMAX, norm=None)), 8)
    stable = PolynomialOptions(ApproximateSoftmax("power"), ApproximateRMSNorm(), ApproximateSiLU())
    with pytest.raises(LegalityError, match="exact form is no polynomial"):
        expanded_for(approximated(stable), 8)
    with pytest.raises(InputError, match="at least 2"):
        ExpandPolynomials(1)


def test_the_client_plan_is_polynomial_and_computes_the_approximated_graph() -> None:
    options = replace(OPTIONS, attention=SOFTMAX.attention, norm=SOFTMAX.norm, activation="polynomial")
    steps: list[str] = []
    plan, _ = lower_linear(exported(), options, samples(), steps.append)
    first = ["simplify", "unify", "canonicalize", "calibrate", "approximate_softmax", "approximate_rmsnorm"]
    assert steps[:6] == first and steps.count("calibrate") == 2
    operators = {node.op_type for node in plan.client.graph}
    assert {"ChebyshevAttention", "PolynomialRMSNorm", "PolynomialSiLU"} <= operators
    assert not {"Softmax", "RMSNorm", "SiLU"} & operators
    zero = {name: torch.zeros_like(value) for name, value in adapter(plan.client).items()}
    with torch.no_grad():
        found = Interpreter(plan.client).run(INPUTS | zero, Context(remote=product_of(plan)))["logits"]
    assert float((found - run(approximated(SOFTMAX), INPUTS)).abs().max()) < 0.06  # weights of 10 bits


def test_a_converted_checkpoint_is_exported_and_trained_as_it_says(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    config[CONFIG_KEY] = {"attention": {"variant": "power", "power": 2}, "norm": {"error": 1e-2}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    compile_checkpoint(str(checkpoint), tmp_path / "build", OPTIONS)
    bundle = ClientBundle.open(tmp_path / "build" / "client")
    nodes = list(nodes_of_type(bundle.graph(), "PowerAttention"))
    assert len(nodes) == 2 and nodes[0].attributes["power"].value == 2
    assert any(nodes_of_type(bundle.graph(), "PolynomialRMSNorm")) and any(nodes_of_type(bundle.graph(), "SiLU"))

    worker = Worker(WorkerBundle.open(tmp_path / "build" / "worker"), "onnxruntime")
    model = EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(worker.exchange)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(samples()[:2])
    losses = []
    for _ in range(5):
        loss = model(ids, torch.ones_like(ids), labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01

    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "build")])
    assert shown.exit_code == 0 and "PowerAttention" in shown.output and "PolynomialRMSNorm" in shown.output


def test_inspect_shows_depth_modulus_and_refreshes(tmp_path: Path) -> None:
    refreshed = run_step(expanded_for(approximated(POWER), 8), "place_refreshes", PlaceRefreshes(12), REFRESHED)
    ir.save(refreshed, tmp_path / "graph.onnx")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "graph.onnx")])
    assert shown.exit_code == 0
    for word in ("levels between refreshes", "numbers refreshed", "refreshed at", "lm_head"):
        assert word in shown.output
    assert "model.layers.*.mlp × 2 " in shown.output and "model.layers.1" not in shown.output
    every = CliRunner().invoke(app, ["inspect", str(tmp_path / "graph.onnx"), "--layers"])
    assert "model.layers.1.mlp " in every.output and "×" not in every.output
    chosen = select(12)  # what `ckks export` would take for as many levels
    bits = math.prod(chosen.moduli).bit_length()
    assert f"modulus bits at {chosen.literal.scale_bits} per level" in shown.output
    assert f"{bits} of {MAX_MODULUS_BITS[chosen.ring_dim]} allowed" in shown.output and str(chosen.ring_dim) in shown.output

    counted = levels(refreshed)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "graph.onnx"), "--nodes"])
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.output.splitlines() if "│" in line]
    found = {row[0]: row[3] for row in rows if len(row) == 6}
    for node in refreshed.graph:
        if node.outputs[0] in counted:
            level = str(counted[node.outputs[0]])
            if node.op_type == "Refresh" and node.inputs[0] is not None:
                level = f"{counted[node.inputs[0]]} → 0"
            assert found[str(node.outputs[0].name)] == level
    with pytest.raises(InputError, match="--nodes shows a polynomial graph"):
        CliRunner().invoke(app, ["inspect", str(tmp_path), "--nodes"], catch_exceptions=False)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        CliRunner().invoke(app, ["inspect", str(tmp_path / "broken.onnx")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"attention": {"variant": "power", "powers": 4}}, "unknown option 'powers'"),
        ({"attention": {"variant": "relu"}}, "variant must be one of"),
        ({"attention": "power"}, "must be an object of options"),
        ({"softmax": {}}, "with the keys attention, norm, activation"),
        ({"norm": {"error": "small"}}, "norm"),
        ([], "must be an object"),
    ],
)
def test_malformed_options_of_a_checkpoint(found: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PolynomialOptions.from_config(SimpleNamespace(**{CONFIG_KEY: found}))


def test_names_choose_over_the_checkpoint_and_keep_its_options_where_they_agree() -> None:
    found = PolynomialOptions.from_config(SimpleNamespace(**{CONFIG_KEY: {"attention": {"variant": "power", "power": 8}}}))
    assert found.retrained and found.choosing() == found
    assert found.choosing(attention="power") == found
    assert found.choosing(attention="exact") == PolynomialOptions()
    chosen = found.choosing(attention="gaussian_kernel", norm="polynomial", activation="composed")
    assert chosen == PolynomialOptions(
        ApproximateSoftmax("gaussian_kernel"), ApproximateRMSNorm(), ApproximateSiLU(form="composed")
    )
    assert chosen.choosing(norm="exact", activation="exact") == PolynomialOptions(chosen.attention)
    for part in ("attention", "norm", "activation"):
        with pytest.raises(InputError, match=f"{part} must be one of"):
            CompileOptions(**{part: "relu"})


def test_the_cost_of_a_softmax_grows_as_the_variants_promise() -> None:
    short, long = 8, 32
    gaussian = [softmax_cost(ApproximateSoftmax("gaussian_kernel"), length) for length in (short, long)]
    assert gaussian[0].iterations == gaussian[1].iterations == 0
    power = softmax_cost(POWER.attention or ApproximateSoftmax(), long)
    softmax = softmax_cost(ApproximateSoftmax("chebyshev"), long)
    assert 0 < power.iterations < softmax.iterations and power.depth < softmax.depth
    # t⁴ is two products per score; each iteration but the first takes two per query, the quotient one per entry of v.
    assert power.ciphertext_products == 2 * long**2 + long * (2 * (power.iterations - 1)) + long * 64


def test_every_attention_operator_is_fitted_on_a_canonical_graph() -> None:
    kinds = {node.op_type for node in approximated(GAUSSIAN).graph} & ATTENTION_OPERATORS
    assert kinds == {"GaussianAttention"} and CANONICAL.custom >= kinds


@pytest.mark.parametrize(
    ("trained", "chosen", "other"),
    [
        (None, "power", "softmax attention, and power-4"),
        (None, "gaussian_kernel", "softmax attention, and gaussian_kernel"),
        ({"variant": "power"}, "exact", "power-4 attention, and softmax"),
        ({"variant": "power"}, "chebyshev", "power-4 attention, and softmax"),
        ({"variant": "power"}, "gaussian_kernel", "power-4 attention, and gaussian_kernel"),
        ({"variant": "power", "power": 2}, ApproximateSoftmax("power", power=4), "power-2 attention, and power-4"),
        ({"variant": "gaussian_kernel"}, "power", "gaussian_kernel attention, and power-4"),
    ],
)
def test_an_attention_that_the_checkpoint_was_not_trained_with_is_refused(
    tmp_path: Path, trained: dict[str, object] | None, chosen: str | ApproximateSoftmax, other: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "model")
    if trained is not None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {CONFIG_KEY: {"attention": trained}}))
    options = replace(OPTIONS, attention=chosen)
    with pytest.raises(InputError, match=f"was trained with {other} is another function.*--unconverted"):
        compile_checkpoint(str(checkpoint), tmp_path / "build", options)
    assert not (tmp_path / "build").exists()
    polynomials = {"norm": "polynomial", "activation": "polynomial"}
    if isinstance(chosen, str) and chosen in ("gaussian_kernel", "chebyshev"):
        with pytest.raises(InputError, match=f"was trained with {other} is another function"):
            lower_checkpoint(load_checkpoint(str(checkpoint)), CkksOptions(8, attention=chosen, **polynomials))


def test_it_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint, build = str(save_checkpoint(tmp_path / "model")), tmp_path / "build"
    shape = ["--sequence-buckets", "8", "--batch-size", "2"]
    asked = ["export", "llama", "--model", checkpoint, "--out", str(build), *shape, "--attention", "power"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, InputError) and not build.exists()
    taken = CliRunner().invoke(app, [*asked, "--unconverted"])
    assert taken.exit_code == 0, taken.output
    assert any(nodes_of_type(ClientBundle.open(build / "client").graph(), "PowerAttention"))
