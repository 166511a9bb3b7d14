"""Measure the small Llama with polynomials: what conversion costs it, what it learns privately, ranges and errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.polynomial.approximation_report import ApproximationError, approximation_report
from benchmarks.report import ROOT, table
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.demonstrations.small import BATCH_SIZE, RECIPE, SEQUENCE_BUCKETS
from hecompile.errors import NotFiniteError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.models import REDUCED_LLAMA, TINY_LLAMA
from hecompile.models.worlds.public_world import write
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax, Form
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.polynomial.ranges import Interval
from hecompile.runtime.client.session import open_session
from hecompile.runtime.conversion.data import load_rows
from hecompile.runtime.conversion.recipe import ConversionRecipe, load_conversion
from hecompile.runtime.conversion.train import Conversion
from hecompile.runtime.model.data import eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.process import worker_process

RECIPES = {"power": "convert-power.yaml", "gaussian_kernel": "convert-gaussian.yaml"}
DOCUMENTS = {"power": 3000, "gaussian_kernel": 4000}
"""Documents of the public text that each recipe names."""
PROSE = """\
## The small Llama with polynomials in place of softmax, RMSNorm and SiLU

Held-out text of its public corpus ({tokens} tokens), cleartext graph before quantisation. `power` and `gaussian_kernel` were
trained for their functions by `hecompile convert models/recipes/convert-*.yaml` on public text; `chebyshev` is the original
checkpoint with softmax, norm and activation approximated, never retrained. All of them have polynomial norms and
activations, one series per SiLU but where it says composed. The recipe of `power` has the length-agnostic form; the
Lipschitz form is of the same checkpoint, which was not trained for it: ε is then not multiplied by the keys of a query.
"""
FORMS: dict[Form, str] = {"lipschitz": "Lipschitz", "length_agnostic": "length-agnostic"}
TRAININGS = (("1e-3", False), ("2e-3", False), ("2e-3", True))
"""Learning rate, and whether with the range loss, which there is for polynomials alone."""
PRIVATE = """\
LoRA **through the encrypted worker** with the polynomial client plan: data and steps of `models/recipes/demo.yaml` at two
learning rates, and with `range_loss: {alpha: 10, beta: 10}`; loss in nats and exact match on held-out phrasings of the
private questions, before and after. A run that ended early says with what: activations that training moves out of the
domains make polynomials grow without limit.
"""
RANGES = """\
What goes into the polynomials, before conversion and after it with the range loss, and the domain that was then fixed: over
{rows} rows of public training text (before, after) and over held-out rows (held out).
"""
ERRORS = """\
The largest error of each approximation on the {rows} rows of public training text that it was calibrated with, on {heldout}
held-out rows, and at the edge of its domain, beside the bound of the node (attention: of the weights; norm: relative, of the
root; activation: absolute). Largest over the layers.
"""
CALIBRATION_ROWS, HELDOUT_ROWS = 64, 16


Options = Mapping[str, "str | ApproximateSoftmax"]
"""Arguments of `PolynomialOptions.choosing`."""


@dataclass(frozen=True)
class Variant:
    """Hold a checkpoint, the options to export it with, and the public quality and errors of its graph.

    Errors are on rows of the calibration and on held-out ones; options are those that the checkpoint does not give itself.
    """

    name: str
    checkpoint: Path
    options: Options
    loss: float
    accuracy: float
    calibrated: tuple[ApproximationError, ...]
    heldout: tuple[ApproximationError, ...]


def run(quick: bool) -> str:
    """Write Markdown: quality, private training through the encrypted worker, ranges, errors."""
    torch.manual_seed(0)
    recipes = {} if quick else {name: load_conversion(RECIPE.parent / file) for name, file in RECIPES.items()}
    for name, one in recipes.items():
        write(one.data.train_file.parent, DOCUMENTS[name])
    reports = {name: _converted(name, recipe) for name, recipe in recipes.items()}
    recipe = next(iter(recipes.values()), None) or load_conversion(RECIPE.parent / "convert-reduced.yaml")
    original = TINY_LLAMA if recipes else REDUCED_LLAMA
    rows, heldout = load_rows(recipe.data, load_checkpoint(str(original)).tokenizer)
    heldout = heldout[:8] if quick else heldout
    exact = {"attention": "chebyshev", "norm": "polynomial", "activation": "polynomial"}
    variants = [
        _variant("original", original, {}, rows, heldout),
        _variant("chebyshev, not retrained", original, exact, rows, heldout),
        *(_variant(name, one.out, {}, rows, heldout) for name, one in recipes.items()),
    ]
    composed = _variant("chebyshev, composed SiLU", original, exact | {"activation": "composed"}, rows, heldout)
    power = recipes["power"].out if recipes else original
    shown = [*variants, composed, *(_variant(name, power, one, rows, heldout) for name, one in _forms(power).items())]
    lines = [[variant.name, variant.loss, f"{variant.accuracy:.1%}"] for variant in shown]
    headings = ["model", "public loss", "next token right"]
    return "\n\n".join(
        [
            PROSE.format(tokens=heldout.numel()),
            table(headings, lines),
            PRIVATE,
            table(
                ["model", "rate", "loss before", "exact", "loss after", "exact after"],
                [] if quick else [_private(variant, *one) for variant in variants for one in _trainings(variant)],
            ),
            RANGES.format(rows=len(rows)),
            table(
                ["model", "what", "before", "after", "held out", "domain"],
                [line for name, report in reports.items() for line in _ranges(name, report)],
            ),
            ERRORS.format(rows=CALIBRATION_ROWS, heldout=len(heldout[:HELDOUT_ROWS])),
            table(
                ["model", "operator", "calibration", "held out", "at the edge", "bound"],
                [line for one in shown for line in _errors(one)],
            ),
        ]
    )


def _converted(name: str, recipe: ConversionRecipe) -> Conversion:
    """Return the report of the checkpoint that the recipe makes; the command makes it if it is not there."""
    if not recipe.out.is_dir():
        command = [sys.executable, "-m", "hecompile.cli", "convert", str(RECIPE.parent / RECIPES[name])]
        subprocess.run(command, check=True, cwd=ROOT)
    return Conversion.read(recipe.out)


def _forms(path: Path) -> dict[str, Options]:
    """Return the forms of power attention that a checkpoint does not have.

    Divisors have the domain of calibration, twice as wide as others: its few rows do not have the largest sum.
    """
    own = PolynomialOptions.from_config(load_checkpoint(str(path)).model.config).attention
    if own is None:  # not converted
        own = ApproximateSoftmax("power", epsilon=0.1, error=1e-2)
    return {
        f"power, {shown} form": {
            "attention": replace(
                own, form=form, division="goldschmidt", margin=2 * own.margin, ratio_lower=None, ratio_upper=None
            )
        }
        for form, shown in FORMS.items()
        if form != own.form
    }


def _variant(name: str, path: Path, chosen: Options, rows: Tensor, heldout: Tensor) -> Variant:
    checkpoint = load_checkpoint(str(path))
    options = PolynomialOptions.from_config(checkpoint.model.config).choosing(**chosen)  # type: ignore[arg-type]
    samples = _tokens(rows[:CALIBRATION_ROWS])
    model = approximate(export_onnx(checkpoint.model), options, Calibrate(samples))
    loss, accuracy = _quality(model, heldout)
    calibrated, others = (approximation_report(model, one) for one in (samples, _tokens(heldout[:HELDOUT_ROWS])))
    return Variant(name, path, chosen, loss, accuracy, calibrated, others)


def _tokens(rows: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows.tolist())


def _quality(model: ir.Model, rows: Tensor) -> tuple[float, float]:
    """Return nats per token, and the fraction of next tokens that are the likeliest."""
    interpreter, loss, right = Interpreter(model), 0.0, 0
    with torch.no_grad():
        for batch in rows.split(16):
            logits = interpreter.run(graph_inputs(batch, torch.ones_like(batch)))["logits"][:, :-1].flatten(0, 1)
            targets = batch[:, 1:].flatten()
            loss += float(cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(-1) == targets).sum())
    count = rows[:, 1:].numel()
    return loss / count, right / count


def _trainings(variant: Variant) -> list[tuple[str, bool]]:
    polynomial = bool(variant.options) or variant.name in RECIPES
    return [(rate, range_loss) for rate, range_loss in TRAININGS if polynomial or not range_loss]


def _private(variant: Variant, rate: str, range_loss: bool) -> list[object]:
    options = CompileOptions(batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS, **variant.options)  # type: ignore[arg-type]
    with TemporaryDirectory() as directory:
        build = Path(directory) / "build"
        compile_checkpoint(str(variant.checkpoint), build, options)
        with worker_process(build / WORKER) as address:
            overrides = [
                f"model={build / CLIENT}", f"training.output_dir={directory}/run", f"worker={address}",
                f"training.learning_rate={rate}", "training.disable_tqdm=true",
                *(["range_loss={alpha: 10, beta: 10}"] if range_loss else []),
            ]  # fmt: skip
            recipe = load_recipe(RECIPE, overrides)
            assert recipe.data.validation_file is not None
            with open_session(recipe) as session:
                buckets, pad = session.model.sequence_buckets, eos_and_pad(session.tokenizer)[1]
                examples = load_examples(recipe.data.validation_file, session.tokenizer, buckets)
                before = evaluate(session.model, examples, pad)
                training = f"{rate}, range loss" if range_loss else rate
                row: list[object] = [variant.name, training, before.loss, f"{before.exact_match or 0:.1%}"]
                try:
                    run_training(session.model, session.tokenizer, recipe)
                except NotFiniteError as error:
                    what = str(error).partition(";")[0].partition(". ")[0]
                    return [*row, ": ".join((what, *error.causes[:1])), ""]
                after = evaluate(session.model, examples, pad)
    return [*row, after.loss, f"{after.exact_match or 0:.1%}"]


def _ranges(name: str, report: Conversion) -> list[list[object]]:
    def shown(interval: Interval | None) -> str:
        return "" if interval is None else f"{interval.lower:.3g} to {interval.upper:.3g}"

    return [
        [name, kind.replace("_", " "), *(shown(one.get(kind)) for one in (
            report.ranges_before, report.ranges_trained, report.ranges_heldout, report.domains))]
        for kind in report.domains
    ]  # fmt: skip


def _errors(variant: Variant) -> list[list[object]]:
    rows: list[list[object]] = []
    for operator in dict.fromkeys(error.operator for error in variant.heldout):
        calibrated, heldout = (
            [error for error in errors if error.operator == operator]
            for errors in (variant.calibrated, variant.heldout)
        )
        numbers = [max(one.on_data for one in errors) for errors in (calibrated, heldout)]
        numbers += [max(getattr(one, what) for one in heldout) for what in ("at_edge", "bound")]
        rows.append([variant.name, operator, *(f"{number:.2e}" for number in numbers)])
    return rows
