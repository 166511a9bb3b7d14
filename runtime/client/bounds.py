"""Scale tokens by calibrated bounds, find the products that wrapped all the same, and follow what the products really reach.

    bound of calibration → encrypt, ask, verify, decrypt → which tokens wrapped? → those again, under the proven bound

`hecompile.he.wraps` says how a wrap is seen, and with which probability one is missed. The client decrypts everything, so
that it can follow the largest |W_i·x| of a circuit as training moves activations, and lower the gain before products come to
wrap: the running maximum of delayed scaling, as for 8-bit floats (Micikevicius et al., arXiv 2209.05433; `amax_history` of
NVIDIA's Transformer Engine). A gain is never raised.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.errors import InputError
from hecompile.files import unreadable
from hecompile.foreign import parse_json
from hecompile.he.kernels.norms import row_scales
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.wraps import WrapChecks, read_wrap_checks

FULLEST = 0.8
"""Share of q/2 that the largest product seen of a circuit may reach before its gain is lowered to where it does not."""

_HALF = 2.0 ** (LOG_Q - 1)


@runtime_checkable
class BoundedModel(Protocol):
    """Mark an `AdapterModel` whose products may have calibrated bounds."""

    @property
    def gains(self) -> dict[str, float]:
        """Return the present gain of every circuit whose bound is beyond the proven one."""

    def lower_gains(self, gains: Mapping[str, float]) -> None:
        """See `Bounds.lower`."""


class Bounds:
    """Hold the bounds of a plan's circuits as they are now. Safe to use from several threads.

    Args:
        bundle: the client bundle, whose circuits have their gains from calibration.
    """

    def __init__(self, bundle: ClientBundle) -> None:
        self._folder = bundle.wraps
        self._parameters = dict(bundle.circuits)
        self._checks: dict[str, WrapChecks] = {}
        self._lock = threading.Lock()

    def parameters(self, circuit: str) -> LinearParameters:
        """Return the circuit with its present gain."""
        with self._lock:
            return self._parameters[circuit]

    @property
    def gains(self) -> dict[str, float]:
        """Return the present gain of every circuit whose bound is beyond the proven one."""
        with self._lock:
            return {name: linear.gain for name, linear in self._parameters.items() if linear.gain > 1}

    def lower(self, gains: Mapping[str, float]) -> None:
        """Lower gains to those of an earlier session, for circuits that are not in `gains` to 1; none is raised."""
        with self._lock:
            for circuit, linear in self._parameters.items():
                self._lower(circuit, min(linear.gain, max(1.0, gains.get(circuit, 1.0))))

    def wrapped(
        self, circuit: str, x: Tensor, product: Tensor, scale: NDArray[np.float64], column_scale: Tensor | None,
        row_scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the tokens whose product wrapped, int64 `[wrapped]`; see `WrapChecks.wrapped`.

        Raises:
            InputError: the circuit's vectors cannot be read.
        """
        with self._lock:
            checks = self._checks.get(circuit)
            if checks is None:
                path = self._folder / f"{circuit}.npy"
                checks = self._checks[circuit] = read_wrap_checks(path, self._parameters[circuit])
        found = checks.wrapped(x, product, torch.from_numpy(scale), column_scale, row_scale)
        return found.nonzero().flatten()

    def follow(
        self, circuit: str, gain: NDArray[np.float64], product: Tensor, scale: NDArray[np.float64], row_scale: Tensor | None
    ) -> None:  # fmt: skip
        """Lower the gain of a circuit to where the largest of these products would fill FULLEST of q/2, if it is higher.

        Args:
            circuit: its name.
            gain: float64 `[T]`, of the bound that each token was scaled by.
            product: float32 `[T, out]`, decrypted; nothing of it wrapped.
            scale: float64 `[T]`, of the tokens as they were encoded.
            row_scale: float32 `[out]`, which the product was multiplied with; None for ones.
        """
        unit = np.where(scale > 0, scale * gain, np.inf)
        largest = float((largest_products(product, row_scale) / unit).max(initial=0.0)) / _HALF  # with a gain of 1
        if largest > 0:
            with self._lock:
                self._lower(circuit, max(1.0, FULLEST / largest))

    def _lower(self, circuit: str, gain: float) -> None:
        before = self._parameters[circuit]
        if gain < before.gain:  # without a word in a log: it depends on data
            self._parameters[circuit] = dataclasses.replace(before, gain=gain)


def largest_products(product: Tensor, row_scale: Tensor | None) -> NDArray[np.float64]:
    """Return the largest |Y_i| of each token in units of its scale, float64 `[T]`; 0 where something is not finite."""
    factors = torch.ones(product.shape[1], dtype=torch.float64)
    if row_scale is not None:
        factors = torch.where(row_scale == 0, 0.0, 1 / row_scale.double())
    largest = np.empty(len(product))
    row_scales(product.contiguous().numpy().reshape(-1), factors.numpy(), 1, 0.0, largest)
    return np.nan_to_num(largest, nan=0.0)


def write_gains(path: Path, gains: Mapping[str, float]) -> None:
    """Write gains as JSON. They tell how large products of the data were. Raises OSError as files do."""
    path.write_text(json.dumps(gains, indent=1) + "\n", encoding="utf-8")


def read_gains(path: Path) -> dict[str, float]:
    """Read what `write_gains` has written. Raises InputError for a file that is something else."""
    try:
        gains = parse_json(path.read_bytes())
        if isinstance(gains, dict) and all(type(gain) is float and gain >= 1 for gain in gains.values()):
            return gains
    except OSError as error:
        raise unreadable(path, error, "resume from another checkpoint") from error
    except ValueError:
        pass
    raise InputError(f"{path} is damaged, it does not hold gains of bounds; resume from another checkpoint")
