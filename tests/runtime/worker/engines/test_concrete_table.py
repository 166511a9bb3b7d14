"""A quantised activation of a plan under TFHE: equal to its cleartext integer form, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecompile.approximation.silu_table import ActivationTable, silu_table
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import InputError, WorkerError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import attributes_of, nodes_of_type
from hecompile.graph.quantized_operators import table_indices, table_values
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.runtime.worker.engines.concrete_table import EncryptedTable
from tests.support.tiny import exported, samples


@pytest.fixture(scope="module")
def small() -> EncryptedTable:
    return EncryptedTable(silu_table(4, -8.0, 5.0))


def test_every_entry(small: EncryptedTable) -> None:
    indices = np.arange(16).reshape(2, 8)
    found = small.lookup(indices)
    assert found.shape == (2, 8) and found.dtype == np.int64
    np.testing.assert_array_equal(found, small.table.lookup(indices))
    assert small.keygen_seconds > 0 and small.evaluate_seconds > 0 and small.key_bytes > 1e6


def test_shapes_that_fill_no_block(small: EncryptedTable) -> None:
    for indices in (np.array(3), np.zeros((0, 4), dtype=np.uint8)):
        found = small.lookup(indices)
        np.testing.assert_array_equal(found, small.table.lookup(indices.astype(np.int64)))
        assert found.shape == indices.shape


def test_the_activation_of_a_plan_at_six_bits() -> None:
    """Table and inputs are those of a Llama's own SiLU: a run of its graph, and the same under TFHE on some elements."""
    options = PolynomialOptions(activation=QuantizeActivation(bits=6))
    model = approximate(exported(), options, Calibrate(samples()))
    node = next(nodes_of_type(model, "QuantizedSiLU"))
    seen: dict[str, torch.Tensor] = {}
    tokens = torch.tensor([[5, 200, 31, 7]])
    inputs = graph_inputs(tokens, torch.ones_like(tokens))
    Interpreter(model).run(inputs, observer=lambda value, x: seen.update({str(value.name): x}))
    given = attributes_of(node)
    x, y = (seen[str(value.name)][0, -1, :6] for value in (node.inputs[0], node.outputs[0]) if value is not None)
    encrypted = EncryptedTable(ActivationTable.of(given), block=6)
    integers = encrypted.lookup(table_indices(x, given).numpy())
    assert len(set(integers.tolist())) > 2
    assert torch.equal(table_values(torch.from_numpy(integers), given), y)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.array([0, 16]), "from 0 to 15"),
        (np.array([-1]), "from 0 to 15"),
        (np.array([0.5]), "from 0 to 15"),
        (np.zeros(4097, dtype=np.int64), "4097 elements; .* at most 4096"),
    ],
)
def test_refused(small: EncryptedTable, indices: np.ndarray, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        small.lookup(indices)


def test_options_out_of_range() -> None:
    for options in ({"block": 0}, {"p_error": 0.0}):
        with pytest.raises(InputError):
            EncryptedTable(silu_table(4, -8.0, 5.0), **options)  # type: ignore[arg-type]
