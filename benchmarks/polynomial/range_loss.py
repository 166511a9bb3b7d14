"""Separate what the range loss does from what training does: convert the reduced Llama with and without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report import table
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.pipeline import approximate, run_step
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.demonstrations.small import RECIPE
from hecompile.graph.legality import POLYNOMIAL
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.polynomial.depth import CircuitCost, circuit_cost
from hecompile.polynomial.ranges import Interval
from hecompile.runtime.conversion.data import load_rows
from hecompile.runtime.conversion.recipe import ConversionRecipe, RangeLossSection, load_conversion
from hecompile.runtime.conversion.train import Conversion, convert

PROSE = """\
## Conversion with and without range loss

The reduced Llama converted by `models/recipes/convert-reduced.yaml` ({steps} + {polynomial} steps), and by the same recipe
with `range_loss: {{alpha: 0, beta: 0}}`: the same steps on the same batches from the same weights. Ranges of what goes into
the polynomials, over {rows} rows of training text, before and after the first stage; `wanted` is where the range loss is
zero.
"""
DOMAINS = """\
The domains are those ranges with the recipe's margins, and the errors asked for are the same: what the range loss saves is
levels, here of the whole graph at {length} tokens without refreshes, and products. Loss in nats on held-out public text, of
the checkpoint before and of the polynomials after.
"""


@dataclass(frozen=True)
class _Converted:
    name: str
    report: Conversion
    cost: CircuitCost


def run(quick: bool) -> str:
    """Write Markdown: ranges with and without, and what the polynomials on them cost."""
    overrides = ["training.steps=6", "training.polynomial_steps=2"] if quick else []
    recipe = load_conversion(RECIPE.parent / "convert-reduced.yaml", [*overrides, "training.disable_tqdm=true"])
    rows, heldout = load_rows(recipe.data, load_checkpoint(recipe.model).tokenizer)
    # Held-out rows are those that were found to be within the domains at the end.
    samples = tuple(tuple(row) for row in heldout[:64].tolist())
    weights = {"without": RangeLossSection(alpha=0.0, beta=0.0), "with range loss": recipe.range_loss}
    with TemporaryDirectory() as directory:
        converted = [
            _convert(name, recipe.model_copy(update={"range_loss": loss, "out": Path(directory) / name}), samples)
            for name, loss in weights.items()
        ]
    wanted = _wanted(recipe)
    lines = [
        [kind.replace("_", " "), *map(_shown, (wanted[kind], converted[0].report.ranges_before[kind])),
         *(_shown(one.report.ranges_trained[kind]) for one in converted)]
        for kind in converted[0].report.domains
    ]  # fmt: skip
    costs = [
        [one.name, one.report.heldout_loss_before, one.report.heldout_loss, one.cost.depth, one.cost.ciphertext_products,
         one.cost.plaintext_products]
        for one in converted
    ]  # fmt: skip
    section = recipe.training
    return "\n\n".join(
        [
            PROSE.format(steps=section.steps, polynomial=section.polynomial_steps, rows=len(rows)),
            table(["what", "wanted", "before", *(one.name for one in converted)], lines),
            DOMAINS.format(length=recipe.data.length),
            table(["range loss", "loss before", "loss after", "levels", "ct × ct", "ct × constant"], costs),
        ]
    )


def _convert(name: str, recipe: ConversionRecipe, samples: tuple[tuple[int, ...], ...]) -> _Converted:
    report = convert(recipe)
    checkpoint = load_checkpoint(str(recipe.out))
    options = PolynomialOptions.from_config(checkpoint.model.config)
    model = approximate(export_onnx(checkpoint.model), options, Calibrate(samples))
    model = run_step(model, "expand_polynomials", ExpandPolynomials(recipe.data.length), POLYNOMIAL)
    return _Converted(name, report, circuit_cost(model))


def _wanted(recipe: ConversionRecipe) -> dict[str, Interval]:
    return {
        "exponents": Interval(-recipe.attention.bound, 0.0),
        "variances": Interval(recipe.norm.lower, recipe.norm.upper),
        "activation_inputs": Interval(-recipe.activation.bound, recipe.activation.bound),
    }


def _shown(interval: Interval) -> str:
    return f"{interval.lower:.3g} to {interval.upper:.3g}"
