"""Convert a checkpoint by continued training in two stages.

    first    the attention's exact function, or the stable form of a power attention, in the graph; range loss on what will
             go into polynomials
             → ranges over the training rows → domains, widened by the recipe's margins
    second   every polynomial in the graph, on those domains; range loss goes on
             → ranges over held-out rows must lie within the domains, or nothing is saved

While it runs `OUT.partial` holds the state; the same recipe goes on from there, with the same result bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hecompile.compiler.frontend import Checkpoint, export_onnx, load_checkpoint
from hecompile.compiler.polynomial_options import CONFIG_KEY, PolynomialOptions
from hecompile.errors import InputError, NotFiniteError
from hecompile.files import only_writer, opened_whole
from hecompile.polynomial.ranges import Interval
from hecompile.runtime.conversion.data import batch_of, load_rows
from hecompile.runtime.conversion.domains import (
    Ranges,
    attention_alone,
    check_heldout,
    describe_violations,
    domains,
    fitted,
    to_config,
)
from hecompile.runtime.conversion.graph import TrainableGraph, write_back
from hecompile.runtime.conversion.ranges import measure
from hecompile.runtime.conversion.recipe import ConversionData, ConversionRecipe

REPORT_FILE = "conversion_report.json"
_STATE_FILE = "state.pt"

Progress = Callable[[str, int, int, float], None]
"""Take the stage, steps done, steps in all, and the loss of the last one in nats."""


@dataclass(frozen=True)
class Conversion:
    """Report what a conversion did: losses in nats, and ranges by kind of value.

    Attributes:
        heldout_loss_before, heldout_loss: of the checkpoint before, and of the polynomials after.
        ranges_before, ranges_trained: over training rows before and after the first stage; the latter make the domains.
        ranges_heldout: over held-out rows at the end.
    """

    heldout_loss_before: float
    heldout_loss: float
    ranges_before: Ranges
    ranges_trained: Ranges
    ranges_heldout: Ranges
    domains: Ranges

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, out: Path) -> Conversion:
        """Read the report of the checkpoint at `out`. Raises InputError where there is none."""
        try:
            report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise InputError(f"{out} holds no {REPORT_FILE}; convert the checkpoint first") from None
        fields: dict[str, Any] = {
            name: {kind: Interval(**ends) for kind, ends in value.items()} if isinstance(value, dict) else value
            for name, value in report.items()
        }
        return cls(**fields)


def convert(recipe: ConversionRecipe, progress: Progress = lambda *_: None) -> Conversion:
    """Train, and save the checkpoint `recipe.out` for `from_pretrained`, with the polynomials in config.json.

    Raises InputError for a recipe, text or checkpoint that does not fit, before anything is written; LegalityError where
    held-out text leaves the domains; NotFiniteError where the loss is not finite. Then `recipe.out` does not exist.
    """
    with only_writer(recipe.out):
        return _convert(recipe, progress)


def _convert(recipe: ConversionRecipe, progress: Progress) -> Conversion:
    if recipe.out.exists():
        raise InputError(f"{recipe.out} exists; delete it, or give another `out`")
    partial = recipe.out.with_name(recipe.out.name + ".partial")
    _refuse_foreign(partial)
    checkpoint = load_checkpoint(recipe.model)
    if PolynomialOptions.from_config(checkpoint.model.config):
        raise InputError(f"{recipe.model} was converted before (its config.json has {CONFIG_KEY}); start from the original")
    rows, heldout = load_rows(recipe.data, checkpoint.tokenizer)
    state = _State.resume(partial, recipe)
    size = recipe.training.batch_size

    exported = export_onnx(checkpoint.model)
    graph = TrainableGraph(checkpoint, attention_alone(recipe), recipe, exported)
    if state.first is None:
        original = TrainableGraph(checkpoint, PolynomialOptions(), recipe, exported)
        before, ranges = original.heldout_loss(heldout, size), measure(graph.logits, graph.observer, rows, size)
        state.first = {"loss": before, "ranges": ranges}
    if state.seen is None:
        first = attention_alone(recipe, training=True)
        training = graph if recipe.attention.training_form is None else TrainableGraph(checkpoint, first, recipe, exported)
        _train(training, first, rows, recipe, state, partial, progress, "attention")
        # The domains are for the form that stays: ε weighs differently in it, and so does what later layers then see.
        graph.weights = training.weights
        state.seen = measure(graph.logits, graph.observer, rows, size)
        write_back(checkpoint, graph.weights)
        state.start_second(checkpoint)
        state.save(partial, recipe)
    else:
        state.load_weights(checkpoint)
    options = fitted(recipe, state.seen)
    graph = TrainableGraph(checkpoint, options, recipe, exported)
    _train(graph, options, rows, recipe, state, partial, progress, "polynomial")
    seen = measure(graph.logits, graph.observer, heldout, size)
    check_heldout(options, seen)
    write_back(checkpoint, graph.weights)
    result = Conversion(
        heldout_loss_before=state.first["loss"], heldout_loss=graph.heldout_loss(heldout, size),
        ranges_before=state.first["ranges"], ranges_trained=state.seen, ranges_heldout=seen, domains=domains(options),
    )  # fmt: skip
    _save(checkpoint, options, result, recipe.out)
    shutil.rmtree(partial, ignore_errors=True)
    return result


@dataclass
class _State:
    """Hold where a conversion stands.

    Attributes:
        step, weights, optimizer: of the current stage.
        first: held-out loss and ranges before training.
        seen: ranges after the first stage; None in it.
    """

    step: int = 0
    weights: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    seen: dict[str, Interval] | None = None

    @classmethod
    def resume(cls, partial: Path, recipe: ConversionRecipe) -> _State:
        path = partial / _STATE_FILE
        if not path.is_file():
            return cls()
        try:
            stored = torch.load(path, weights_only=True)
            same, fields = _recipe_of(stored["recipe"]) == recipe, stored["state"]
            if fields["first"] is not None:
                fields["first"]["ranges"] = _intervals(fields["first"]["ranges"])
            if fields["seen"] is not None:
                fields["seen"] = _intervals(fields["seen"])
            state = cls(**fields)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise InputError(f"{path} is damaged; delete {partial} to start again") from error
        if not same:
            raise InputError(f"{partial} is of another recipe; run that one again to go on, or delete it to start this one")
        return state

    def save(self, partial: Path, recipe: ConversionRecipe) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        state = dict(self.__dict__)
        # Plain numbers and tensors alone, so that reading it back runs no code.
        state["seen"] = None if self.seen is None else _plain(self.seen)
        state["first"] = None if self.first is None else self.first | {"ranges": _plain(self.first["ranges"])}
        with opened_whole(partial / _STATE_FILE) as file:
            torch.save({"recipe": recipe.model_dump(mode="json"), "state": state}, file)

    def start_second(self, checkpoint: Checkpoint) -> None:
        self.step, self.optimizer = 0, None
        self.weights = {name: value.detach().clone() for name, value in checkpoint.model.named_parameters()}

    def load_weights(self, checkpoint: Checkpoint) -> None:
        assert self.weights is not None
        write_back(checkpoint, {name: torch.nn.Parameter(value) for name, value in self.weights.items()})


def _refuse_foreign(partial: Path) -> None:
    """Raise InputError for a folder that holds other files than a conversion's: it is deleted at the end."""
    if partial.is_dir() and not partial.is_symlink():
        names = [path.name for path in partial.iterdir()]
        if all(name == _STATE_FILE or name.startswith(f".{_STATE_FILE}.") for name in names):
            return
    elif not partial.exists() and not partial.is_symlink():
        return
    raise InputError(f"{partial} is in the way and is not an interrupted conversion of this program; move or remove it")


