"""Represent a split plan, the client's graph and the worker's products, and predict the precision of each product."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.bundles.public_rows import exact_name
from hecompile.errors import HecompileError
from hecompile.he.parameters import LARGEST_GAIN, LOG_Q, LinearParameters
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.he.wraps import largest_factor
from hecompile.plan.encrypted_linear import encrypted_linear_model

DIRECTIONS = ("forward", "backward")
MOST_OUTPUTS = 2**15
"""Inputs of the backward product of a linear: as many as hints and check vectors are exact for."""
PART = 2**14
"""Outputs of a part of a wider linear, at most. The public matrix has a row for each input of the widest product, and half
as many outputs have half a bit more precision backward; stacked projections of the models in use have as many."""
_FALLBACK_CREST = 16.0
"""Crest of values that calibration did not see, because their gradient was zero."""


MARGIN = 2.0
"""How much larger than any of calibration a product may be, in proportion to what is multiplied, before it wraps."""

_LEAST_GAIN = 1.2
"""Gain that is worth a look at every product: a quarter of a bit."""


@dataclass(frozen=True)
class RemoteCircuit:
    """Represent one product of one linear.

    Attributes:
        linear: name of the linear; the circuit is `<linear>.<direction>`.
        parameters: shapes, norms and bits of a word.
        read_weight: returns `weight`; it may be read from a file at each call, so that a plan needs no memory for it.
        norms: of the matrix [features_out, features_in], measured.
        crest: max|x| / rms(x) of the values that will be encoded, from calibration.
    """

    linear: str
    direction: str
    parameters: LinearParameters
    read_weight: Callable[[], np.ndarray]
    norms: WeightNorms
    crest: float

    @property
    def name(self) -> str:
        return f"{self.linear}.{self.direction}"

    @property
    def weight(self) -> np.ndarray:
        """Return int8 or int16 [features_in, features_out], as the worker multiplies by it from the right."""
        return self.read_weight()

    def model(self) -> ir.Model:
        """Make the worker circuit, not yet lowered."""
        return encrypted_linear_model(self.weight, self.parameters.upload_bits, self.parameters.reply_bits, self.name)

    def exact_model(self) -> ir.Model:
        """Make the circuit with all bits in and out, for a worker that computes hints; not yet lowered."""
        return encrypted_linear_model(self.weight, LOG_Q, LOG_Q, exact_name(self.name))

    @property
    def largest_factor(self) -> int | None:
        """Return up to what the factors are drawn that find wrapped products; None where the bound is the proven one."""
        return None if self.parameters.gain == 1 else largest_factor(self.parameters, self.norms)

    @property
    def effective_bits(self) -> float:
        return effective_bits(self.parameters, self.norms, self.crest)

    @property
    def noise_std(self) -> float:
        """Predict the noise, in units of the integer product: root mean square over the output features."""
        return rms_noise(self.parameters, self.norms)


@dataclass(frozen=True)
class SplitPlan:
    """Hold the client plan, which lacks the weights of remote linears, and the worker's circuits."""

    client: ir.Model
    circuits: tuple[RemoteCircuit, ...]


def parts_of(outputs: int, most: int = MOST_OUTPUTS, part: int = PART) -> list[slice]:
    """Return the outputs of each product of a linear: all where they are up to `most`, else parts of about one size, up to
    `part`."""
    size = outputs if outputs <= most else math.ceil(outputs / math.ceil(outputs / part))
    return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]


def effective_bits(parameters: LinearParameters, norms: WeightNorms, crest: float) -> float:
    """Predict log2(rms of the product / standard deviation of its noise), both averaged over the rows of the matrix.

    With b effective bits the encryption adds noise of 2^-b of the result's own size: 1.6 % at 6 bits, 0.4 % at 8
    (as rounding to bfloat16 does), 0.1 % at 10.

    A token is encoded with its largest magnitude at the input bound X, or with its norm at the norm bound N, whichever
    makes it larger: its rms is max(X / crest, N / √in). The product with a row that it is not correlated with has rms
    ‖W_i‖₂·rms(x), the case in which precision is scarcest.
    """
    rms = max(parameters.input_bound / crest, parameters.norm_bound / math.sqrt(parameters.in_features))
    signal = math.sqrt(norms.mean_square_l2) * rms
    if signal <= 0:
        return math.inf  # a matrix of zeros: its product is exact
    return math.log2(signal / rms_noise(parameters, norms))


def largest_crest(values: Iterable[ir.Value | None], key: str) -> float:
    """Return the largest crest that calibration wrote to values, under RANGE or GRADIENT_RANGE, and 16 if it wrote none.

    Values that stand in one row are as uneven as the most uneven of them.
    """
    crests = [
        json.loads(value.metadata_props[key])["crest"]
        for value in values
        if value is not None and key in value.metadata_props
    ]
    return max(crests, default=_FALLBACK_CREST)


def calibrated_gain(peak: float, norms: WeightNorms, largest: int) -> float:
    """Return by how much a bound may exceed the proven one, so that products like those of calibration fill 1/MARGIN of q/2.

    Args:
        peak: the largest |W_i·x| / (largest · ‖x‖₂) that calibration saw; 0 where it saw none, which gives 1.
        norms: of the integer matrix.
        largest: its largest |weight|.
    """
    if peak <= 0 or largest == 0:
        return 1.0
    gain = min(LARGEST_GAIN, norms.max_l2 / (MARGIN * peak * largest))
    return gain if gain >= _LEAST_GAIN else 1.0


def reachable_bits(weight: np.ndarray, forward_crest: float, backward_crest: float | None) -> float:
    """Predict the most effective bits that both products of a matrix can have, with all bytes sent.

    weight: int8 or int16 [out, in]. backward_crest: None where there is no backward product. It is -inf where no input fits.
    """
    reached = []
    for norms, crest in zip(measure_norms(torch.from_numpy(weight)), (forward_crest, backward_crest), strict=True):
        if crest is None:
            continue
        try:
            reached.append(effective_bits(LinearParameters.from_norms(norms), norms, crest))
        except HecompileError:
            return -math.inf
    return min(reached)


def weight_bits(weight: np.ndarray) -> int:
    """Return the bits that hold every weight of an int8 or int16 matrix: 8, or more where they are int16."""
    return max(8, max(int(weight.max()), -int(weight.min())).bit_length() + 1)


def rms_noise(parameters: LinearParameters, norms: WeightNorms) -> float:
    """Return the root mean square of `LinearParameters.noise_std` over the rows; its square is linear in ‖W_i‖₂²."""
    return float(parameters.noise_std(math.sqrt(norms.mean_square_l2)))
