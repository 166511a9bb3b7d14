"""Check that no secret stands on the worker in the clear, wherever a placement is made or used."""

from __future__ import annotations

import onnx_ir as ir

from hecompile.errors import SecurityError
from hecompile.graph.ir import DOMAIN, PLACEMENT, SECRECY, module_path

WORKER_OPERATORS = frozenset({(DOMAIN, "QuantizedLinear")})
"""What the worker can evaluate on ciphertexts: products by public integer matrices, nothing else."""


def check_placement(model: ir.Model) -> None:
    """Refuse a placement that shows the worker a secret.

    Raises SecurityError when a node on the worker sees a secret and cannot be evaluated on ciphertexts, or when anything but
    its first input is secret.
    """
    for node in model.graph:
        if node.metadata_props.get(PLACEMENT) != "worker":
            continue
        secret = [v for v in node.inputs if v is not None and v.metadata_props.get(SECRECY) != "public"]
        if secret and (node.domain, node.op_type) not in WORKER_OPERATORS:
            raise SecurityError(
                f"{node.op_type} of {module_path(node)} is placed on the worker, where the secret {secret[0].name} would "
                "be in the clear; only products by public weights can be evaluated there"
            )
        if any(value is not node.inputs[0] for value in secret):
            raise SecurityError(f"the weight of {module_path(node)} is secret and cannot be given to the worker")
