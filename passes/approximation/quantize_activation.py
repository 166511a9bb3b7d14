"""Replace every SiLU by a look-up in a table of 2^bits integers.

    SiLU(x)  →  QuantizedSiLU(x; bits, lower, input_scale, output_scale, zero, entries, domain, error_bound)

The table covers what calibration saw, up to U = margin · largest input; the error is at most 1.1·s_in/2 + s_out/2 with
s_in = (U - lower) / (2^bits - 1) and s_out about (SiLU(U) + 0.28) / (2^bits - 2) (derived, with sources, in
`hecompile.approximation.silu_table`). It is the form of a non-linearity that TFHE evaluates without any error
(`runtime/worker/engines/concrete_table.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hecompile.approximation.silu_table import TABLE_BITS, ActivationTable, silu_table
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import DOMAIN, ORIGIN, module_path, nodes_of_type, replace_node, single
from hecompile.polynomial.ranges import Interval, interval_of

_SMALLEST_RANGE = 1e-3


@dataclass(frozen=True)
class QuantizeActivation(ir.passes.InPlacePass):
    """Replace SiLUs by tables.

    bits: of input and output, 4 to 8. margin: factor by which the table exceeds the calibrated inputs. domain_upper: upper
    end of the table, within which calibration must stay.

    Raises InputError for options out of range; LegalityError, with the numbers, where calibration is missing or leaves the
    domain.
    """

    bits: int = 8
    margin: float = 1.2
    domain_upper: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in TABLE_BITS:
            raise InputError(f"activation: a table can have {', '.join(map(str, TABLE_BITS))} bits, got {self.bits}")
        if not 1 <= self.margin < 1e6:
            raise InputError(f"activation: margin must be a factor of at least 1, got {self.margin}")
        if self.domain_upper is not None and not 0 < self.domain_upper < np.inf:
            raise InputError(f"activation: domain_upper must be positive, got {self.domain_upper}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "SiLU"):
            table = self._table(module_path(node), interval_of(node.outputs[0]))
            attributes = table.attributes() | {
                # Any number below is within the error bound too, where SiLU is flat by then.
                "domain_lower": float(np.finfo(np.float32).min) if table.is_flat_below else table.lower,
                "domain_upper": table.upper,
                "error_bound": table.error_bound,
            }
            metadata = {ORIGIN: module_path(node)}
            new = ir.node("QuantizedSiLU", node.inputs, single(attributes), domain=DOMAIN, metadata_props=metadata)
            replace_node(node, [new], new.outputs)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if any(nodes_of_type(model, "SiLU")):
            raise ir.passes.PostconditionError("a SiLU is left")

    def _table(self, where: str, seen: Interval | None) -> ActivationTable:
        if seen is None:
            raise LegalityError(f"{where}: nothing was recorded of this SiLU; run calibrate before quantize_activation")
        upper = self.domain_upper
        if upper is None:
            upper = max(seen.upper, _SMALLEST_RANGE) * self.margin
        elif not seen.within(-np.inf, upper):
            raise LegalityError(
                f"{where}: the input of SiLU was seen up to {seen.upper:.6g}, above the table's domain_upper {upper:.6g}; "
                "raise it, or leave it to calibration"
            )
        return silu_table(self.bits, min(seen.lower, 0.0) * self.margin, upper)
