"""Describe the circuit of one encrypted linear layer before it is lowered."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hecompile.bundles.lowered_circuit import MAX_FEATURES_IN, ONNX_IR_VERSION, ONNX_OPSET
from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN, ORIGIN, add_initializer
from hecompile.he.parameters import LOG_Q, MIN_BITS
from hecompile.integers import WEIGHT_DTYPES
from hecompile.word_sizes import bytes_of

ENCRYPTED_LINEAR = "EncryptedLinear"
UPLOAD_BITS, REPLY_BITS = "hecompile.upload_bits", "hecompile.reply_bits"
"""Keys under which the model of a lowered circuit says what its planes of bytes no longer show."""


def encrypted_linear_model(weight: np.ndarray, upload_bits: int, reply_bits: int, name: str) -> ir.Model:
    """Make the circuit of one linear before lowering: a single `hecompile.EncryptedLinear`.

    weight: int8 or int16 [features_in, features_out], the right-hand side of the product (for a module weight W [out, in]
    that is Wᵀ forward and W backward). upload_bits, reply_bits: of a word. name: the circuit's name.
    Raises LegalityError on another dtype or rank.
    """
    if weight.dtype not in WEIGHT_DTYPES or weight.ndim != 2 or 0 in weight.shape:
        raise LegalityError(
            f"circuit {name}: weight is {weight.dtype} {list(weight.shape)}; needs int8 or int16 [in, out]"
        )
    features_in, features_out = weight.shape
    ciphertext_shape = ir.Shape([bytes_of(upload_bits), "T", features_in])
    ciphertext = ir.Value(name="ciphertext", shape=ciphertext_shape, type=ir.TensorType(ir.DataType.UINT8))
    graph = ir.Graph([ciphertext], [], nodes=[], opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name=name)
    constant = add_initializer(graph, "weight", np.ascontiguousarray(weight))
    attributes = {"upload_bits": upload_bits, "reply_bits": reply_bits}
    node = ir.node(ENCRYPTED_LINEAR, [ciphertext, constant], attributes, domain=DOMAIN, name=name)
    node.metadata_props[ORIGIN] = name
    reply = node.outputs[0]
    reply.name, reply.type = "reply", ir.TensorType(ir.DataType.UINT8)
    reply.shape = ir.Shape([bytes_of(reply_bits), "T", features_out])
    graph.append(node)
    graph.outputs.append(reply)
    return ir.Model(graph, ir_version=ONNX_IR_VERSION, producer_name="hecompile")


def check_encrypted_linear(node: ir.Node) -> None:
    """Check that `node` can be lowered. Raises LegalityError with the node's name and the numbers."""
    where = f"EncryptedLinear {node.name}"
    ciphertext, weight = node.inputs if len(node.inputs) == 2 else (None, None)
    if ciphertext is None or weight is None:
        raise LegalityError(f"{where} has {len(node.inputs)} inputs; it takes (ciphertext, weight)")
    upload_bits, reply_bits = bit_counts(node)
    if not MIN_BITS <= reply_bits <= upload_bits <= LOG_Q:
        raise LegalityError(
            f"{where}: upload_bits {upload_bits}, reply_bits {reply_bits}; needs {MIN_BITS} <= reply_bits <= upload_bits "
            f"<= {LOG_Q}"
        )
    limbs = bytes_of(upload_bits)
    constant = weight.const_value
    if constant is None or constant.numpy().dtype not in WEIGHT_DTYPES or len(constant.shape) != 2:
        raise LegalityError(
            f"{where}: the weight {weight.name} must be a constant int8 or int16 [features_in, features_out]"
        )
    features_in, _ = constant.shape.numpy()
    if ciphertext.dtype != ir.DataType.UINT8 or ciphertext.shape is None or len(ciphertext.shape) != 3:
        raise LegalityError(f"{where}: the ciphertext must be uint8 [{limbs}, T, features_in]")
    if ciphertext.shape[0] != limbs or ciphertext.shape[2] != features_in:
        raise LegalityError(
            f"{where}: ciphertext {ciphertext.shape} does not fit {limbs} limbs and weight {constant.shape}"
        )
    if features_in > MAX_FEATURES_IN:
        raise LegalityError(
            f"{where}: {features_in} input features; the int32 accumulator holds 255 · 128 · features_in < 2^31, that "
            f"is at most {MAX_FEATURES_IN}; split the linear by columns"
        )


def bit_counts(node: ir.Node) -> tuple[int, int]:
    """Return upload_bits and reply_bits of `node`. Raises LegalityError where it lacks one."""
    counts = []
    for name in ("upload_bits", "reply_bits"):
        if name not in node.attributes:
            raise LegalityError(f"EncryptedLinear {node.name} has no attribute {name}")
        counts.append(node.attributes[name].as_int())
    return counts[0], counts[1]
