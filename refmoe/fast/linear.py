"""Products with stored matrices, quicker: the seams `linear` and `experts`.

    linear     float32 x: a few tokens by the kernels of their format, many by BLAS on tiles that
               the kernels decode, while a tile is in cache; anything else as below
    experts    all routed experts of these rows at once: gate and up of all of them are one parallel
               region, down another

`linear` never makes a second copy of a matrix (the head of K2 would be 4.7 GB in float32): what no
kernel reads (float64, a product rounded as another engine does, sizes that are no whole steps) is
multiplied by `reproducible.linear`, in tiles of whole rows. Twins: `refmoe.model.matrix.linear` and
`refmoe.model.experts.routed_experts`.

`exact` products multiply float32 activations; `fast` ones of INT4 and Q4_0, and of Q8 with many
tokens, multiply 16-bit ones, a unit for 32: 2e-5 of a result.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refmoe.fast import kernels, reproducible, threads
from refmoe.fast.kernels import FORMATS, Form, Kernels
from refmoe.fast.kquants import DECODERS, HALVES
from refmoe.model.experts import Experts, MlpWeights, routed_experts
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, format_of
from refmoe.model.numerics import Numerics
from refmoe.model.router import Routing, sigmoid

TILE = 1 << 18  # elements of a tile of a K-quant: 1 MB of float32
DECODED = 1 << 21  # elements of a tile that a kernel decodes: 8 MB, of a cache that cores share
PIECE = 1 << 20  # bytes of weights that a thread takes at a time
FEW = 12  # tokens; beyond, decoding once and multiplying by BLAS is quicker
ALONE = 1 << 20  # bytes of weights, read in some 30 µs: not worth a second thread
KNOWN = 1 << 18  # matrices; K2 has 70,000
ROWS = 2048  # of experts' inputs at once, which bounds the scratch


class KernelMatrix(NamedTuple):
    """A matrix as kernels take it: addresses, and bytes from row to row. It holds no array."""

    how: Kernels
    w: int
    w_row: int
    s: int
    s_row: int
    share: int  # rows of weights to a row of scales
    shape: tuple[int, int]

    @property
    def form(self) -> Form:
        return self.how.form

    @property
    def steps(self) -> int:
        return self.shape[1] // self.how.form.columns

    @property
    def nbytes(self) -> int:
        return self.w_row * self.shape[0]

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        return self.w, self.w_row, self.s, self.s_row, self.share


def kernel_view(m: Matrix, fast: bool = False) -> KernelMatrix | None:
    """Return a matrix as kernels take it, or None if none reads it.

    The view is kept with its matrix, which is right for a mapped checkpoint. For matrices whose
    memory is used again, call `make_kernel_view`.
    """
    if isinstance(m, np.ndarray):
        return make_kernel_view(m, fast)
    known = _known.get((id(m), fast))
    if known is None:
        if len(_known) >= KNOWN:
            _known.clear()
        known = _known[id(m), fast] = m, make_kernel_view(m, fast)
    return known[1]


_known: dict[tuple[int, bool], tuple[Matrix, KernelMatrix | None]] = {}


def make_kernel_view(m: Matrix, fast: bool = False) -> KernelMatrix | None:
    """Make the view of `kernel_view` without keeping it."""
    kernels_of = FORMATS.get(format_of(m))
    if kernels_of is None or len(m.shape) != 2 or not m.shape[0]:
        return None
    O, I = m.shape
    how = next((k for k in kernels_of.choices(fast) if not I % k.form.columns), None)
    weights, *scales = [m] if isinstance(m, np.ndarray) else m.arrays().values()
    weights = weights.reshape(O, -1) if weights.ndim == 3 else weights  # in blocks
    if how is None or not whole_rows(weights):
        return None
    w, w_row = address(weights), weights.strides[0]
    if not scales:
        return KernelMatrix(how, w, w_row, 0, 0, 1, (O, I))
    (scale,) = scales
    wanted = I // how.form.columns * kernels_of.scales
    if not whole_rows(scale) or scale.shape[1] * scale.itemsize != wanted:
        return None
    return KernelMatrix(how, w, w_row, address(scale), scale.strides[0], _unit(m), (O, I))


def _unit(m: Matrix) -> int:
    """Return how many rows share a row of scales."""
    return 1 if isinstance(m, np.ndarray) else m.unit


def whole_rows(a: np.ndarray) -> bool:
    """Tell whether each row lies together in memory, in the machine's byte order."""
    return a.ndim == 2 and a.strides[1] == a.itemsize and a.dtype.isnative


def address(a: np.ndarray) -> int:
    """Return where an array's data begins."""
    return a.__array_interface__["data"][0]