def _recipe_of(stored: dict[str, Any]) -> ConversionRecipe | None:
    """Read the recipe of a saved state, also one of an older version; None where it cannot be a recipe of this one."""
    data = {key: value for key, value in stored["data"].items() if key in ConversionData.model_fields}
    try:
        return ConversionRecipe.model_validate(stored | {"data": data})
    except ValidationError:
        return None


def _plain(ranges: Ranges) -> dict[str, dict[str, float]]:
    return {kind: asdict(interval) for kind, interval in ranges.items()}


def _intervals(ranges: Mapping[str, Mapping[str, float]]) -> dict[str, Interval]:
    return {kind: Interval(**ends) for kind, ends in ranges.items()}


def _train(
    graph: TrainableGraph, options: PolynomialOptions, rows: Tensor, recipe: ConversionRecipe, state: _State, partial: Path,
    progress: Progress, stage: str,
) -> None:  # fmt: skip
    """Train the rest of a stage. `options`: those the graph was made with."""
    section, first = recipe.training, stage == "attention"
    steps, peak = (
        (section.steps, section.learning_rate) if first else (section.polynomial_steps, section.polynomial_learning_rate)
    )
    parameters = list(graph.weights.values())
    if state.weights is not None:
        for name, value in state.weights.items():
            graph.weights[name].data.copy_(value)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=section.weight_decay)
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    for step in range(state.step, steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * _schedule(step, steps, section.warmup_steps)
        loss = graph.loss(batch_of(rows, step, section.batch_size, section.seed), graph.observer)
        measured, weights = graph.observer.measured, recipe.range_loss
        total = loss + weights.alpha * measured.range_term + weights.beta * measured.variance_term
        if not torch.isfinite(total):
            violations = describe_violations(options, measured.seen)
            causes = f"Outside of the domains: {violations}. " if violations else ""
            raise NotFiniteError(
                f"step {step + 1} of the stage {stage!r}: the loss is {total.item()}. "
                f"{causes}Lower the learning rate, or raise the margins or the range loss; the last saved state is kept"
            )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimizer.step()
        state.step = step + 1
        progress(stage, step + 1, steps, loss.item())
        if (step + 1) % section.save_steps == 0:
            state.weights = {name: value.detach().clone() for name, value in graph.weights.items()}
            state.optimizer = optimizer.state_dict()
            state.save(partial, recipe)


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _save(checkpoint: Checkpoint, options: PolynomialOptions, result: Conversion, out: Path) -> None:
    """Write the checkpoint beside `out` and rename it: a kill leaves no half checkpoint."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        staging = Path(scratch) / out.name
        config: Mapping[str, Any] = to_config(options)
        setattr(checkpoint.model.config, CONFIG_KEY, config)
        checkpoint.model.save_pretrained(staging)
        checkpoint.tokenizer.save_pretrained(staging)
        (staging / REPORT_FILE).write_text(result.to_json(), encoding="utf-8")
        staging.rename(out)
