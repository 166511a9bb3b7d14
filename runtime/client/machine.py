"""Look at this machine: processor, memory, disk, engines that run here, and where compiled kernels are kept."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding
import numba
import psutil

from hecompile.integers import int8_products_are_fast
from hecompile.runtime.worker.engines import ENGINES, vnni_kernel

INSTRUCTIONS = {"AVX2": "avx2", "AVX-VNNI": "avxvnni", "AVX512-VNNI": "avx512vnni", "AMX": "amx-int8"}
"""Instruction sets that change speed, and LLVM's names for them."""


@dataclass(frozen=True)
class Machine:
    """Describe the machine. Memory and disk are in bytes.

    Attributes:
        cores: those that this process may use.
        instructions: the names of `INSTRUCTIONS`, each with whether the processor has it.
        disk_free: where `directory` lies.
    """

    processor: str
    cores: int
    instructions: dict[str, bool]
    memory: int
    memory_available: int
    directory: Path
    disk_free: int


@dataclass(frozen=True)
class TorchState:
    """Describe the installed torch; `cuda` is the version that it was built with, None for a CPU build."""

    version: str
    cuda: str | None
    threads: int


@dataclass(frozen=True)
class EngineState:
    """Describe an engine: whether it runs here, and why it does not or what to know of it ("" for nothing)."""

    name: str
    usable: bool
    note: str


@dataclass(frozen=True)
class KernelCache:
    """Describe where numba keeps compiled kernels; `folder` is None where it has no place to write to."""

    folder: Path | None


def look_at_machine(directory: Path) -> Machine:
    """Return what the machine has; disk space is that of the file system of `directory`."""
    features = llvmlite.binding.get_host_cpu_features()
    memory = psutil.virtual_memory()
    return Machine(
        processor=f"{platform.machine()}, {llvmlite.binding.get_host_cpu_name()}",
        cores=len(os.sched_getaffinity(0)),
        instructions={name: bool(features.get(feature, False)) for name, feature in INSTRUCTIONS.items()},
        memory=memory.total,
        memory_available=memory.available,
        directory=directory,
        disk_free=shutil.disk_usage(directory).free,
    )


def look_at_torch() -> TorchState:
    """Return version, build and threads of torch. Takes a second: torch is loaded."""
    import torch

    return TorchState(torch.__version__, torch.version.cuda, torch.get_num_threads())


def look_at_engines() -> tuple[EngineState, ...]:
    """Return the state of every engine that a worker can be given by name, `auto` aside."""
    states = {
        "vnni": _state("vnni", "" if vnni_kernel.supported() else "the processor has no AVX512-VNNI"),
        "onnxruntime": _state("onnxruntime", "" if _has("onnxruntime") else "the package onnxruntime is not installed"),
        "torch": EngineState("torch", True, "" if int8_products_are_fast() else "slow: the processor has no VNNI"),
        "torch-cuda": _state("torch-cuda", _why_no_cuda()),
        "concrete": _state("concrete", "" if _has("concrete.fhe") else "the package concrete-python is not installed"),
    }
    return tuple(states[name] for name in ENGINES if name != "auto")


def engine_of_auto() -> str:
    """Return the name of the engine that `auto` takes on this machine (`hecompile.runtime.worker.engines`)."""
    if vnni_kernel.supported():
        return "vnni"
    return "torch" if int8_products_are_fast() else "onnxruntime"


def look_at_kernel_cache() -> KernelCache:
    """Return where numba keeps the kernels of hecompile.

    numba takes the first of three places that it can write to: `NUMBA_CACHE_DIR`, a folder beside the sources, one in the
    user's cache. It refuses to make any kernel of hecompile where there is none.
    """
    try:
        kernel = numba.njit(cache=True)(_nothing)
    except RuntimeError:  # "no locator available"
        return KernelCache(None)
    return KernelCache(Path(str(kernel.stats.cache_path)))


def _nothing() -> None:
    return None


def _state(name: str, obstacle: str) -> EngineState:
    return EngineState(name, not obstacle, obstacle)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _why_no_cuda() -> str:
    """Return why torch cannot compute on a GPU, "" where it can."""
    import torch

    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"
