"""What the split yields: a client plan and the products that the worker computes. And the precision of such a product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.he.parameters import LinearParameters
from passes.lower_worker import encrypted_linear_model

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class RemoteCircuit:
    """One product of one linear.

    Attributes:
        linear: name of the linear; the circuit is `<linear>.<direction>`.
        parameters: shapes, norms and byte counts.
        weight: int8 or int16 [features_in, features_out], as the worker multiplies by it from the right.
        crest: max|x| / rms(x) of the values that will be encoded, from calibration.
    """

    linear: str
    direction: str
    parameters: LinearParameters
    weight: np.ndarray
    crest: float

    @property
    def name(self) -> str:
        return f"{self.linear}.{self.direction}"

    def model(self) -> ir.Model:
        """The worker circuit, not yet lowered."""
        return encrypted_linear_model(self.weight, self.parameters.upload_limbs, self.parameters.reply_bytes, self.name)

    @property
    def effective_bits(self) -> float:
        return effective_bits(self.parameters, torch.from_numpy(self.weight.T), self.crest)

    @property
    def noise_std(self) -> float:
        """Predicted noise, in units of the integer product: root mean square over the output features."""
        row_l2 = torch.from_numpy(self.weight.T).to(torch.float64).norm(dim=1)  # [out]
        return float(torch.as_tensor(self.parameters.noise_std(row_l2)).square().mean().sqrt())


@dataclass(frozen=True)
class SplitPlan:
    """The client plan (without the weights of remote linears) and the worker's circuits."""

    client: ir.Model
    circuits: tuple[RemoteCircuit, ...]


def effective_bits(parameters: LinearParameters, matrix: torch.Tensor, crest: float) -> float:
    """log2(rms of the product / standard deviation of its noise), both averaged over the rows of integer `matrix` [out, in].

    A token is encoded with its largest magnitude at the input bound X, or with its norm at the norm bound N, whichever
    makes it larger: its rms is max(X / crest, N / √in). The product with a row that it is not correlated with has rms
    ‖W_i‖₂·rms(x), the case in which precision is scarcest.
    """
    row_l2 = matrix.to(torch.float64).norm(dim=1)  # [out]
    noise = torch.as_tensor(parameters.noise_std(row_l2))
    rms = max(parameters.input_bound / crest, parameters.norm_bound / math.sqrt(parameters.in_features))
    signal = row_l2 * rms
    if not bool((signal > 0).any()):
        return math.inf  # a matrix of zeros: its product is exact
    return 0.5 * math.log2(float(signal.square().mean() / noise.square().mean()))
