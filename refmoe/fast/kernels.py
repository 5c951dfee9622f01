"""Numba kernels: rows of a stored matrix times tokens, in LLVM's own vectors.

A *form* reads one step of a stored row, a fixed number of columns, as vectors of 16 lanes, and the
scale of each lane, if it has any. `dots(form)` makes of it a function for Numba's kernels that
multiplies R rows with T tokens at a time, so that a weight is decoded once for T tokens and a lane
of x is loaded once for R rows:

    y[t, r] = Σ_steps scale · Σ_v w[r, v]·x[t, v]      one fused sum a lane, then the lanes pairwise

Every (R, T) does the same operations in the same order for each of its results, so neither the
number of rows or tokens at a time nor the number of threads changes a bit. Lanes are columns in
the order that costs least to decode (`Form.order`), and x is brought into that order once.

Two instructions have no name in LLVM's own language: the lookup and the sum of products of 16-bit
pairs. Where the processor lacks them (`AVX512`, `VNNI`) the same vectors say it in plain
arithmetic, which LLVM turns into whatever the machine has, AVX2 or NEON; the bits are the same.

INT4: word j of a step holds columns 8j … 8j+7, so a shift by 4s leaves column 8j + s in the low
four bits of lane j, which is all that a lookup among 16 floats reads: two instructions for 16
weights. bf16: the two halves of a word. e4m3 and f16 go through the machine's half-to-float; e4m3's
exponent is 8 lower there.

Kernels take addresses, so that mapped, read-only and float16 arrays need none of their own; whoever
calls one holds the arrays. They leave the interpreter's lock; each result is one thread's alone.
All of it is one file because Numba keeps what it compiled by this file's date.

Sources: Intel's and AMD's manuals for `vpermps`, `vpdpwssd` and `vcvtph2ps`; LLVM's language
reference.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, event
from numba.extending import intrinsic

from refmoe.fast.compiling import compilation_begins

LANES = 16
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
PAIRS = ir.VectorType(I16, 2 * LANES)
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)

Value = Any  # an LLVM value; llvmlite has no types to speak of


def features() -> set[str]:
    """Return what this machine's processor has, in LLVM's names."""
    host = llvmlite.binding.get_host_cpu_features()
    return {name for name, there in host.items() if there}


AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features()
VNNI = AVX512 and "avx512vnni" in features()
PLAIN = AVX512 and os.environ.get("REFMOE_SIMD") == "plain"  # as on a machine that has neither
if PLAIN:
    AVX512 = VNNI = False


class Form(NamedTuple):
    """How one step of a stored row is read: its size, and the code that decodes it."""

    name: str
    columns: int  # of one step
    bytes: int  # of its weights
    scales: int  # bytes of scales in an array of their own
    unroll: int  # steps at a time
    rows: int  # at a time with one token
    order: tuple[int, int]  # x[a·n + b] of a step goes to b·m + a: (n, 1) leaves it as it is
    decode: Callable[..., tuple[list[Value], Value | None]]  # builder, row, i → vectors, scale
    integer: bool = False  # x in 16 bits: `int4_fast`


class Row(NamedTuple):
    """The addresses at which a row of a matrix begins; integers, as Numba has them."""

    weights: Value
    scale: Value


def constant(vector: ir.VectorType, values: Any) -> Value:
    """Return a constant vector of these values, or of one value in all lanes."""
    if isinstance(values, int | float):
        values = [values] * vector.count
    return ir.Constant(vector, [ir.Constant(vector.element, v) for v in values])


def load(b: ir.IRBuilder, address: Value, kind: ir.Type) -> Value:
    """Load a value of this type from an address that need not be aligned."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def at(b: ir.IRBuilder, address: Value, i: Value, size: int) -> Value:
    """Return address + i · size."""
    return b.add(address, b.mul(i, ir.Constant(I64, size)))


def offset(b: ir.IRBuilder, address: Value, bytes_: int) -> Value:
    """Return an address so many bytes further on."""
    return b.add(address, ir.Constant(I64, bytes_))


def _function(module: ir.Module, kind: ir.FunctionType, name: str) -> Value:
    return cgutils.get_or_insert_function(module, kind, name)  # type: ignore[no-untyped-call]


def _slot(b: ir.IRBuilder) -> Value:
    return cgutils.alloca_once(b, FLOATS)  # type: ignore[no-untyped-call]


