"""Check that freed memory is kept while a model trains, in processes of their own: other tests allocate as they like."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from hecompile.runtime.training.freed_memory import KEPT_BLOCK, freed_memory_kept

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = libc.mallinfo2().hblks
with freed_memory_kept() as kept:
    block = libc.malloc(KEPT_BLOCK // 4)
    mapped = libc.mallinfo2().hblks - before
    libc.free(block)
    stays = libc.mallinfo2().keepcost >= KEPT_BLOCK // 4
print(kept, mapped == 1, stays, libc.mallinfo2().keepcost >= KEPT_BLOCK // 4)
"""
_LIBRARY, _VERSION = platform.libc_ver()
# mallinfo2 is new in 2.33, blocks of any size in 2.35.
pytestmark = pytest.mark.skipif(
    _LIBRARY != "glibc" or tuple(map(int, _VERSION.split("."))) < (2, 35) or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="of glibc from 2.35 on",
)


def _outcome(**environment: str) -> list[str]:
    """Return four answers: is memory kept, were 64 MiB mapped apart, do they stay when freed, and at the end."""
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    program = [sys.executable, "-c", PROGRAM]
    return subprocess.run(program, capture_output=True, text=True, check=True, env=mine | environment).stdout.split()


def test_a_large_block_is_part_of_the_heap_and_stays_until_the_end() -> None:
    assert _outcome() == ["True", "False", "True", "False"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_what_the_user_has_set_stays(name: str, value: str) -> None:
    assert _outcome(**{name: value}) == ["False", "True", "False", "False"]


def test_tunables_of_something_else_do_not_matter() -> None:
    assert _outcome(GLIBC_TUNABLES="glibc.rtld.optional_static_tls=512")[0] == "True"
