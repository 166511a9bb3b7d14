"""Options out of range are refused before anything is loaded or written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import CompileOptions
from hecompile.errors import HecompileError, InputError, SecurityError
from hecompile.he.parameters import CATALOGUE, RingParametersLiteral
from hecompile.he.parameters import RingParameters as Ring
from hecompile.he.random.sampling import PublicSeed
from tests.support.tiny import OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_buckets": ()}, r"increasing lengths of at least 2, got \[\]"),
        ({"sequence_buckets": (1, 8)}, r"increasing lengths of at least 2, got \[1, 8\]"),
        ({"sequence_buckets": (16, 8)}, r"got \[16, 8\]"),
        ({"sequence_buckets": (8, 8)}, r"got \[8, 8\]"),
        ({"effective_bits": 0.0}, "effective bits must be a positive number, got 0.0"),
        ({"weight_bits": 7}, "weights can have 8, 9, 10, 11, 12 bits, got 7"),
        ({"effective_bits": float("nan")}, "effective bits must be a positive number, got nan"),
        ({"ring": "128x8"}, "ring '128x8' cannot be selected; choose from 128x12"),
        ({"ring": "1024x1"}, "ring '1024x1' cannot be selected"),
        ({"ring": "512 x 3"}, "ring '512 x 3' cannot be selected"),
        ({"ring": ""}, "ring '' cannot be selected"),
    ],
)
def test_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompileOptions(**options)


@pytest.mark.parametrize(("ring_dim", "rank"), [(128, 8), (1024, 1), (256, 4), (512, 2), (16, 1)])
def test_no_literal_gives_a_ring_under_128_bits(ring_dim: int, rank: int) -> None:
    with pytest.raises(SecurityError, match="no security estimate covers"):
        Ring.from_literal(RingParametersLiteral(ring_dim, rank))


def test_everything_that_can_be_selected_has_128_bits() -> None:
    assert min(CompileOptions(ring=name).ring_parameters().security_bits for name in CATALOGUE) >= 128


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "0" * 63, "0" * 65, "0x" + "0" * 62])
def test_seed_that_is_not_64_hex_digits(text: str) -> None:
    with pytest.raises(HecompileError, match=r"a public seed is (written as 64 hexadecimal digits|32 bytes)"):
        PublicSeed.from_hex(text)


def test_bucket_longer_than_the_model(checkpoint: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, sequence_buckets=(8, 65))
    with pytest.raises(InputError, match="sequence bucket 65 is longer than the model's 64 positions"):
        compile_checkpoint(str(checkpoint), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_export")
def test_precision_that_cannot_be_reached_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, effective_bits=30.0)
    with pytest.raises(InputError, match=r"q_proj-k_proj-v_proj, forward: 30\.0 effective bits cannot be reached"):
        compile_checkpoint(str(checkpoint), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