def call(b: ir.IRBuilder, name: str, result: ir.Type, arguments: list[Value]) -> Value:
    """Call one of LLVM's own functions by name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(_function(b.module, kind, name), arguments)


def fma(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """Return x · y + z of the lanes, rounded once."""
    return call(b, f"llvm.fma.v{LANES}f32", FLOATS, [x, y, z])


def shuffle(b: ir.IRBuilder, x: Value, y: Value, lanes: list[int]) -> Value:
    """Choose lanes of x and y, those of y being numbered after those of x."""
    return b.shuffle_vector(x, y, constant(ir.VectorType(I32, len(lanes)), lanes))


def spread(b: ir.IRBuilder, x: Value) -> Value:
    """Copy a number to all lanes."""
    one = b.insert_element(ir.Constant(FLOATS, ir.Undefined), x, ir.Constant(I32, 0))
    return shuffle(b, one, one, [0] * LANES)


def total(b: ir.IRBuilder, x: Value) -> Value:
    """Add up the lanes, pairwise."""
    count = LANES
    while count > 1:
        count //= 2
        halves = [shuffle(b, x, x, list(range(n, n + count))) for n in (0, count)]
        x = b.fadd(*halves)
    return b.extract_element(x, ir.Constant(I32, 0))


# --- forms


def _f32(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], None]:
    here = at(b, row.weights, i, 128)
    return [load(b, offset(b, here, 64 * v), FLOATS) for v in range(2)], None


def _f16(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], None]:
    here = at(b, row.weights, i, 64)
    halves = [load(b, offset(b, here, 32 * v), ir.VectorType(HALF, LANES)) for v in range(2)]
    return [b.fpext(h, FLOATS) for h in halves], None


def _bf16(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], None]:
    pairs = load(b, at(b, row.weights, i, 64), WORDS)
    even = b.shl(pairs, constant(WORDS, 16))
    odd = b.and_(pairs, constant(WORDS, 0xFFFF0000))
    return [b.bitcast(even, FLOATS), b.bitcast(odd, FLOATS)], None


def _bf16_scales(b: ir.IRBuilder, address: Value, count: int) -> Value:
    """Load `count` bf16, and put each into the upper halves of its share of the lanes."""
    four = ir.VectorType(I16, count)
    halves = [n for j in range(LANES) for n in (count, j * count // LANES)]
    return b.bitcast(shuffle(b, load(b, address, four), constant(four, 0), halves), FLOATS)


def _int4(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    words = load(b, at(b, row.weights, i, 64), WORDS)
    codes = (b.lshr(words, constant(WORDS, 4 * s)) if s else words for s in range(8))
    return [_looked_up(b, c) for c in codes], _bf16_scales(b, at(b, row.scale, i, 8), 4)


def _looked_up(b: ir.IRBuilder, codes: Value) -> Value:
    """Return the low four bits of each lane, less 8, as floats."""
    if AVX512:
        table = constant(FLOATS, [float(q - 8) for q in range(16)])
        return call(b, "llvm.x86.avx512.permvar.sf.512", FLOATS, [table, codes])
    low = b.and_(codes, constant(WORDS, 15))
    return b.sitofp(b.sub(low, constant(WORDS, 8)), FLOATS)


def _int4_words(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    """Read nibbles s and s + 4 of each word into the halves of a lane, for `vpdpwssd`."""
    pairs = load(b, at(b, row.weights, i, 64), PAIRS)
    codes = [b.lshr(pairs, constant(PAIRS, 4 * s)) if s else pairs for s in range(4)]
    low = constant(PAIRS, 15)
    codes = [b.and_(c, low) if s < 3 else c for s, c in enumerate(codes)]
    return codes, _bf16_scales(b, at(b, row.scale, i, 8), 4)


def _fp8(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    """Read e4m3 as half: one exponent bit and seven fraction bits more; NaN is set by hand."""
    here, out = at(b, row.weights, i, 128), []
    shorts = ir.VectorType(I16, 32)
    for v in range(4):
        codes = load(b, offset(b, here, 32 * v), ir.VectorType(I8, 32))
        wide = b.shl(b.sext(codes, shorts), constant(shorts, 7))
        nan = b.icmp_unsigned(
            "==", b.and_(wide, constant(shorts, 0x3F80)), constant(shorts, 0x3F80)
        )
        bits = b.and_(wide, constant(shorts, 0xBFFF))
        bits = b.select(nan, constant(shorts, 0x7E00), bits)
        halves = b.bitcast(bits, ir.VectorType(HALF, 32))
        for n in (0, LANES):
            out.append(b.fpext(shuffle(b, halves, halves, list(range(n, n + LANES))), FLOATS))
    scale = b.fmul(load(b, at(b, row.scale, i, 4), FLOAT), ir.Constant(FLOAT, 256.0))
    return out, spread(b, scale)


def _q8(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    here, out = at(b, row.weights, i, 34), []
    for v in range(2):
        codes = load(b, offset(b, here, 2 + 16 * v), ir.VectorType(I8, LANES))
        out.append(b.sitofp(b.sext(codes, WORDS), FLOATS))
    return out, spread(b, b.fpext(load(b, here, HALF), FLOAT))


def _q4(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    here = at(b, row.weights, i, 18)
    two = b.zext(load(b, offset(b, here, 2), ir.VectorType(I8, LANES)), WORDS)
    halves = two, b.lshr(two, constant(WORDS, 4))
    return [_looked_up(b, h) for h in halves], spread(b, b.fpext(load(b, here, HALF), FLOAT))


def _q4_words(b: ir.IRBuilder, row: Row, i: Value) -> tuple[list[Value], Value]:
    """Read four blocks for `vpdpwssd`: nibbles s of each 16 bits, s from 0 to 3."""
    here = at(b, row.weights, i, 72)
    quarter, half = ir.VectorType(I8, 16), list(range(32))
    each = [load(b, offset(b, here, 18 * n + 2), quarter) for n in range(4)]
    low, high = (shuffle(b, each[n], each[n + 1], half) for n in (0, 2))
    pairs = b.bitcast(shuffle(b, low, high, list(range(64))), PAIRS)
    codes = [b.lshr(pairs, constant(PAIRS, 4 * s)) if s else pairs for s in range(4)]
    codes = [b.and_(c, constant(PAIRS, 15)) if s < 3 else c for s, c in enumerate(codes)]
    scales = ir.Constant(ir.VectorType(HALF, 4), ir.Undefined)
    for n in range(4):
        scale = load(b, offset(b, here, 18 * n), HALF)
        scales = b.insert_element(scales, scale, ir.Constant(I32, n))
    wide = b.fpext(scales, ir.VectorType(FLOAT, 4))
    return codes, shuffle(b, wide, wide, [j // 4 for j in range(LANES)])


F32 = Form("f32", 32, 128, 0, 4, 4, (32, 1), _f32)
F16 = Form("f16", 32, 64, 0, 4, 4, (32, 1), _f16)
BF16 = Form("bf16", 32, 64, 0, 4, 8, (16, 2), _bf16)
FP8 = Form("fp8", 128, 128, 0, 1, 8, (128, 1), _fp8)
Q8 = Form("q8", 32, 34, 0, 4, 8, (32, 1), _q8)
Q4 = Form("q4", 32, 18, 0, 4, 8, (32, 1), _q4)
Q4_FAST = Form("q4-fast", 128, 72, 0, 1, 8, (128, 1), _q4_words, integer=True)
INT4 = Form("int4-exact", 128, 64, 8, 1, 4, (16, 8), _int4)
INT4_FAST = Form("int4-fast", 128, 64, 8, 1, 8, (16, 8), _int4_words, integer=True)


# --- rows times tokens

TOKENS = 4  # at most at a time; more go in turns, over rows that are in the cache by then
TOGETHER = {1: 0, 2: 4, 3: 4, 4: 4}  # tokens at a time → rows at a time; with one, the form's


def dots(form: Form) -> Any:
    """Make the intrinsic for rows `begin` to `end` of y = x Wᵀ. Its arguments, all int64, are
    addresses and bytes from row to row:

        w, w_row          the weights
        s, s_row, share   the scales; so many rows of weights share a row of them
        x, x_row          as `ordered` or `halves` left it
        y, y_row          float32 [T, O]
        steps, T, begin, end
    """

    @intrinsic
    def rows(typing, w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            *_, T, begin, end = arguments
            for tokens, together in TOGETHER.items():
                compare = "==" if tokens < TOKENS else ">="
                with b.if_then(b.icmp_signed(compare, T, ir.Constant(I64, tokens))):
                    R = ir.Constant(I64, together or form.rows)
                    count = b.sdiv(b.sub(end, begin), R)
                    with cgutils.for_range(b, count) as loop:
                        row = b.add(begin, b.mul(loop.index, R))
                        _turns(b, form, R.constant, tokens, row, arguments)
                    rest = b.add(begin, b.mul(count, R))
                    with cgutils.for_range(b, b.sub(end, rest)) as loop:
                        _turns(b, form, 1, tokens, b.add(rest, loop.index), arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), generate

    return rows


def _turns(b: Any, form: Form, R: int, tokens: int, row: Value, arguments: Any) -> None:
    """Multiply R rows from this one on with all tokens, T in a turn, the rest in a last one."""
    zero, T = ir.Constant(I64, 0), arguments[10]
    if tokens < TOKENS:
        _tile(b, form, R, tokens, row, zero, arguments)
        return
    whole = b.sdiv(T, ir.Constant(I64, TOKENS))
    with cgutils.for_range(b, whole) as turn:
        first = b.mul(turn.index, ir.Constant(I64, TOKENS))
        _tile(b, form, R, TOKENS, row, first, arguments)
    first = b.mul(whole, ir.Constant(I64, TOKENS))
    for left in range(1, TOKENS):
        with b.if_then(b.icmp_signed("==", b.sub(T, first), ir.Constant(I64, left))):
            _tile(b, form, R, left, row, first, arguments)


def _tile(
    b: Any, form: Form, R: int, tokens: int, row: Value, first: Value, arguments: Any
) -> None:
    """Multiply R rows from one on with T tokens from one on."""
    w, w_row, s, s_row, share, x, x_row, y, y_row, steps, *_ = arguments
    numbers = [b.add(row, ir.Constant(I64, r)) for r in range(R)]
    rows = [
        Row(b.add(w, b.mul(w_row, n)), b.add(s, b.mul(s_row, b.sdiv(n, share)))) for n in numbers
    ]
    each = [b.add(first, ir.Constant(I64, t)) for t in range(tokens)]
    from_ = [b.add(x, b.mul(x_row, t)) for t in each]
    sums = [[_slot(b) for _ in each] for _ in rows]
    for of_row in sums:
        for one in of_row:
            b.store(constant(FLOATS, 0.0), one)
    unroll = ir.Constant(I64, form.unroll)
    with cgutils.for_range(b, b.sdiv(steps, unroll)) as loop:
        first_step = b.mul(loop.index, unroll)
        ahead = Row(*(b.mul(n, ir.Constant(I64, R)) for n in (w_row, s_row)))
        _fetch(b, form, rows, ahead, first_step)
        for u in range(form.unroll):
            _take(b, form, rows, from_, b.add(first_step, ir.Constant(I64, u)), sums)
    if form.unroll > 1:
        done = b.mul(b.sdiv(steps, unroll), unroll)
        with cgutils.for_range(b, b.sub(steps, done)) as loop:
            _take(b, form, rows, from_, b.add(done, loop.index), sums)
    for r, of_row in enumerate(sums):
        for t, one in zip(each, of_row, strict=True):
            to = b.add(b.add(y, b.mul(y_row, t)), b.mul(row, ir.Constant(I64, 4)))
            to = b.inttoptr(b.add(to, ir.Constant(I64, 4 * r)), FLOAT.as_pointer())
            b.store(total(b, b.load(one)), to, align=4)


def _take(b: Any, form: Form, rows: Any, tokens: Any, i: Value, sums: Any) -> None:
    """Multiply one step of these rows with these tokens."""
    for row, of_row in zip(rows, sums, strict=True):
        vectors, scale = form.decode(b, row, i)
        for token, one in zip(tokens, of_row, strict=True):
            take = _integer_step if form.integer else _step
            b.store(take(b, form, vectors, scale, token, i, b.load(one)), one)


def _fetch(b: Any, form: Form, rows: Any, ahead: Row, i: Value) -> None:
    """Prefetch the next rows at these steps: each row is a stream too short for the hardware."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    prefetch = _function(b.module, kind, "llvm.prefetch.p0")
    hint = [ir.Constant(I32, n) for n in (0, 2, 1)]  # to read, into the second cache, data
    for row in rows:
        weights = b.add(at(b, row.weights, i, form.bytes), ahead.weights)
        wanted = [offset(b, weights, n) for n in range(0, form.bytes * form.unroll, 64)]
        if form.scales:
            wanted.append(b.add(at(b, row.scale, i, form.scales), ahead.scale))
        for address in wanted:
            b.call(prefetch, [b.inttoptr(address, I8.as_pointer()), *hint])


