"""Compile a Hugging Face model so that an untrusted worker fine-tunes it on ciphertexts only.

The names of `__all__` are the Python interface (docs/api.md), imported when they are first used: torch takes seconds.
Type checkers read __init__.pyi.
"""

from importlib import import_module
from typing import Any

from hecompile.errors import (
    FederationError,
    HecompileError,
    InputError,
    PrivacyError,
    SecurityError,
    VerificationError,
    WorkerError,
)

__version__ = "0.1.0"

__all__ = [
    "Build",
    "CompileOptions",
    "Costs",
    "FederationError",
    "HecompileError",
    "InputError",
    "Lora",
    "Offload",
    "PrivacyError",
    "PrivacySpent",
    "Reply",
    "RoundRecord",
    "SecurityError",
    "Session",
    "TrainingResult",
    "VerificationError",
    "WorkerError",
    "export",
    "federate",
    "load",
    "offload",
    "privacy_spent",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hecompile' has no attribute {name!r}")
    return getattr(import_module("hecompile.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
