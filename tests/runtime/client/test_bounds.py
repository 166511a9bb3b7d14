"""Gains of bounds: they follow what products reach, go down and never up, and come back from an earlier session."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from hecompile.bundles.client import ClientBundle
from hecompile.errors import InputError
from hecompile.he.parameters import LinearParameters
from hecompile.runtime.client.bounds import FULLEST, Bounds, read_gains, write_gains

LINEAR = LinearParameters(6, 3, max_l1=500, max_l2=250.0, gain=4.0)
HALF = 2.0**31


def bounds() -> Bounds:
    circuits = {"a": LINEAR, "b": LINEAR.proven}
    return Bounds(cast("ClientBundle", SimpleNamespace(wraps=Path("wraps"), circuits=circuits)))


def follow(own: Bounds, shares: list[float], gains: list[float]) -> None:
    """Let tokens reach these shares of q/2 in one output, under these gains."""
    rows, scale = torch.tensor([1e-3, 0.0, 2e-3]), np.array([1e-5 * (1 + index) for index in range(len(shares))])
    product = torch.zeros(len(shares), 3)
    product[:, 0] = 0.01 * HALF * torch.from_numpy(scale).float() * rows[0]
    product[:, 2] = -torch.tensor(shares) * HALF * torch.from_numpy(scale).float() * rows[2]
    own.follow("a", np.array(gains), product, scale, rows)


def test_a_gain_goes_down_when_products_come_near_the_modulus() -> None:
    own = bounds()
    assert own.gains == {"a": 4.0}
    follow(own, [0.3, FULLEST - 0.01], [4.0, 4.0])
    assert own.parameters("a") is LINEAR
    follow(own, [0.96, 0.2], [4.0, 4.0])
    assert own.gains["a"] == pytest.approx(4 * FULLEST / 0.96)
    follow(own, [0.1], [4.0])
    assert own.gains["a"] == pytest.approx(4 * FULLEST / 0.96)


def test_a_row_that_was_repeated_counts_as_much_as_it_would_have_filled() -> None:
    own = bounds()
    follow(own, [0.3, 0.4], [4.0, 1.0])  # 1.6 of q/2 under a gain of 4
    assert own.gains["a"] == pytest.approx(FULLEST / 0.4)
    follow(own, [0.9], [1.0])
    assert own.gains == {} and own.parameters("a").gain == 1


def test_zeros_and_what_is_not_finite_say_nothing() -> None:
    own = bounds()
    product = torch.full((2, 3), float("nan"))
    product[0] = 0
    own.follow("a", np.array([4.0, 4.0]), product, np.array([0.0, 1.0]), None)
    assert own.gains == {"a": 4.0}


def test_gains_of_an_earlier_session_are_taken_where_they_are_lower() -> None:
    own = bounds()
    own.lower({"a": 9.0, "b": 2.0, "unknown": 3.0})
    assert own.gains == {"a": 4.0}
    own.lower({"a": 2.5})
    assert own.gains == {"a": 2.5}
    own.lower({})
    assert own.gains == {}


def test_gains_come_back_from_their_file_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gains.json"
    write_gains(path, {"a": 2.5})
    assert read_gains(path) == {"a": 2.5}
    for content in ("{", "[1.0]", '{"a": 0.5}', '{"a": NaN}', '{"a": "2"}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"gains\.json is damaged, .* resume from another"):
            read_gains(path)
