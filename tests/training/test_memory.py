"""Freed memory is kept by processes that train: in processes of their own, for the setting cannot be taken back."""

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from hecompile.memory import KEPT_BLOCK, keep_freed_memory

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
kept = keep_freed_memory()
before = libc.mallinfo2().hblks
assert libc.malloc(KEPT_BLOCK // 4)
print(kept, libc.mallinfo2().hblks - before)
"""
_KNOWS_BLOCKS = hasattr(ctypes.CDLL(None), "mallinfo2")


def _outcome(**environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many blocks of their own the system had to map for 64 MiB."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=mine | environment)
    kept, mapped = done.stdout.split()
    return kept == "True", int(mapped)


@pytest.mark.skipif(not _KNOWS_BLOCKS, reason="glibc 2.33 or later tells what it has mapped")
def test_a_large_block_is_part_of_the_heap() -> None:
    assert _outcome() == (True, 0)


@pytest.mark.skipif(not _KNOWS_BLOCKS, reason="glibc 2.33 or later tells what it has mapped")
def test_what_the_user_has_set_stays() -> None:
    assert _outcome(MALLOC_MMAP_THRESHOLD_="131072") == (False, 1)