def _step(
    b: Any, form: Form, vectors: list[Value], scale: Value, token: Value, i: Value, before: Value
) -> Value:
    here = at(b, token, i, 4 * form.columns)
    part = before if scale is None else constant(FLOATS, 0.0)
    for v, weights in enumerate(vectors):
        lanes = load(b, offset(b, here, 64 * v), FLOATS)
        part = fma(b, weights, lanes, part)
    return part if scale is None else fma(b, part, scale, before)


HALVES = 6  # vectors of 64 bytes that a step of `kernels.halves` takes


def _integer_step(
    b: Any, form: Form, vectors: list[Value], scale: Value, token: Value, i: Value, before: Value
) -> Value:
    """Load a token's step: four vectors of 32 int16, one of -8·Σ by word, one of the units."""
    here = at(b, token, i, 64 * HALVES)
    part = load(b, offset(b, here, 256), WORDS)
    for v, codes in enumerate(vectors):
        part = _pairs(b, part, codes, load(b, offset(b, here, 64 * v), PAIRS))
    unit = load(b, offset(b, here, 320), FLOATS)
    return fma(b, b.sitofp(part, FLOATS), b.fmul(scale, unit), before)


def _pairs(b: Any, before: Value, x: Value, y: Value) -> Value:
    """Return before + x[2j]·y[2j] + x[2j+1]·y[2j+1] in 32 bits."""
    if VNNI:
        return call(b, "llvm.x86.avx512.vpdpwssd.512", WORDS, [before, x, y])
    wide = ir.VectorType(I32, 2 * LANES)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    halves = [shuffle(b, products, products, list(range(n, 2 * LANES, 2))) for n in (0, 1)]
    return b.add(before, b.add(*halves))


