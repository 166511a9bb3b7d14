"""The lowered circuits as they are, in ONNX Runtime on the CPU: uint8 × constant int8 is its fast exact path.

The engine that runs exactly the file that is given to the worker, on any CPU that ONNX Runtime knows: the portable one, and
a second opinion on the others. It needs its weights as constants of each circuit and repacks them, so that forward and
backward are two copies in memory beside their files: where that matters use vnni or torch, which serve both from one.
"""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import onnxruntime

from hecompile.errors import WorkerError
from hecompile.worker_bundle import WorkerBundle
from runtime.engines.base import check_request

_REGISTERING = threading.Lock()


class OnnxRuntimeEngine:
    """One session per circuit, made when the circuit is first used.

    threads: of each session; 0 lets ONNX Runtime take every core.
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
                path = str(self._bundle.circuit_path(circuit))
                try:
                    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                except Exception as error:  # ONNX Runtime's exceptions share no base class
                    raise WorkerError(f"ONNX Runtime cannot load circuit {circuit}: {type(error).__name__}") from error
                self._sessions[circuit] = session
            return self._sessions[circuit]


@cache
def _register_shared_allocator() -> None:
    """Once in a process (a second time would be an error), for every session that asks for it."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, None)
