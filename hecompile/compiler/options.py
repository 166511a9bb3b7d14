"""Define the options of both kinds of plans."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from hecompile.compiler.polynomial_options import PolynomialOptions, require_polynomial_family
from hecompile.errors import InputError
from hecompile.he.parameters import CATALOGUE, RingParameters
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.offload.place import Policy
from hecompile.passes.offload.quantize import Quantize
from hecompile.passes.offload.select_parameters import SelectParameters
from hecompile.passes.offload.select_weight_bits import TWO_BYTES, SelectWeightBits
from hecompile.plan.costs import CostModel
from hecompile.plan.hint_bits import Hints

WeightBits = int | Literal["auto"]
Experts = Literal["routed", "all"]
Head = Literal["local", "remote", "auto"]
Bounds = Literal["calibrated", "proven"]


@dataclass(frozen=True)
class CompileOptions:
    """Collect everything that decides a plan of linears. Raises InputError for a value out of range."""

    lora: AttachLora = field(default_factory=AttachLora)
    effective_bits: float = 8.0
    weight_bits: WeightBits = "auto"
    """Bits of the frozen weights; "auto": 8 or 12 for each linear, by the error that calibration predicts."""
    error_budget: float = SelectWeightBits.error_budget
    """What "auto" leaves to weights of one byte (`hecompile.passes.offload.select_weight_bits`)."""
    calibration: Path | None = None
    """Public text to calibrate on (`hecompile.compiler.calibration_file`); None: the model writes it."""
    ring: str | None = None
    batch_size: int = 8
    sequence_buckets: tuple[int, ...] = (32, 64, 128)
    public_seed: PublicSeed | None = None
    policy: Policy = "offload"
    costs: CostModel = field(default_factory=CostModel)
    head: Head = "local"
    """Who multiplies by the output head: the client, the worker, or "auto", whoever makes a step shorter by `costs`."""
    experts: Experts = "all"
    """Whom a mixture asks: "all" every expert for every token; "routed" an expert for the tokens that its router chose, from
    which the worker can read answers."""
    bounds: Bounds = "calibrated"
    """How far a token is scaled: "calibrated" until products like calibration's fill half of the room, and what wraps is
    found and sent again (`hecompile.he.wraps`); "proven" only so far that nothing can wrap."""
    hints: Hints = "stored"
    """Where hints are: "stored" in the client bundle, "fetched" from the worker's, or "computed" by the worker with every
    product (`hecompile.bundles.public_rows`)."""
    attention: str | ApproximateSoftmax | None = None
    norm: str | ApproximateRMSNorm | None = None
    activation: str | ApproximateSiLU | QuantizeActivation | None = None
    """Forms of attention, RMSNorm and SiLU, by name (`hecompile.compiler.polynomial_options`) or with options; None: the
    form that the checkpoint was converted for, else the exact one."""
    unconverted: bool = False
    """Take an attention that the checkpoint was not trained with, which makes its answers mean nothing."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        buckets = self.sequence_buckets
        if not buckets or min(buckets) < 2 or list(buckets) != sorted(set(buckets)):
            raise InputError(f"sequence buckets must be increasing lengths of at least 2, got {list(buckets)}")
        if self.experts not in get_args(Experts):
            raise InputError(f"experts must be one of {', '.join(get_args(Experts))}, got {self.experts!r}")
        if self.head not in get_args(Head):
            raise InputError(f"head must be one of {', '.join(get_args(Head))}, got {self.head!r}")
        if self.bounds not in get_args(Bounds):
            raise InputError(f"bounds must be one of {', '.join(get_args(Bounds))}, got {self.bounds!r}")
        if self.hints not in get_args(Hints):
            raise InputError(f"hints must be one of {', '.join(get_args(Hints))}, got {self.hints!r}")
        if not 0.0 < self.effective_bits < math.inf:
            raise InputError(f"effective bits must be a positive number, got {self.effective_bits}")
        if self.ring is not None and self.ring not in CATALOGUE:
            raise InputError(f"ring {self.ring!r} cannot be selected; choose from {', '.join(CATALOGUE)}")
        self.quantize()  # refuses bits that it does not make, before a model is read
        self.polynomials()

    @property
    def remote_head(self) -> bool:
        """Tell whether the worker multiplies by the head; "auto" is to be decided first (`deciding_head`)."""
        return self.head == "remote"

    def deciding_head(self, shape: tuple[int, int] | None) -> CompileOptions:
        """Return these options with "auto" decided for a head of that shape (V, H); None for a graph without one."""
        if self.head != "auto" or shape is None:
            return self if shape is not None else replace(self, head="local")
        return replace(self, head="remote" if self.costs.prefers_remote_head(*shape) else "local")

    def polynomials(self, config: Any = None) -> PolynomialOptions:
        """Return what the plan of a checkpoint with this configuration replaces by polynomials.

        Raises InputError where it is of a family whose parts no polynomial stands for.
        """
        chosen = PolynomialOptions.from_config(config).choosing(self.attention, self.norm, self.activation)
        if chosen and config is not None:
            require_polynomial_family(config)
        return chosen

    def ring_parameters(self) -> RingParameters | None:
        """Return the parameters of the ring named; None where the cheapest is to be chosen."""
        return None if self.ring is None else CATALOGUE[self.ring]

    def quantize(self) -> Quantize:
        """Return the pass that makes integers of the weights. Raises InputError for bits that it does not make."""
        return Quantize(TWO_BYTES if self.weight_bits == "auto" else self.weight_bits, self.remote_head)

    def select_weight_bits(self) -> SelectWeightBits:
        """Return the pass that chooses bits where they are not given."""
        return SelectWeightBits(self.error_budget, self.remote_head, self.effective_bits)

    def select_parameters(self) -> SelectParameters:
        """Return the pass that chooses ring and bytes for the longest batch that these options allow."""
        return SelectParameters(
            effective_bits=self.effective_bits,
            tokens=self.batch_size * self.sequence_buckets[-1],
            ring=self.ring_parameters(),
            costs=self.costs,
            stored_hints=self.hints != "computed",
            calibrated=self.bounds == "calibrated",
        )


@dataclass(frozen=True)
class CkksOptions:
    """Collect everything that decides a polynomial plan. Raises InputError for a value out of range.

    sequence_length: tokens of a prompt at most. levels: multiplications between two refreshes; 0: no refresh at all,
    with as many levels as the graph is deep. ring_dim: None for the smallest that has them. attention, norm, activation: as
    for `CompileOptions`. last_only: logits of the last position alone, for prompts of exactly sequence_length tokens.
    unconverted: take an attention that the checkpoint was not trained with.
    """

    sequence_length: int
    levels: int = 4
    ring_dim: int | None = None
    attention: str | None = None
    norm: str | None = None
    activation: str | None = None
    last_only: bool = False
    unconverted: bool = False

    def __post_init__(self) -> None:
        if self.levels < 0:
            raise InputError(f"levels must be at least 1, or 0 for no refreshes, got {self.levels}")
        if self.sequence_length < 2:
            raise InputError(f"the sequence length must be at least 2, got {self.sequence_length}")

    def polynomials(self, config: Any) -> PolynomialOptions:
        """Return what the plan of a checkpoint with this configuration replaces by polynomials. Raises InputError as
        `CompileOptions.polynomials` does."""
        require_polynomial_family(config)
        return PolynomialOptions.from_config(config).choosing(self.attention, self.norm, self.activation)