def decoded(form: Form) -> Any:
    """Make the intrinsic that decodes rows `begin` to `end` of W, columns in the form's order:

    w, w_row, s, s_row, share, out, out_row, steps, begin, end
    """

    @intrinsic
    def rows(typing, w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            w, w_row, s, s_row, share, out, out_row, steps, begin, end = arguments
            with cgutils.for_range(b, b.sub(end, begin)) as loop:
                n = b.add(begin, loop.index)
                row = Row(b.add(w, b.mul(w_row, n)), b.add(s, b.mul(s_row, b.sdiv(n, share))))
                to = b.add(out, b.mul(out_row, loop.index))
                with cgutils.for_range(b, steps) as step:
                    vectors, scale = form.decode(b, row, step.index)
                    here = at(b, to, step.index, 4 * form.columns)
                    for v, weights in enumerate(vectors):
                        value = weights if scale is None else b.fmul(weights, scale)
                        address = offset(b, here, 64 * v)
                        b.store(value, b.inttoptr(address, FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return rows


WIDE = 16  # rows beside each other, one to a lane
INTERLEAVED = 16 * 64 + 64  # bytes of a step of 32 columns of so many rows, and their scales


def multiplied() -> Any:
    """Make the intrinsic for Q8 rows times many tokens in 16 bits. Its arguments, all int64:

        w, w_row    rows of Q8_0 blocks
        scratch     `INTERLEAVED` bytes a step, of this thread
        x, x_row    int16 [T, I], and u, u_row float32 [T, I/32]: `sixteen`
        y, y_row    float32 [T, O]
        steps, T, begin, end    end - begin whole times `WIDE`

    Sixteen rows are turned so that a lane is a row: a step is then 16 sums of products of pairs, of
    8-bit weights and 16-bit x, in 32 bits; their scales come once a step, not once a row.
    """

    @intrinsic
    def rows(typing, w, w_row, scratch, x, x_row, u, u_row, y, y_row, steps, T, begin, end):  # type: ignore
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            w, w_row, scratch, *_, steps, T, begin, end = arguments
            wide = ir.Constant(I64, WIDE)
            with cgutils.for_range(b, b.sdiv(b.sub(end, begin), wide)) as block:
                row = b.add(begin, b.mul(block.index, wide))
                with cgutils.for_range(b, steps) as step:
                    _interleave(b, b.add(w, b.mul(w_row, row)), w_row, scratch, step.index)
                done = ir.Constant(I64, 0)
                for tokens in (8, 1):
                    count = b.sdiv(b.sub(T, done), ir.Constant(I64, tokens))
                    with cgutils.for_range(b, count) as turn:
                        first = b.add(done, b.mul(turn.index, ir.Constant(I64, tokens)))
                        _interleaved(b, tokens, first, row, arguments)
                    done = b.add(done, b.mul(count, ir.Constant(I64, tokens)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), generate

    return rows


def _interleave(b: Any, w: Value, w_row: Value, scratch: Value, i: Value) -> None:
    """Interleave a step of sixteen rows: pairs of columns, a lane for each row; then the scales."""
    words, scales = [], constant(FLOATS, 0.0)
    for r in range(WIDE):
        here = at(b, b.add(w, b.mul(w_row, ir.Constant(I64, r))), i, 34)
        codes = b.sext(load(b, offset(b, here, 2), ir.VectorType(I8, 32)), PAIRS)
        words.append(b.bitcast(codes, WORDS))
        scale = b.fpext(load(b, here, HALF), FLOAT)
        scales = b.insert_element(scales, scale, ir.Constant(I32, r))
    for k in (1, 2, 4, 8):  # rows and columns of a 16 × 16 matrix change places, bit by bit
        first = [j - k + LANES if j & k else j for j in range(LANES)]
        second = [j + LANES if j & k else j + k for j in range(LANES)]
        for r in (r for r in range(WIDE) if not r & k):
            pair = words[r], words[r + k]
            words[r], words[r + k] = (shuffle(b, *pair, lanes) for lanes in (first, second))
    to = at(b, scratch, i, INTERLEAVED)
    for n, value in enumerate([*words, scales]):
        address = b.inttoptr(offset(b, to, 64 * n), value.type.as_pointer())
        b.store(value, address, align=4)


def _interleaved(b: Any, tokens: int, first: Value, row: Value, arguments: Any) -> None:
    """Multiply the sixteen rows in scratch with T tokens from one on."""
    _, _, scratch, x, x_row, u, u_row, y, y_row, steps, *_ = arguments
    each = [b.add(first, ir.Constant(I64, t)) for t in range(tokens)]
    sums = [_slot(b) for _ in each]
    for one in sums:
        b.store(constant(FLOATS, 0.0), one)
    with cgutils.for_range(b, steps) as step:
        here = at(b, scratch, step.index, INTERLEAVED)
        parts = [constant(WORDS, 0)] * tokens
        for p in range(16):
            weights = b.bitcast(load(b, offset(b, here, 64 * p), WORDS), PAIRS)
            for n, t in enumerate(each):
                place = offset(b, at(b, b.add(x, b.mul(x_row, t)), step.index, 64), 4 * p)
                one = b.insert_element(
                    ir.Constant(WORDS, ir.Undefined), load(b, place, I32), ir.Constant(I32, 0)
                )
                spread_ = b.bitcast(shuffle(b, one, one, [0] * LANES), PAIRS)
                parts[n] = _pairs(b, parts[n], weights, spread_)
        scale = load(b, offset(b, here, 1024), FLOATS)
        for n, t in enumerate(each):
            unit = spread(b, load(b, at(b, b.add(u, b.mul(u_row, t)), step.index, 4), FLOAT))
            value = fma(b, b.sitofp(parts[n], FLOATS), b.fmul(scale, unit), b.load(sums[n]))
            b.store(value, sums[n])
    for n, t in enumerate(each):
        to = b.add(b.add(y, b.mul(y_row, t)), b.mul(row, ir.Constant(I64, 4)))
        b.store(b.load(sums[n]), b.inttoptr(to, FLOATS.as_pointer()), align=4)


def summed(form: Form) -> Any:
    """Make the intrinsic that adds up rows: y[h] = Σ_n x[h, n]·W[h·every + n], in the form's order.

    Arguments as above: w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin,
    end; heads `begin` to `end`, `count` rows of each.
    """

    @intrinsic
    def heads(  # type: ignore
        typing, w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end
    ):
        def generate(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            *_, steps, _, _, begin, end = arguments
            wide = ir.Constant(I64, 256 // form.columns)  # steps, in sixteen accumulators
            blocks = b.sdiv(steps, wide)
            done = b.mul(blocks, wide)
            with cgutils.for_range(b, b.sub(end, begin)) as loop:
                h = b.add(begin, loop.index)
                with cgutils.for_range(b, blocks) as block:
                    _sum_rows(b, form, h, b.mul(block.index, wide), 256 // form.columns, arguments)
                with cgutils.for_range(b, b.sub(steps, done)) as step:
                    _sum_rows(b, form, h, b.add(done, step.index), 1, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), generate

    return heads


def _sum_rows(b: Any, form: Form, h: Value, first: Value, together: int, arguments: Any) -> None:
    """Add up these steps of one head."""
    w, w_row, s, s_row, share, x, x_row, y, y_row, _, count, every, _, _ = arguments
    sums = [_slot(b) for _ in range(together * form.columns // LANES)]
    for one in sums:
        b.store(constant(FLOATS, 0.0), one)
    here = b.add(x, b.mul(x_row, h))
    with cgutils.for_range(b, count) as loop:
        n = b.add(b.mul(h, every), loop.index)
        row = Row(b.add(w, b.mul(w_row, n)), b.add(s, b.mul(s_row, b.sdiv(n, share))))
        factor = spread(b, load(b, at(b, here, loop.index, 4), FLOAT))
        slots = iter(sums)
        for u in range(together):
            vectors, scale = form.decode(b, row, b.add(first, ir.Constant(I64, u)))
            scaled = factor if scale is None else b.fmul(factor, scale)
            for weights in vectors:
                one = next(slots)
                b.store(fma(b, weights, scaled, b.load(one)), one)
    to = b.add(at(b, y, first, 4 * form.columns), b.mul(y_row, h))
    for v, one in enumerate(sums):
        b.store(b.load(one), b.inttoptr(offset(b, to, 64 * v), FLOATS.as_pointer()), align=4)


def ordered(form: Form, x: np.ndarray) -> np.ndarray:
    """Return x [T, I] with the columns of each step in the form's order."""
    n, m = form.order
    if m == 1:
        return np.ascontiguousarray(x)
    return np.ascontiguousarray(x.reshape(len(x), -1, n, m).swapaxes(2, 3)).reshape(x.shape)


def restored(form: Form, x: np.ndarray) -> np.ndarray:
    """Return what `ordered` was given."""
    n, m = form.order
    if m == 1:
        return x
    return np.ascontiguousarray(x.reshape(len(x), -1, m, n).swapaxes(2, 3)).reshape(x.shape)


# --- kernels


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, and keep it for the next process if possible."""
    try:
        return numba.njit(function, cache=not PLAIN, nogil=True, fastmath={"contract"})
    except RuntimeError:  # no folder that can be written to
        return numba.njit(function, nogil=True, fastmath={"contract"})


class _Compilation(event.Listener):
    """Pass on that Numba begins to compile."""

    def on_start(self, _: event.Event) -> None:
        compilation_begins()

    def on_end(self, _: event.Event) -> None:
        pass


event.register("numba:compile", _Compilation())  # type: ignore[no-untyped-call]


_dots_f32 = dots(F32)
_dots_f16 = dots(F16)
_dots_bf16 = dots(BF16)
_dots_fp8 = dots(FP8)
_dots_q8 = dots(Q8)
_dots_q4 = dots(Q4)
_dots_q4_fast = dots(Q4_FAST)
_dots_int4 = dots(INT4)
_dots_int4_fast = dots(INT4_FAST)
_decoded_f32 = decoded(F32)
_decoded_f16 = decoded(F16)
_decoded_bf16 = decoded(BF16)
_decoded_fp8 = decoded(FP8)
_decoded_q8 = decoded(Q8)
_decoded_q4 = decoded(Q4)
_decoded_int4 = decoded(INT4)


@kernel
def f32(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of float32 with a few tokens; see `dots`."""
    _dots_f32(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def f16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of float16 with a few tokens; see `dots`."""
    _dots_f16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def bf16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of bf16 with a few tokens; see `dots`."""
    _dots_bf16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def fp8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of FP8 with a few tokens; see `dots`."""
    _dots_fp8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def q8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of Q8_0 with a few tokens; see `dots`."""
    _dots_q8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def q4(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of Q4_0 with a few tokens; see `dots`."""
    _dots_q4(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def q4_fast(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of Q4_0, with x in 16 bits with a few tokens; see `dots`."""
    _dots_q4_fast(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def int4(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of INT4 with a few tokens; see `dots`."""
    _dots_int4(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def int4_fast(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of INT4, with x in 16 bits with a few tokens; see `dots`."""
    _dots_int4_fast(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, T, begin, end)


@kernel
def f32_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of float32 to float32; see `decoded`."""
    _decoded_f32(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def f16_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of float16 to float32; see `decoded`."""
    _decoded_f16(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def bf16_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of bf16 to float32; see `decoded`."""
    _decoded_bf16(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def fp8_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of FP8 to float32; see `decoded`."""
    _decoded_fp8(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def q8_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of Q8_0 to float32; see `decoded`."""
    _decoded_q8(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def q4_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of Q4_0 to float32; see `decoded`."""
    _decoded_q4(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


@kernel
def int4_rows(w, w_row, s, s_row, share, out, out_row, steps, begin, end):  # type: ignore
    """Decode rows of INT4 to float32; see `decoded`."""
    _decoded_int4(w, w_row, s, s_row, share, out, out_row, steps, begin, end)


# where each of 32 columns goes: the vector, and the place among the group's eight 16-bit lanes
PLACES = {
    "int4-fast": np.array([(k % 8 % 4, 2 * (k // 8) + k % 8 // 4) for k in range(32)]),
    "q4-fast": np.array([(2 * (k % 2) + k // 16, k % 16 // 2) for k in range(32)]),
}


@kernel
def halves(x, places, codes, sums, units):  # type: ignore
    """x [T, I] float32 → what a fast form multiplies with; steps of 128, a unit for 32.

        unit = max|x| / 32767          codes = x / unit, to the nearest

    codes [T, steps, 12, 32] int16   the first four vectors: as `places` [32, 2] has it
    sums  [T, steps, 6, 16] int32    the same memory; the fifth: -8·Σ codes of each pair of lanes
    units [T, steps, 6, 16] float32  the same memory; the sixth: of each pair of lanes
    Where x is not finite the unit is NaN, and so is what comes of it.
    """
    for t in range(x.shape[0]):
        for step in range(codes.shape[1]):
            for g in range(4):
                first = 128 * step + 32 * g
                most = np.float32(0)
                finite = True
                for i in range(first, first + 32):
                    size = abs(x[t, i])
                    finite = finite and size <= np.float32(3.4028235e38)
                    most = max(most, size)
                unit = most / np.float32(32767)
                per = np.float32(0) if unit == 0 or not finite else np.float32(1) / unit
                if np.isinf(per):  # subnormal: nothing of a sum
                    per = np.float32(0)
                for word in range(4 * g, 4 * g + 4):
                    sums[t, step, 4, word] = 0
                    units[t, step, 5, word] = unit if finite else np.float32(np.nan)
                for k in range(32):
                    value = x[t, first + k] * per if finite else np.float32(0)
                    code = np.int32(np.rint(value))
                    lane = 8 * g + places[k, 1]
                    codes[t, step, places[k, 0], lane] = code
                    sums[t, step, 4, lane // 2] -= 8 * code


_summed_f32 = summed(F32)
_summed_f16 = summed(F16)
_summed_bf16 = summed(BF16)
_summed_fp8 = summed(FP8)
_summed_q8 = summed(Q8)


@kernel
def f32_sum(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end):  # type: ignore
    """Add up rows of float32, weighted; see `summed`."""
    _summed_f32(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end)


@kernel
def f16_sum(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end):  # type: ignore
    """Add up rows of float16, weighted; see `summed`."""
    _summed_f16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end)


@kernel
def bf16_sum(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end):  # type: ignore
    """Add up rows of bf16, weighted; see `summed`."""
    _summed_bf16(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end)


@kernel
def fp8_sum(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end):  # type: ignore
    """Add up rows of FP8, weighted; see `summed`."""
    _summed_fp8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end)


@kernel
def q8_sum(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end):  # type: ignore
    """Add up rows of Q8_0, weighted; see `summed`."""
    _summed_q8(w, w_row, s, s_row, share, x, x_row, y, y_row, steps, count, every, begin, end)


_multiplied_q8 = multiplied()


@kernel
def q8_many(w, w_row, scratch, x, x_row, u, u_row, y, y_row, steps, T, begin, end):  # type: ignore
    """Multiply rows of Q8_0 with many tokens of 16 bits; see `multiplied`."""
    _multiplied_q8(w, w_row, scratch, x, x_row, u, u_row, y, y_row, steps, T, begin, end)


@kernel
def sixteen(x, codes, units):  # type: ignore
    """Round x [T, I] to codes [T, I] int16 and units [T, I/32] float32, as `halves` does."""
    for t in range(x.shape[0]):
        for g in range(units.shape[1]):
            most = np.float32(0)
            finite = True
            for i in range(32 * g, 32 * g + 32):
                size = abs(x[t, i])
                finite = finite and size <= np.float32(3.4028235e38)
                most = max(most, size)
            unit = most / np.float32(32767)
            per = np.float32(0) if unit == 0 or not finite else np.float32(1) / unit
            if np.isinf(per):
                per = np.float32(0)
            units[t, g] = unit if finite else np.float32(np.nan)
            for i in range(32 * g, 32 * g + 32):
                codes[t, i] = np.int32(np.rint(x[t, i] * per)) if finite else 0


class Kernels(NamedTuple):
    """The kernels of one form: they multiply by its rows, decode them and add them up."""

    form: Form
    few: Callable[..., None]  # rows times tokens
    decode: Callable[..., None]  # rows, in float32
    sum: Callable[..., None] | None  # rows added up; attention's, and there is none of INT4
    many: Callable[..., None] | None = None  # rows times many tokens of 16 bits


class FormatKernels(NamedTuple):
    """The kernels of one stored format."""

    exact: Kernels  # float32 activations
    fast: Kernels | None = None  # 16-bit activations, where the format has such
    scales: int = 0  # bytes of scales to a step, where they are an array of their own

    def choices(self, fast: bool) -> list[Kernels]:
        """Return what may be used, best first; a form may want longer steps than a row has."""
        return [self.fast, self.exact] if fast and self.fast is not None else [self.exact]


FORMATS = {  # by `StoredMatrix.format`; adding one here is all that a new format needs
    "f32": FormatKernels(Kernels(F32, f32, f32_rows, f32_sum)),
    "f16": FormatKernels(Kernels(F16, f16, f16_rows, f16_sum)),
    "bf16": FormatKernels(Kernels(BF16, bf16, bf16_rows, bf16_sum)),
    "fp8": FormatKernels(Kernels(FP8, fp8, fp8_rows, fp8_sum), scales=4),
    "int4": FormatKernels(
        Kernels(INT4, int4, int4_rows, None), Kernels(INT4_FAST, int4_fast, int4_rows, None), 8
    ),
    "q8": FormatKernels(
        Kernels(Q8, q8, q8_rows, q8_sum), Kernels(Q8, q8, q8_rows, q8_sum, q8_many)
    ),
    "q4": FormatKernels(Kernels(Q4, q4, q4_rows, None), Kernels(Q4_FAST, q4_fast, q4_rows, None)),
}
