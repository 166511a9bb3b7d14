"""Map the large constants of a plan from the one file that they lie in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from hecompile.mapped_files import Mapping


def map_constants(model: ir.Model, data: Path) -> None:
    """Put arrays of one mapping of `data` in place of the constants that the model has outside itself.

    onnx_ir keeps a descriptor for each of them: thirteen for a decoder layer.

    Raises:
        ValueError: a constant is in another file, or beyond the end of this one.
        OSError: the file cannot be mapped.
    """
    outside = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    if not outside:
        return
    size = data.stat().st_size
    whole = Mapping(data, 0, size).array(np.uint8, (size,))
    for value in outside:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        start, shape, dtype = tensor.offset or 0, tensor.shape.numpy(), tensor.dtype.numpy()
        count = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if tensor.location != data.name or min((*shape, start), default=0) < 0 or start + count > size:
            raise ValueError(f"constant {value.name} is not in {data.name}")
        array: np.ndarray = np.ndarray(shape, dtype, whole, start)
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
