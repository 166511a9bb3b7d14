"""Choose an engine: it multiplies ciphertext byte planes by a public weight on the worker's machine."""

from __future__ import annotations

from collections.abc import Callable

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.integers import int8_products_are_fast
from hecompile.runtime.worker.engines.base import Engine


def _onnxruntime(bundle: WorkerBundle) -> Engine:
    from hecompile.runtime.worker.engines.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle)


def _torch(bundle: WorkerBundle) -> Engine:
    from hecompile.runtime.worker.engines.torch_engine import TorchEngine

    return TorchEngine(bundle)


def _torch_cuda(bundle: WorkerBundle) -> Engine:
    from hecompile.runtime.worker.engines.cuda_engine import CudaEngine

    return CudaEngine(bundle)


def _vnni(bundle: WorkerBundle) -> Engine:
    from hecompile.runtime.worker.engines.vnni_engine import VnniEngine

    return VnniEngine(bundle)


def _auto(bundle: WorkerBundle) -> Engine:
    """Make the fastest engine for this machine's CPU. A GPU is used only where it is named."""
    from hecompile.runtime.worker.engines.vnni_kernel import supported

    if supported():
        return _vnni(bundle)
    return _torch(bundle) if int8_products_are_fast() else _onnxruntime(bundle)


def _concrete(bundle: WorkerBundle) -> Engine:
    from hecompile.runtime.worker.engines.concrete_engine import ConcreteEngine

    return ConcreteEngine(bundle)


DEFAULT_ENGINE = "auto"

# The libraries are imported when an engine is made: each takes a second or more.
ENGINES: dict[str, Callable[[WorkerBundle], Engine]] = {
    "auto": _auto,
    "vnni": _vnni,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
    "torch-cuda": _torch_cuda,
    "concrete": _concrete,
}


def create_engine(name: str, bundle: WorkerBundle) -> Engine:
    """Make the engine `name` over `bundle`. Raises InputError for a name that is not in `ENGINES`."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name](bundle)


__all__ = ["DEFAULT_ENGINE", "ENGINES", "Engine", "create_engine"]
