"""Write the machine code of one tile of `vnni_kernel`: a few tokens × 64 output features, with `vpdpbusd` of AVX512-VNNI.

`vpdpbusd` adds four products uint8 × int8 to each of 16 int32 accumulators, and wraps: the arithmetic mod 2^32 that the
scheme wants. Neither the balanced digits of `torch._int_mm` nor a bound on the number of features is needed. The
accumulators of bytes l of the word and digits j of the weight, grouped by shift s = l + j < limbs, stay in registers until
the whole sum is there:

    word = Σ_s (Σ_(l+j=s) plane_l · W_j) · 2^(8s)        (mod 2^32, read mod 2^(8·limbs))
    reply = the top reply_bytes of word + 2^(dropped - 1), with its lowest `dropped` bits made 0

Numba's cache of `vnni_kernel` does not notice a change in this file: touch that one as well.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
VECTORS = 4
PANEL = LANES * VECTORS
"""Output features per tile: four vectors of 16 int32."""

TILE_TOKENS = {1: 6, 2: 3, 3: 2, 4: 1}
"""Tokens per tile by limbs: limbs · tokens · 4 accumulators, 4 weights and one byte quad fit 32 registers."""

CACHE_LINE = 64


@intrinsic(prefer_literal=True)
def write_tile(
    typing_context: Any,
    limbs: Any,
    digits: Any,
    planes: Any,
    token: Any,
    tokens: Any,
    features: Any,
    panel: Any,
    quads: Any,
    reply: Any,
    reply_bytes: Any,
    dropped: Any,
    columns: Any,
    valid: Any,
) -> Any:
    """Compute one tile of a reply; tokens of the tile beyond the last repeat the last.

    limbs, digits: compile-time constants. planes: address of uint8 [limbs, tokens, features]. panel: address of int8
    [digits, quads, 64, 4], 64-byte aligned. reply: address of uint8 [reply_bytes, tokens, columns] plus the tile's first
    column, of which `valid` ≤ 64 are written. dropped: bits of a word that are rounded away.
    """
    count, digit_count = limbs.literal_value, digits.literal_value
    signature = types.void(limbs, digits, *[types.int64] * 11)

    def codegen(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
        _TileBuilder(builder, count, digit_count).build(*arguments[2:])
        return context.get_dummy_value()

    return signature, codegen


class _TileBuilder:
    """Write the instructions of one tile: `VECTORS` × (limbs · tokens) accumulators through a loop over the quads."""

    I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
    WORDS = ir.VectorType(ir.IntType(32), LANES)

    def __init__(self, builder: ir.IRBuilder, limbs: int, digits: int) -> None:
        self.builder, self.limbs, self.digits = builder, limbs, digits
        self.tokens = TILE_TOKENS[limbs]

    def build(self, *arguments: ir.Value) -> None:
        planes, token, tokens, features, panel, quads, reply, reply_bytes, dropped, columns, valid = arguments
        b = self.builder
        last = b.sub(tokens, self.long(1))
        rows = [self.smaller(b.add(token, self.long(t)), last) for t in range(self.tokens)]
        plane_size = b.mul(tokens, features)
        sources = [
            [b.add(planes, b.add(b.mul(plane_size, self.long(limb)), b.mul(row, features))) for row in rows]
            for limb in range(self.limbs)
        ]
        sums = self.products(sources, panel, quads)
        words = [[self.word(sums, t, v) for v in range(VECTORS)] for t in range(self.tokens)]
        self.store(words, rows, reply, b.mul(tokens, columns), reply_bytes, dropped, columns, valid)

    def products(self, sources: list[list[ir.Value]], panel: ir.Value, quads: ir.Value) -> list[list[list[ir.Value]]]:
        """Add up the products in a loop over the quads; returns WORDS [shift][token][vector]."""
        b = self.builder
        entry, loop, after = b.block, b.append_basic_block("quads"), b.append_basic_block("recombine")
        b.branch(loop)
        b.position_at_end(loop)
        index = b.phi(self.I64)
        index.add_incoming(self.long(0), entry)
        zero = ir.Constant(self.WORDS, None)
        phis = [[[b.phi(self.WORDS) for _ in range(VECTORS)] for _ in range(self.tokens)] for _ in range(self.limbs)]
        sums: list[list[list[Any]]] = [[list(row) for row in shift] for shift in phis]
        digit_size = b.mul(quads, self.long(4 * PANEL))
        for digit in range(self.digits):
            start = b.add(b.add(panel, b.mul(digit_size, self.long(digit))), b.mul(index, self.long(4 * PANEL)))
            weights = [
                b.load(self.pointer(b.add(start, self.long(4 * LANES * v)), self.BYTES), align=CACHE_LINE)
                for v in range(VECTORS)
            ]
            for limb in range(self.limbs - digit):  # a term of shift ≥ limbs is 0 mod 2^(8·limbs)
                for t in range(self.tokens):
                    address = b.add(sources[limb][t], b.mul(index, self.long(4)))
                    quad = self.broadcast(b.load(self.pointer(address, self.I32), align=1))
                    for v in range(VECTORS):
                        sums[limb + digit][t][v] = self.dot(sums[limb + digit][t][v], quad, weights[v])
        following = b.add(index, self.long(1))
        index.add_incoming(following, loop)
        for shift in range(self.limbs):
            for t in range(self.tokens):
                for v in range(VECTORS):
                    phis[shift][t][v].add_incoming(zero, entry)
                    phis[shift][t][v].add_incoming(sums[shift][t][v], loop)
        b.cbranch(b.icmp_signed("<", following, quads), loop, after)
        b.position_at_end(after)
        return sums

    def word(self, sums: list[list[list[ir.Value]]], t: int, v: int) -> ir.Value:
        total = sums[0][t][v]
        for shift in range(1, self.limbs):
            total = self.builder.add(total, self.builder.shl(sums[shift][t][v], self.splat(8 * shift)))
        return total

    def store(
        self,
        words: list[list[ir.Value]],
        rows: list[ir.Value],
        reply: ir.Value,
        plane_size: ir.Value,
        reply_bytes: ir.Value,
        dropped: ir.Value,
        columns: ir.Value,
        valid: ir.Value,
    ) -> None:
        """Round the words and store the first `valid` of the 64 features in each reply plane of each token."""
        b = self.builder
        first = b.mul(b.sub(self.long(self.limbs), reply_bytes), self.long(8))
        # 2^(dropped - 1), and 0 where nothing is dropped.
        half = b.trunc(b.lshr(b.shl(self.long(1), dropped), self.long(1)), self.I32)
        half = b.select(b.icmp_signed("==", dropped, self.long(0)), ir.Constant(self.I32, 0), half)
        rounding = self.broadcast_word(half)
        kept = self.broadcast_word(b.trunc(b.shl(self.long(-1), dropped), self.I32))
        indices = ir.Constant(ir.VectorType(self.I64, PANEL), list(range(PANEL)))
        limit = self.repeat(valid, ir.VectorType(self.I64, PANEL))
        mask = b.icmp_signed("<", indices, limit)
        rounded = [[b.and_(b.add(word, rounding), kept) for word in row] for row in words]
        entry, loop, after = b.block, b.append_basic_block("bytes"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        index = b.phi(self.I64)
        index.add_incoming(self.long(0), entry)
        amount = self.broadcast_word(b.trunc(b.add(first, b.mul(index, self.long(8))), self.I32))
        plane = b.add(reply, b.mul(plane_size, index))
        for row, vectors in zip(rows, rounded, strict=True):
            parts = [b.trunc(b.lshr(vector, amount), ir.VectorType(self.I8, LANES)) for vector in vectors]
            target = self.pointer(b.add(plane, b.mul(row, columns)), self.BYTES)
            self.masked_store(self.concatenated(parts), target, mask)
        following = b.add(index, self.long(1))
        index.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, reply_bytes), loop, after)
        b.position_at_end(after)

    def dot(self, total: ir.Value, quad: ir.Value, weight: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.WORDS, [self.WORDS, self.BYTES, self.BYTES])
        function = self.builder.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), kind)
        return self.builder.call(function, [total, quad, weight])

    def masked_store(self, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, self.I32, mask.type])
        function = self.builder.module.declare_intrinsic("llvm.masked.store.v64i8.p0", (), kind)
        self.builder.call(function, [value, pointer, ir.Constant(self.I32, 1), mask])

    def concatenated(self, parts: list[ir.Value]) -> ir.Value:
        """Join four vectors of 16 bytes to one of 64, by pairs."""
        while len(parts) > 1:
            size = 2 * parts[0].type.count
            order = ir.Constant(ir.VectorType(self.I32, size), list(range(size)))
            pairs = zip(parts[0::2], parts[1::2], strict=True)
            parts = [self.builder.shuffle_vector(low, high, order) for low, high in pairs]
        return parts[0]

    def broadcast(self, quad: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.broadcast_word(quad), self.BYTES)

    def broadcast_word(self, word: ir.Value) -> ir.Value:
        return self.repeat(word, self.WORDS)

    def repeat(self, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
        single = self.builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(self.I32, 0))
        order = ir.Constant(ir.VectorType(self.I32, vector.count), None)
        return self.builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), order)

    def splat(self, value: int) -> ir.Constant:
        return ir.Constant(self.WORDS, [value] * LANES)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address, kind.as_pointer())

    def long(self, value: int) -> ir.Constant:
        return ir.Constant(self.I64, value)
