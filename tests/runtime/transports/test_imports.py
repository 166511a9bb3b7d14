"""A transport loads the libraries of its own protocol, and none of another's."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"grpc", "tritonclient", "pyarrow", "onnx", "torch", "numba", "llvmlite"}


@pytest.mark.parametrize(
    ("module", "needed"),
    [("", set()), (".sockets", set()), (".oip", {"grpc", "tritonclient"}), (".flight", {"grpc"})],
)
def test_a_transport_loads_what_it_needs(module: str, needed: set[str]) -> None:
    program = f"import sys, hecompile.runtime.transports{module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert HEAVY & set(ran.stdout.split()) == needed
