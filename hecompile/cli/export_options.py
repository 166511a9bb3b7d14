"""Hold the options of `hecompile export` and make the compiler's options of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from hecompile.cli.options import Precision
from hecompile.errors import InputError

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.he.random.sampling import PublicSeed
    from hecompile.passes.offload.attach_lora import AttachLora
    from hecompile.plan.hint_bits import Hints


@dataclass(frozen=True)
class LoraOptions:
    """Hold what the adapter looks like."""

    panel = "Adapter"
    lora_r: Annotated[int, typer.Option(help="Rank r of the LoRA matrices (PEFT's r).")] = 8
    lora_alpha: Annotated[float, typer.Option(help="LoRA scaling is lora_alpha / r (PEFT's lora_alpha).")] = 16.0
    lora_dropout: Annotated[float, typer.Option(help="Dropout before lora_A, in training (PEFT's lora_dropout).")] = 0.0
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated linears that get an adapter, as PEFT names them: q_proj,v_proj for a Llama. By default "
            "all of the model's decoder (docs/models.md)."
        ),
    ] = None
    layers_to_transform: Annotated[
        str | None,
        typer.Option(
            help="Layers that get an adapter, counted from 0 (PEFT's layers_to_transform): 8-15, or 8,9,12-15. By default "
            "all. Below the lowest of them nothing is sent backward."
        ),
    ] = None
    layers_pattern: Annotated[
        str | None,
        typer.Option(help="Comma-separated names of the lists of layers that these are counted in (PEFT's layers_pattern)."),
    ] = None

    def attach(self, linears: tuple[str, ...]) -> AttachLora:
        """Return the options of the pass that attaches the adapter. Raises InputError for a value out of range, or a target
        that is none of `linears`, those of the model's family."""
        from hecompile.passes.offload.attach_lora import AttachLora

        targets = linears if self.target_modules is None else tuple(_split(self.target_modules))
        layers = None if self.layers_to_transform is None else _layers(self.layers_to_transform)
        pattern = None if self.layers_pattern is None else tuple(_split(self.layers_pattern))
        options = AttachLora(self.lora_r, self.lora_alpha, self.lora_dropout, targets, layers, pattern)
        if other := sorted(set(targets) - set(linears)):
            raise InputError(f"target module {other[0]!r} does not exist in this model; choose from {', '.join(linears)}")
        return options


@dataclass(frozen=True)
class BatchOptions:
    """Hold how many sequences of what lengths a batch has."""

    panel = "Batches"
    batch_size: Annotated[int, typer.Option(help="Most sequences per batch.")] = 8
    sequence_buckets: Annotated[
        str, typer.Option(help="Comma-separated padded lengths; a batch takes the smallest that fits.")
    ] = "32,64,128"

    def lengths(self) -> tuple[int, ...]:
        """Return the padded lengths. Raises InputError for anything but whole numbers."""
        try:
            return tuple(int(part) for part in _split(self.sequence_buckets))
        except ValueError:
            raise InputError(
                f"--sequence-buckets must be whole numbers with commas between, got {self.sequence_buckets!r}"
            ) from None


@dataclass(frozen=True)
class EncryptionOptions:
    """Hold what decides exactness, bytes and security of the encrypted products."""

    panel = "Encrypted products"
    precision: Precision = 8.0
    weight_bits: Annotated[
        str,
        typer.Option(
            help="Bits of the quantised frozen weights, 8 to 12, or 'auto': 12 for the linears whose rounding would move "
            "the gradients most, 8 for the others. 8 is one product of bytes per limb on the worker and follows the loss "
            "of float32 training; more take up to twice the worker's time and follow its gradients too."
        ),
    ] = "auto"
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="PUBLIC text that ranges are measured and weights are rounded on: one text a line, or .jsonl as for "
            "training. The worker gets weights that depend on it. By default the model writes text itself."
        ),
    ] = None
    ring: Annotated[
        str | None,
        typer.Option(
            help="Ring dimension x module rank, e.g. 512x3. All that can be selected have at least 128 bits of security; "
            "by default the cheapest for the batch size is taken, the more secure where two cost about the same."
        ),
    ] = None
    public_seed: Annotated[
        str | None,
        typer.Option(
            help="64 hex digits: seed of the public matrix A. The same seed and input give the same bytes. By default a "
            "fresh one is drawn, so that work done against one bundle is worth nothing against another."
        ),
    ] = None
    placement: Annotated[
        str,
        typer.Option(
            help="'offload': every decoder linear goes to the worker. 'cheapest': a minimum cut decides by cost; at small "
            "sizes it may keep everything on the client."
        ),
    ] = "offload"
    head: Annotated[
        str | None,
        typer.Option(
            help="Who multiplies by the output head. 'local': the client, for which it is more than half of its work at "
            "1B size. 'remote': the worker, for about seven bytes per word of the vocabulary and scored position. 'auto': "
            "whoever makes a step shorter by the cost model. Default: local; auto with --placement cheapest."
        ),
    ] = None
    experts: Annotated[
        str,
        typer.Option(
            help="Whom a mixture of experts asks. 'all': every expert for every token, which tells nothing. 'routed': an "
            "expert for the tokens that the router chose for it, which takes fewer bytes by as many times as there are "
            "experts for each one chosen, and gives answers away to the worker (docs/models.md)."
        ),
    ] = "all"
    bounds: Annotated[
        str,
        typer.Option(
            help="How far values are scaled up before they are encrypted. 'calibrated': to half of what products "
            "of the calibration's text leave room for; a row whose product overflows all the same is noticed by the client, "
            "which sends it again. 'proven': only so far that nothing can overflow, which takes more bytes."
        ),
    ] = "calibrated"
    hints: Annotated[
        str | None,
        typer.Option(
            help="'stored': hints lie in the client bundle. 'fetched': they lie in the worker's, and the client downloads "
            "each ahead of its use, once per pass over a batch. 'computed': the worker computes one with every product. "
            "`inspect` shows the bytes (docs/hints.md). By default 'stored'."
        ),
    ] = None
    no_hints: Annotated[bool, typer.Option("--no-hints", help="As --hints computed.")] = False

    def bits(self) -> int | Literal["auto"]:
        """Return the bits of the weights. Raises InputError for anything but a whole number or "auto"."""
        if self.weight_bits == "auto":
            return "auto"
        try:
            return int(self.weight_bits)
        except ValueError:
            raise InputError(f"--weight-bits must be auto or a whole number, got {self.weight_bits!r}") from None

    def hints_option(self) -> Hints:
        """Return where hints are. Raises InputError for a place that is none, or two of them."""
        if self.no_hints and self.hints not in (None, "computed"):
            raise InputError(f"--no-hints is --hints computed; drop it, or --hints {self.hints}")
        if self.hints not in (None, "stored", "fetched", "computed"):
            raise InputError(f"--hints must be stored, fetched or computed, got {self.hints!r}")
        return "computed" if self.no_hints else cast("Hints", self.hints or "stored")

    def seed(self) -> PublicSeed | None:
        """Return the seed of the public matrix, None where one is drawn. Raises InputError for anything but 64 digits."""
        from hecompile.he.random.sampling import PublicSeed

        return None if self.public_seed is None else PublicSeed.from_hex(self.public_seed)


def _layers(text: str) -> tuple[int, ...]:
    """Return the layers of `8,9,12-15`. Raises InputError for anything else."""
    layers: list[int] = []
    for part in _split(text):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"--layers-to-transform must be layers counted from 0, such as 8-15 or 8,9,12, got {text!r}")
        layers += range(first, last + 1)
    return tuple(layers)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
