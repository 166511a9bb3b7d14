"""Run the lowered circuits as they are in ONNX Runtime on the CPU: uint8 × constant int8 is its fast exact path.

This engine runs exactly the file that is given to the worker, on any CPU that ONNX Runtime supports: it is portable, and an
independent check of the others. It needs its weights as constants of each circuit and repacks them, so that forward and
backward are two copies in memory beside their files. Where that matters use vnni or torch, which serve both from one.

On x86 without VNNI the kernel for uint8 × int8 adds two products in 16 bits, where they may saturate. There the weights are
given as uint8 with zero point 128, the same numbers, for which the kernel is exact and slower. (The option of ONNX Runtime
for this, session.x64quantprecision, fails where several products share a weight.)
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.worker.engines.base import check_request

_REGISTERING = threading.Lock()
_ZERO_POINT = "unsigned_zero_point"


class OnnxRuntimeEngine:
    """Keep a session for each circuit, made when the circuit is first used.

    Args:
        bundle: the circuits.
        threads: threads of each session; 0 lets ONNX Runtime take every core.
    """

    name = "onnxruntime"

    def __init__(self, bundle: WorkerBundle, threads: int = 0) -> None:
        self._bundle = bundle
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        check_request(self._bundle, circuit, planes)
        reply: np.ndarray = self._session(circuit).run(["reply"], {"ciphertext": np.ascontiguousarray(planes)})[0]
        return reply

    def _session(self, circuit: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if circuit not in self._sessions:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = self._threads
                # A pool that spins after its work, one per circuit, would take the cores from the client beside it.
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
                # One pool of memory for all sessions: with arenas of their own two layers of 1B took 1.6 GB instead of 0.6.
                with _REGISTERING:
                    _register_shared_allocator()
                options.add_session_config_entry("session.use_env_allocators", "1")
                path = self._bundle.circuit_path(circuit)
                try:
                    session = onnxruntime.InferenceSession(exact_here(path), options, providers=["CPUExecutionProvider"])
                except Exception as error:  # ONNX Runtime's exceptions share no base class
                    raise WorkerError(f"ONNX Runtime cannot load circuit {circuit}: {type(error).__name__}") from error
                self._sessions[circuit] = session
            return self._sessions[circuit]


def exact_here(path: Path) -> str | bytes:
    """Return a form of the model at `path` that ONNX Runtime runs exactly here: its path, or a serialised model."""
    return str(path) if signed_product_is_exact() else with_unsigned_weights(onnx.load(path))


@cache
def signed_product_is_exact() -> bool:
    """Try with extreme values whether ONNX Runtime multiplies uint8 and constant int8 exactly on this processor."""
    weight = np.array([[127, -128, 127, -128]] * 64, dtype=np.int8)
    weight[1::2, 2:] = -128, 127
    session = onnxruntime.InferenceSession(_product_model(weight), providers=["CPUExecutionProvider"])
    planes = np.full((5, len(weight)), 255, dtype=np.uint8)
    return bool(np.array_equal(session.run(None, {"x": planes})[0], planes.astype(np.int32) @ weight.astype(np.int32)))


def _product_model(weight: np.ndarray) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def with_unsigned_weights(model: onnx.ModelProto) -> bytes:
    """Turn the constant int8 factors of MatMulInteger to uint8 with zero point 128; returns the model, serialised."""
    multiplied = {node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"}
    unsigned = set()
    for initializer in model.graph.initializer:
        if initializer.name in multiplied and initializer.data_type == TensorProto.INT8:
            raised = numpy_helper.to_array(initializer).view(np.uint8) ^ np.uint8(128)  # w + 128
            initializer.CopyFrom(numpy_helper.from_array(raised, initializer.name))
            unsigned.add(initializer.name)
    model.graph.initializer.append(numpy_helper.from_array(np.array(128, dtype=np.uint8), _ZERO_POINT))
    for node in model.graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in unsigned:
            node.input.extend(["", _ZERO_POINT])
    return bytes(model.SerializeToString())


@cache
def _register_shared_allocator() -> None:
    """Register one pool of memory for the sessions of this process; a second time would be an error."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)
