"""Run the graph on sample tokens, forward and backward, and record what each Linear sees.

    Linear(x, W)  →  the same node; x and y carry {"max", "crest"} of activations, y also those of its gradient

`crest` is the root mean square, over tokens, of max|x| / rms(x) within a token: with per-token scaling it says how far
the rms of an encoded token lies below the largest integer, hence what precision a given noise leaves. `max` is the largest
magnitude and feeds the domains of polynomial approximations. How large products become in proportion to what is multiplied
(`PRODUCT_PEAK`, `GRADIENT_PEAK`) says how far tokens can be scaled before one overflows. The tokens need not be private: any
text of the model's language will do. Records only; the function of the graph is unchanged.

Attentions, RMSNorms and SiLUs, exact or approximated, get what a polynomial in their place must cover: scores, exponents and
divisors, variances, inputs (`hecompile.polynomial.ranges`). Where a polynomial stands already and its domain does not
cover what was seen, the pass refuses the graph.

With `keep_samples` the rows that linears read stay beside the values, for passes that round weights by them, and so do sums
of squares (`hecompile.graph.recorded.Moments`). The run holds the weights of one block at a time
(`hecompile.graph.streaming`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.interpreter import graph_inputs
from hecompile.graph.ir import DOMAIN, GRADIENT_PEAK, GRADIENT_RANGE, PRODUCT_PEAK, RANGE, SAMPLES, nodes_of_type
from hecompile.graph.lazy import KeepRows, rows_in_memory
from hecompile.graph.recorded import (
    MOMENTS,
    Moments,
    ProductPeak,
    RowRange,
    SummedProducts,
    largest_of_rows,
    lengths,
    squares,
)
from hecompile.graph.streaming import StreamedRun
from hecompile.plan.circuits import MOST_OUTPUTS, parts_of
from hecompile.polynomial.inputs import AttentionInputs, NonlinearNodes
from hecompile.polynomial.ranges import check_domain, range_of, write_range

Samples = tuple[tuple[int, ...], ...]
"""Token ids, one tuple per sequence."""


@dataclass(frozen=True)
class Calibrate(ir.passes.InPlacePass):
    """Record the ranges that a run on sample tokens sees.

    samples: sequences of one length, at least 2. keep_samples: keep what the linears read (`hecompile.graph.ir.SAMPLES`),
    where `keep_rows` puts it, and moments. Raises InputError for other samples; LegalityError where the domain of a
    polynomial does not cover what was seen.
    """

    samples: Samples
    keep_samples: bool = False
    keep_rows: KeepRows = rows_in_memory

    def requires(self, model: ir.Model) -> None:
        if not self.samples or len({len(sample) for sample in self.samples}) != 1 or len(self.samples[0]) < 2:
            raise InputError("calibration needs one or more sequences of one length of at least 2 tokens")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not _linears(model):
            return ir.passes.PassResult(model, False)
        input_ids = torch.tensor(self.samples, dtype=torch.int64)
        inputs = graph_inputs(input_ids, torch.ones_like(input_ids), model) | _adapter_at_zero(model)
        recorder = NonlinearNodes(model).record(_write_range, inputs)
        record = _Record(model, input_ids.numel(), self.keep_rows if self.keep_samples else None)

        def observe(value: ir.Value, result: Tensor) -> None:
            recorder.observe(value, result)
            record.observe(value, result)

        def loss(logits: Tensor, rows: slice) -> Tensor:
            predicted, wanted = logits[:, :-1].flatten(0, 1), input_ids[rows, 1:].flatten()
            return torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum") / input_ids[:, 1:].numel()

        StreamedRun(model, inputs, observe, record.take_gradient, record.take_product).run(len(input_ids), loss)
        record.write()
        for node in model.graph:
            check_domain(node)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in _linears(model):
            if RANGE not in node.outputs[0].metadata_props:
                raise ir.passes.PostconditionError(f"{node.name} was not reached by calibration")


class _Record:
    """Gather what a run sees at its linears, which read `rows` rows. keep_rows: None to keep ranges and peaks alone."""

    def __init__(self, model: ir.Model, rows: int, keep_rows: KeepRows | None) -> None:
        self._nodes, self._keep_rows = _linears(model), keep_rows
        self._read = {node.inputs[0] for node in self._nodes}
        self._made = {node.outputs[0] for node in self._nodes}
        self._ranges: dict[ir.Value, RowRange] = defaultdict(RowRange)
        self._gradients: dict[ir.Value, RowRange] = defaultdict(RowRange)
        self._largest: dict[ir.Node, Tensor] = {}  # of each row of the weight, [out]
        self._peaks: dict[ir.Value, ProductPeak] = defaultdict(ProductPeak)
        readers = Counter(node.inputs[0] for node in self._nodes)
        self._peaks_back = {x: SummedProducts(number, rows) for x, number in readers.items() if x is not None}
        self._squares: dict[ir.Value, Tensor] = {}
        self._squares_back: dict[ir.Value, tuple[Tensor, Tensor]] = {}

    def observe(self, value: ir.Value, result: Tensor) -> None:
        """Take a value of the run; what the last Linear makes comes in parts."""
        if value in self._read or value in self._made:
            self._ranges[value].add(result)
            if self._keep_rows is not None:
                self._squares[value] = squares(result) + self._squares.get(value, 0.0)
        if value in self._read and self._keep_rows is not None:
            value.meta[SAMPLES] = self._keep_rows(str(value.name), result.flatten(0, -2))  # [T, in]

    def take_product(self, node: ir.Node, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """Take what a Linear reads and makes; they may come in parts."""
        if node not in self._largest:
            self._largest[node] = largest_of_rows(weight)
        largest = self._largest[node]
        self._peaks[node.outputs[0]].add(torch.where(largest > 0, y / largest, 0.0), lengths(x))

    def take_gradient(self, node: ir.Node, gradient: Tensor, product: Tensor, weight: Tensor) -> None:
        """Take the gradient of a Linear's result, and that times its weight; they may come in parts.

        Linears that read one value send their gradients in one row, and get the sum of their products. One that is wider
        than a product can be sends each part of its gradient in a row of its own. Each counts in proportion to its own
        length: beside the one entry of a target, the gradients of all other words of a vocabulary are short, and point one
        way.
        """
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        self._gradients[y].add(gradient)
        sent = gradient * self._largest[node]
        self._peaks_back[x].add(str(y.name), product, sent)
        for part in parts_of(len(weight)) if len(weight) > MOST_OUTPUTS else ():
            self._peaks_back[x].add_alone(gradient[..., part] @ weight[part], sent[..., part])
        if self._keep_rows is not None:
            rows, products = self._squares_back.get(y, (0.0, 0.0))
            self._squares_back[y] = squares(gradient) + rows, squares(product) + products

    def write(self) -> None:
        """Write what was gathered into the graph."""
        for value, found in self._ranges.items():
            value.metadata_props[RANGE] = found.text()
        for value, found in self._gradients.items():
            value.metadata_props[GRADIENT_RANGE] = found.text()
        for key, peaks in ((PRODUCT_PEAK, self._peaks), (GRADIENT_PEAK, self._peaks_back)):
            for value, peak in peaks.items():
                if (text := peak.text()) is not None:
                    value.metadata_props[key] = text
        for node in self._nodes if self._keep_rows is not None else ():
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            back = self._squares_back.get(y, (None, None))
            y.meta[MOMENTS] = Moments(self._squares[x], float(self._squares[y].sum()), *back)


def _write_range(node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
    write_range(node.outputs[0], range_of(inputs))


def _linears(model: ir.Model) -> list[ir.Node]:
    return list(nodes_of_type(model, "Linear", DOMAIN))


def _adapter_at_zero(model: ir.Model) -> dict[str, Tensor]:
    return {
        str(value.name): torch.zeros(value.shape.numpy())
        for value in model.graph.inputs
        if ".lora_" in str(value.name) and value.shape is not None
    }
