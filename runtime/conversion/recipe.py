"""Define the conversion recipe: which parts become polynomials, their ranges, the text and the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hecompile.checkpoint.place import local_path
from hecompile.polynomial.names import EXACT, current_name
from hecompile.runtime.recipes.document import load_document, resolve_paths
from hecompile.runtime.recipes.section import Positive, Section
from hecompile.runtime.recipes.training import RangeLossSection

_PATH_KEYS = (("out",), ("data", "train_file"), ("data", "validation_file"))
PositiveFloat = Annotated[float, Field(gt=0)]


class AttentionSection(Section):
    """Choose the attention: fields of `ApproximateSoftmax`, how it is trained, and the ranges that it is trained into.

    Attributes:
        training_form: of the first stage: none for `form` itself, or the stable form, whose powers lie between 0 and 1
            whatever the scores are. Ranges, range loss and all that follows the first stage are of `form`.
        bound: the range loss keeps |scores| (power) or exponents (gaussian_kernel) under it.
        divisor_lower, divisor_upper: the range loss keeps a power attention's divisors between them.
    """

    variant: Literal["exact", "power", "gaussian_kernel"] = "exact"
    power: Literal[2, 4, 6, 8] = 4
    form: Literal["stable", "lipschitz", "length_agnostic"] = "length_agnostic"
    training_form: Literal["stable"] | None = None
    division: Literal["exact", "goldschmidt"] = "goldschmidt"
    epsilon: PositiveFloat = 1e-3
    error: PositiveFloat = 1e-3
    margin: Annotated[float, Field(ge=1)] = 1.5
    bound: PositiveFloat = 10.0
    divisor_lower: PositiveFloat = 0.1
    divisor_upper: PositiveFloat = 100.0

    @model_validator(mode="after")
    def _can_end_as_polynomials(self) -> AttentionSection:
        if self.variant == "power" and self.form == "stable":
            raise ValueError(
                "the stable form divides by a maximum, which is no polynomial, and a conversion ends in polynomials: take "
                "form lipschitz or length_agnostic, and training_form stable for the first stage"
            )
        if self.training_form is not None and self.variant != "power":
            raise ValueError(f"training_form is of the power attention; {self.variant} has one form only")
        return self


class NormSection(Section):
    """Choose the norm: fields of `ApproximateRMSNorm`; the range loss keeps variances between `lower` and `upper`."""

    form: Literal["exact", "polynomial"] = "exact"
    error: PositiveFloat = 1e-3
    margin: Annotated[float, Field(ge=1)] = 1.5
    lower: PositiveFloat = 0.05
    upper: PositiveFloat = 5.0


class ActivationSection(Section):
    """Choose the activation: one series (polynomial), or a composition of odd polynomials (composed).

    Other fields are those of `ApproximateSiLU`; the range loss keeps |inputs| under `bound`.
    """

    form: Literal["exact", "polynomial", "composed"] = "exact"
    error: PositiveFloat = 1e-2
    margin: Annotated[float, Field(ge=1)] = 1.5
    bound: PositiveFloat = 6.0


class ConversionData(Section):
    """Name the text: JSONL files with `text`, or `prompt` and `completion`, on each line.

    Examples follow each other with bos and eos and are cut into rows of `length` tokens; the loss is on every token.
    """

    train_file: Path
    validation_file: Path
    length: Annotated[int, Field(ge=2)] = 64

    @model_validator(mode="before")
    @classmethod
    def _refuse_generated_documents(cls, document: Any) -> Any:
        if isinstance(document, dict) and (count := document.get("generated_documents")) is not None:
            options = [f"--documents {count}"]
            options += [
                f"--{option} {document[key]}"
                for option, key in (("heldout", "generated_heldout"), ("seed", "seed"))
                if key in document
            ]
            raise ValueError(
                "generated_documents is no key any more. Write the text with `python -m "
                f"hecompile.models.worlds.public_world DIRECTORY {' '.join(options)}`, and give train_file "
                "DIRECTORY/train.jsonl and validation_file DIRECTORY/heldout.jsonl"
            )
        return document


class ConversionTraining(Section):
    """Set AdamW with warm-up and cosine decay in each of two stages.

    The first has `steps` with the new attention beside exact norms and activations, the second `polynomial_steps` with every
    polynomial in the graph, on domains fixed after the first.
    """

    steps: Annotated[int, Field(ge=0)] = 300
    polynomial_steps: Annotated[int, Field(ge=0)] = 100
    batch_size: Positive = 16
    learning_rate: PositiveFloat = 1e-3
    polynomial_learning_rate: PositiveFloat = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    save_steps: Positive = 100
    disable_tqdm: bool = False

    @model_validator(mode="after")
    def _some(self) -> ConversionTraining:
        if self.steps + self.polynomial_steps == 0:
            raise ValueError("steps and polynomial_steps are both 0: nothing would be trained")
        return self


class ConversionRecipe(Section):
    """Describe one conversion: the checkpoint `model` becomes the checkpoint `out`.

    A section may be given as its name alone, as in `attention: power`.
    """

    command = "convert"
    model: str
    out: Path
    attention: AttentionSection = AttentionSection()
    norm: NormSection = NormSection()
    activation: ActivationSection = ActivationSection()
    range_loss: RangeLossSection = RangeLossSection()
    data: ConversionData
    training: ConversionTraining = ConversionTraining()

    @model_validator(mode="before")
    @classmethod
    def _names(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        document = dict(document)
        for part, key in (("attention", "variant"), ("norm", "form"), ("activation", "form")):
            if isinstance(document.get(part), str):
                document[part] = {key: document[part]}
            if isinstance(document.get(part), dict) and key in document[part]:
                document[part] = document[part] | {key: current_name(part, document[part][key])}
        return document

    @model_validator(mode="after")
    def _something(self) -> ConversionRecipe:
        if {self.attention.variant, self.norm.form, self.activation.form} == {EXACT}:
            raise ValueError("nothing to convert: give attention, norm or activation a polynomial")
        return self


def load_conversion(path: str | Path, overrides: Sequence[str] = ()) -> ConversionRecipe:
    """Load a conversion recipe, see `hecompile.runtime.recipes.document.load_document`.

    A `model` is a path as seen from the recipe, or a hub id (`hecompile.checkpoint.place.local_path`).
    """
    return load_document(path, overrides, ConversionRecipe, _resolve)


def _resolve(document: dict[str, Any], directory: Path) -> None:
    resolve_paths(document, _PATH_KEYS, directory)
    model = document.get("model")
    if isinstance(model, str) and (path := local_path(model, directory)) is not None:
        document["model"] = str(path)
