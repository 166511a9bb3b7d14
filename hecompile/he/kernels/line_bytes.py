"""Pack a line's words into wire bytes and back, for a number of limbs that is known only when the kernel runs."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from typing import Any

from hecompile.he.kernels.jit import inlined
from hecompile.he.kernels.lines import pack_line, pack_line_past_caches, unpack_line


def _by_limbs(pack_line: Any) -> Any:
    """Make a function like `pack_line` whose `limbs`, 1 to 4, need not be a compile-time constant."""

    @inlined
    def pack(limbs, line, out, plane):
        if limbs == 1:
            pack_line(1, line, out, plane)
        elif limbs == 2:
            pack_line(2, line, out, plane)
        elif limbs == 3:
            pack_line(3, line, out, plane)
        else:
            pack_line(4, line, out, plane)

    return pack


pack = _by_limbs(pack_line)
pack_past_caches = _by_limbs(pack_line_past_caches)


@inlined
def unpack(limbs, source, plane):
    if limbs == 1:
        line = unpack_line(1, source, plane)
    elif limbs == 2:
        line = unpack_line(2, source, plane)
    elif limbs == 3:
        line = unpack_line(3, source, plane)
    else:
        line = unpack_line(4, source, plane)
    return line