class Inputs:
    """Rows of x [T, I], and their copies in the orders that forms want, each made once."""

    def __init__(self, x: np.ndarray):
        self.x = np.ascontiguousarray(x)
        self.made: dict[Any, np.ndarray] = {}

    def few(self, form: Form) -> np.ndarray:
        """Return x as the kernels for a few tokens take it, [T, ·]."""
        key = form.name if form.integer else form.order
        if key not in self.made:
            self.made[key] = self._halves(form) if form.integer else kernels.ordered(form, self.x)
        return self.made[key]

    def many(self, form: Form) -> np.ndarray:
        if form.order not in self.made:
            self.made[form.order] = kernels.ordered(form, self.x)
        return self.made[form.order]

    def sixteen(self) -> tuple[np.ndarray, np.ndarray]:
        """Return x in 16 bits: codes [T, I] and units [T, I/32], in the order of the columns."""
        if "sixteen" not in self.made:
            T, I = self.x.shape
            codes, units = np.empty((T, I), np.int16), np.empty((T, I // 32), np.float32)
            kernels.sixteen(self.x, codes, units)
            self.made["sixteen"], self.made["units"] = codes, units
        return self.made["sixteen"], self.made["units"]

    def _halves(self, form: Form) -> np.ndarray:
        x = self.x
        out = np.empty((len(x), x.shape[1] // 128, kernels.HALVES, 16), np.int32)
        places = kernels.PLACES[form.name]
        kernels.halves(x, places, out.view(np.int16), out, out.view(np.float32))
        return out.reshape(len(x), -1)


def multiply(products: Sequence[tuple[Inputs, KernelMatrix]]) -> list[np.ndarray]:
    """Return y = x Wᵀ of each product, float32 [T, O], computed as one parallel region."""
    out: list[np.ndarray] = []
    pieces: list[threads.Piece] = []
    blas = False
    for inputs, m in products:
        T = len(inputs.x)
        if T <= FEW:
            x = inputs.few(m.form)
            y = np.empty((T, m.shape[0]), np.float32)
            pieces += _few(x, m, y)
        elif m.how.many is not None and not m.shape[0] % kernels.WIDE:
            y = np.empty((T, m.shape[0]), np.float32)
            pieces += _wide(inputs.sixteen(), m, y)
        else:
            y = np.empty((m.shape[0], T), np.float32).T  # BLAS is quicker with weights on the left
            pieces += _many(inputs.many(m.form), m, y)
            blas = True
        out.append(y)
    with threads.single_blas_thread() if blas else nullcontext():
        if sum(m.nbytes * len(inputs.x) for inputs, m in products) < ALONE:
            for piece in pieces:
                piece()
        else:
            threads.pool().run(pieces)
    return out


def alone(inputs: Inputs, m: KernelMatrix) -> np.ndarray:
    """Return y = x Wᵀ of a few tokens, computed in this thread: float32 [T, O]."""
    x = inputs.few(m.form)
    y = np.empty((len(x), m.shape[0]), np.float32)
    places = address(x), x.strides[0], address(y), y.strides[0]
    m.how.few(*m.place, *places, m.steps, len(x), 0, m.shape[0])
    return y


def _few(x: np.ndarray, m: KernelMatrix, y: np.ndarray) -> Iterator[threads.Piece]:
    O = m.shape[0]
    step = max(8, PIECE // m.w_row & ~7)
    begins = range(0, O, step)
    places = (*m.place, address(x), x.strides[0], address(y), y.strides[0], m.steps, len(x))
    for begin in begins:
        yield partial(m.how.few, *places, begin, min(begin + step, O))


def _many(x: np.ndarray, m: KernelMatrix, y: np.ndarray) -> Iterator[threads.Piece]:
    O, I = m.shape
    step = max(8, DECODED // I & ~7)
    for begin in range(0, O, step):
        yield partial(_tile, x, m, y, begin, min(begin + step, O))


def _wide(
    x: tuple[np.ndarray, np.ndarray], m: KernelMatrix, y: np.ndarray
) -> Iterator[threads.Piece]:
    O = m.shape[0]
    step = kernels.WIDE * max(1, PIECE // m.w_row // kernels.WIDE)
    for begin in range(0, O, step):
        yield partial(_sixteen, *x, m, y, begin, min(begin + step, O))


_scratch = threading.local()


def _sixteen(
    codes: np.ndarray, units: np.ndarray, m: KernelMatrix, y: np.ndarray, begin: int, end: int
) -> None:
    size = m.steps * kernels.INTERLEAVED // 4
    if getattr(_scratch, "rows", np.empty(0)).size < size:
        _scratch.rows = np.empty(size, np.float32)
    assert m.how.many is not None
    x = address(codes), codes.strides[0], address(units), units.strides[0]
    to = address(y), y.strides[0], m.steps, len(codes), begin, end
    m.how.many(m.w, m.w_row, address(_scratch.rows), *x, *to)


def _tile(x: np.ndarray, m: KernelMatrix, y: np.ndarray, begin: int, end: int) -> None:
    """Decode rows into this thread's scratch, then multiply them by BLAS."""
    I = m.shape[1]
    if getattr(_scratch, "tile", np.empty(0)).size < (end - begin) * I:
        _scratch.tile = np.empty(max((end - begin) * I, DECODED), np.float32)
    w = _scratch.tile[: (end - begin) * I].reshape(-1, I)
    m.how.decode(*m.place, address(w), w.strides[0], m.steps, begin, end)
    np.matmul(w, x.T, out=y.T[begin:end])


def linear(
    x: np.ndarray, m: Matrix, rounded: tuple[str, ...] = (), fast: bool = False
) -> np.ndarray:
    """y = x Wᵀ: x [T, I] → [T, O]."""
    if isinstance(m, np.ndarray) and m.dtype == x.dtype and (len(x) > FEW or x.dtype != np.float32):
        return reproducible.linear(x, m)
    if x.dtype == np.float32 and len(x) and not _rounds(m, rounded):
        known = kernel_view(m, fast)
        if known is not None:
            if len(x) <= FEW and known.nbytes * len(x) < ALONE:
                return alone(Inputs(x), known)
            (y,) = multiply([(Inputs(x), known)])
            return y
    if isinstance(m, Tiled):
        y = np.empty((len(x), m.shape[0]), x.dtype)
        for block, tile in m.tiles():
            y[:, block] = linear(x, tile, rounded, fast)
        return y
    if isinstance(m, Coded) and m.name in DECODERS and x.dtype == np.float32 and len(x):
        return _coded(np.ascontiguousarray(x), m)
    return reproducible.linear(x, m, rounded)


def _coded(x: np.ndarray, m: Coded) -> np.ndarray:
    """Return x Wᵀ of K-quants: plain kernels decode a tile, which is multiplied in the cache."""
    O, I = m.shape
    y = np.empty((O, len(x)), np.float32).T
    step = max(1, TILE // I)

    def tile(begin: int, end: int) -> None:
        w = np.empty((end - begin, I), np.float32)
        DECODERS[m.name](m.blocks, HALVES, w, begin, end)
        np.matmul(w, x.T, out=y.T[begin:end])

    with threads.single_blas_thread():
        threads.pool().run([partial(tile, n, min(n + step, O)) for n in range(0, O, step)])
    return y


def _rounds(m: Matrix, rounded: tuple[str, ...]) -> bool:
    """Tell whether an engine rounds the product of code and scale, which no kernel here does."""
    return bool(rounded) and format_of(m) in rounded


def experts(
    x: np.ndarray, routing: Routing, experts: Experts, nx: Numerics, fast: bool = False
) -> np.ndarray:
    """Return the routed sum [T, D], all chosen experts as two parallel regions.

    Where something inside is rounded or watched, or no kernel reads a matrix, the definition does.
    """
    chosen = np.unique(routing.experts).tolist()
    if x.dtype != np.float32 or nx.round is not None or _watched(chosen, nx):
        return routed_experts(x, routing, experts, nx)
    T, K = routing.experts.shape
    parts = np.empty((T * K, x.shape[1]), np.float32)
    whole = Inputs(x)
    rows = {e: np.nonzero(routing.experts.reshape(-1) == e)[0] for e in chosen}
    rounded = nx.conventions.rounded_products
    view = make_kernel_view if experts.streamed else kernel_view
    for matrices in experts.batches(chosen, x):
        known: dict[int, list[KernelMatrix]] = {}
        for e, w in matrices.items():
            each = [None if _rounds(m, rounded) else view(m, fast) for m in w]
            known[e] = [m for m in each if m is not None]
            if len(known[e]) < len(MlpWeights._fields):
                return routed_experts(x, routing, experts, nx)
        for group in _groups({e: rows[e] for e in matrices}):
            _swiglu(whole, [(rows[e], known[e]) for e in group], K, parts)
    weights = routing.weights.astype(np.float32, copy=False)
    with threads.single_blas_thread():
        y = (weights[:, None] @ parts.reshape(T, K, -1))[:, 0]
    if nx.stop_at_nonfinite and not np.isfinite(y).all():
        return routed_experts(x, routing, experts, nx)  # which names the first point of them
    return y


def _watched(chosen: list[int], nx: Numerics) -> bool:
    if nx.watch is None:
        return False
    names = ("#rows", ".gate_proj", ".up_proj", ".act", ".down_proj")
    return any(nx.watches(f"experts.{e}{name}") for e in chosen for name in names)


def _groups(rows: dict[int, np.ndarray]) -> Iterator[list[int]]:
    """Yield experts in order, with no more than `ROWS` rows together unless one has more."""
    group: list[int] = []
    count = 0
    for e, own in rows.items():
        if group and count + len(own) > ROWS:
            yield group
            group, count = [], 0
        group.append(e)
        count += len(own)
    if group:
        yield group


def _swiglu(
    whole: Inputs, group: list[tuple[np.ndarray, list[KernelMatrix]]], K: int, parts: np.ndarray
) -> None:
    """Set parts[row] = W_down (silu(W_gate x) · W_up x), rows being of tokens and slots, T·K."""
    first = []
    for rows, (gate, up, _) in group:
        x = whole if len(whole.x) == 1 else Inputs(whole.x[rows // K])
        first += [(x, gate), (x, up)]
    both = multiply(first)
    second = []
    for n, (_, (_, _, down)) in enumerate(group):
        z, up_x = both[2 * n], both[2 * n + 1]
        second.append((Inputs(z * sigmoid(z) * up_x), down))
    for (rows, _), out in zip(group, multiply(second), strict=True):
        parts[rows] = out
