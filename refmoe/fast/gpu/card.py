"""Hold matrices in a GPU's memory within a budget, and multiply by them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from refmoe.fast.gpu.device import Array, Device, first_array
from refmoe.fast.gpu.kernels import FEW, FORMS, THREADS, TOKENS, WARPS, Form, shared_bytes
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.decoder import LayerWeights
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, dequantize, format_of
from refmoe.model.mla import AttentionWeights

VRAM = 12 * 10**9  # bytes: the budget unless another is asked for
PIECE = 1 << 26  # bytes that go up at a time: the size of the pinned memory they go through
ASIDE = 1 << 27  # bytes of the device that cuBLAS and compiled kernels take beside all arrays
STEP = 512  # bytes: arrays begin at multiples
SMALL = 1 << 16  # bytes of an array that is not sent again while it is the same
TILE = 1 << 22  # numbers of a tile that is decoded for cuBLAS: 16 MB
BLOCK = 4096  # positions of a cache at once
SCORES = 1 << 21  # scores at once: 8 MB
ROWS = 32  # queries of a prompt at once, inside attention
MOST = 512  # rows of a prompt that go through together

READS = (
    "; it reads bf16, float16, float32, FP8 in blocks of 128 columns, INT4, Q8_0 and Q4_0: "
    "refmoe export --to gguf makes such a file"
)


class GpuMatrix(NamedTuple):
    """A matrix on the card as kernels take it."""

    form: Form
    w: Array
    w_row: int  # bytes
    s: Array  # of the weights themselves where there are no scales
    s_row: int
    share: int  # rows of weights to a row of scales
    shape: tuple[int, int]

    @property
    def whole(self) -> bool:
        """Tell whether `rows` reads it: whole chunks, at addresses it can read 16 bytes from."""
        return not (self.shape[1] % self.form.wide or self.w_row % self.form.aligned)

    @property
    def place(self) -> tuple[Any, ...]:
        strides = np.int64(self.w_row), np.int64(self.s_row)
        return self.w, strides[0], self.s, strides[1], np.int32(self.share)


class Pieces(NamedTuple):
    """A matrix on the card that came up in tiles of whole rows."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


@dataclass
class Card:
    """A GPU's memory under a budget: what crosses to it and back, and products there."""

    device: Device
    budget: int = VRAM
    room: int | None = None  # tokens in each cache
    rows: int | None = None  # of a prompt at a time
    cache: str = "float32"  # or bf16, as caches were planned
    said: str = ""  # what is on the card, in words
    _known: dict[int, tuple[Matrix, GpuMatrix | None]] = field(default_factory=dict)
    _same: dict[Any, list[tuple[np.ndarray, Array]]] = field(default_factory=dict)
    _pinned: np.ndarray | None = None
    _place: tuple[Array, int] | None = None  # and how much of it is taken
    _leaving: bool = False  # something from there is on its way up
    _moved: tuple[Array, Array] | None = None  # the last x that crossed, and what it is there

    def __post_init__(self) -> None:
        self.device.limit(self.budget)

    def has(self, there: Any) -> bool:
        """Tell whether an array, or a matrix, is on the card."""
        return isinstance(first_array(there), self.device.xp.ndarray)

    # --- to the card and back

    def bring(self, x: Array, there: Any) -> Array:
        """Return x in the memory in which `there` is; None is the processor's.

        The last x that crossed is remembered: whoever brings it again gets what was made then.
        """
        if self.has(there) == self.has(x):
            return x
        if self._moved is None or self._moved[0] is not x:
            self._moved = x, self.fetch(x)[0] if self.has(x) else self.send(x)
        return self._moved[1]

    def beside(self, x: Array, there: Any) -> Array:
        """Return x in the memory of `there` if it has crossed already, else x where it is."""
        moved = self._moved is not None and self._moved[0] is x
        return self.bring(x, there) if moved else x

    def keep(self, x: Array, there: Array) -> None:
        """Remember that x has crossed, and is `there` as well."""
        self._moved = x, there

    def send(self, x: np.ndarray) -> Array:
        """Copy x to the card. Small arrays sent a moment ago, as angles, are still there."""
        if x.nbytes > SMALL:
            return self._sent(x)
        last = self._same.setdefault((x.shape, x.dtype), [])
        for host, there in last:
            if np.array_equal(host, x):
                return there
        there = self._sent(x)
        last.append((x.copy(), there))
        if len(last) > 2:
            last.pop(0)
        if len(self._same) > 4:
            self._same.pop(next(iter(self._same)))
        return there

    def _sent(self, x: np.ndarray) -> Array:
        x = np.ascontiguousarray(x)
        to = self.device.xp.empty(x.shape, x.dtype)
        if x.nbytes:
            host = self._outgoing(x.nbytes).view(x.dtype).reshape(x.shape)
            host[...] = x
            self.device.up(host, to)
        return to

    def _outgoing(self, nbytes: int) -> np.ndarray:
        """Return pinned memory for what goes up, once what went from there before is gone."""
        if self._leaving:
            self.device.wait()
        self._leaving = True
        return self._staging(nbytes)

    def fetch(self, *arrays: Array) -> list[np.ndarray]:
        """Copy arrays from the card, with one wait for all of them."""
        each = [self.device.xp.ascontiguousarray(a) for a in arrays]
        sizes = [-(-a.nbytes // 64) * 64 for a in each]
        staging, at, out = self._staging(sum(sizes)), 0, []
        for a, size in zip(each, sizes, strict=True):
            host = staging[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
            if a.nbytes:
                self.device.down(a, host)
            out.append(host)
            at += size
        self.device.wait()
        self._leaving = False
        return [host.copy() for host in out]

    def _staging(self, nbytes: int) -> np.ndarray:
        if self._pinned is None or self._pinned.nbytes < nbytes:
            self.device.wait()  # what is under way may use the one that goes
            self._pinned = self.device.pinned(max(1 << 20, 1 << (nbytes - 1).bit_length()))
        return self._pinned[:nbytes]

    def reserve(self, nbytes: int) -> None:
        """Allocate one place for the arrays that follow: the device deals in pieces of 2 MiB."""
        self._place = self.device.xp.empty(nbytes, np.uint8), 0

    def end_reserve(self) -> None:
        """Allocate each of the arrays that follow by itself."""
        self._place = None

    def _placed(self, a: np.ndarray) -> Array:
        if self._place is not None:
            whole, at = self._place
            if at + a.nbytes <= whole.nbytes:
                self._place = whole, at + -(-a.nbytes // STEP) * STEP
                return whole[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
        return self.device.xp.empty(a.shape, a.dtype)

    def array(self, a: np.ndarray) -> Array:
        """Copy weights to the card as they are, piece by piece."""
        a = np.ascontiguousarray(a)
        to = self._placed(a)
        raw, flat = a.reshape(-1).view(np.uint8), to.reshape(-1).view(np.uint8)
        for start in range(0, a.nbytes, PIECE):
            piece = raw[start : start + PIECE]
            host = self._outgoing(piece.nbytes)
            host[...] = piece
            self.device.up(host, flat[start : start + piece.nbytes])
        return to

    def matrix(self, m: Matrix) -> Any:
        """Copy a matrix to the card as stored; `InputError` for what no kernel there reads."""
        if isinstance(m, Heads):
            return Heads(self.matrix(m.k_b), self.matrix(m.v_b), m.heads)
        if isinstance(m, Tiled):
            return Pieces(tuple(self.matrix(tile) for _, tile in m.tiles()))
        name = format_of(m)
        if name not in FORMS or FORMS[name].columns not in (0, getattr(m, "block", (0, 0))[1]):
            raise InputError(f"--gpu has no kernel for {getattr(m, 'name', name)}{READS}")
        if isinstance(m, np.ndarray):
            return self.array(m)
        stored: Any = m  # a NamedTuple: the same format with arrays that are on the card
        return stored._replace(**{part: self.array(a) for part, a in m.arrays().items()})

    def vector(self, m: Matrix) -> Array:
        """Copy a norm's gain to the card, in float32."""
        return self.array(dequantize(m, np.float32))

    def attention(self, w: AttentionWeights) -> AttentionWeights:
        norms = "q_a_layernorm", "kv_a_layernorm"
        up = {
            name: self.vector(m) if name in norms else self.matrix(m)
            for name, m in w._asdict().items()
            if m is not None
        }
        return w._replace(**up)

    def mlp(self, w: MlpWeights) -> MlpWeights:
        return MlpWeights(*(self.matrix(m) for m in w))

    def layer(self, w: LayerWeights, kinds: frozenset[str] | None = None) -> LayerWeights:
        """Copy these parts of a layer to the card, None being all. Drop it to free it."""

        def here(kind: str) -> bool:
            return kinds is None or kind in kinds

        if here("attention"):
            w = LayerWeights(
                self.vector(w.input_layernorm),
                self.attention(w.self_attn),
                self.vector(w.post_attention_layernorm),
                w.mlp,
            )
        if isinstance(w.mlp, MoeWeights):
            inside = w.mlp
            if here("router"):
                gate = inside.gate._replace(weight=self.matrix(inside.gate.weight))
                inside = inside._replace(gate=gate)
            if here("shared experts") and inside.shared_experts is not None:
                inside = inside._replace(shared_experts=self.mlp(inside.shared_experts))
            return w._replace(mlp=inside)
        return w._replace(mlp=self.mlp(w.mlp)) if here("dense mlp") else w

    # --- products

    def view(self, m: Matrix) -> GpuMatrix | None:
        """Return a matrix as kernels take it, or None. The view is kept, and so the matrix."""
        known = self._known.get(id(m))
        if known is None or known[0] is not m:
            known = self._known[id(m)] = m, _view(m)
        return known[1]

    def forget(self) -> None:
        """Hold no matrix of a layer that was dropped, nor the last x that crossed."""
        self._known.clear()
        self._moved = None

    def linear(self, x: Array, m: Any, rounded: tuple[str, ...] = ()) -> Array:
        """Return y = x Wᵀ, x and W being on the card: float32 [T, O]."""
        xp = self.device.xp
        if isinstance(m, Pieces):
            return xp.concatenate([self.linear(x, p, rounded) for p in m.parts], axis=1)
        known = None if _rounds(m, rounded) else _view(m) if self.is_array(m) else self.view(m)
        if known is not None and 0 < len(x) <= FEW and known.whole:
            O, I = known.shape
            y = xp.empty((len(x), O), np.float32)
            self._rows(xp.ascontiguousarray(x), (I, 0), known, y, (O, 0), (0, O, 0), 1)
            return y
        if self.is_array(m) and m.dtype == x.dtype:
            return x @ m.T
        y = xp.empty((len(x), m.shape[0]), x.dtype)
        if known is None:
            for block, tile in matrix.tiles(m, TILE // 4):
                y[:, block] = matrix.linear(x, tile, rounded)
            return y
        O, I = known.shape
        step = max(1, TILE // I)
        for begin in range(0, O, step):
            end = min(begin + step, O)
            y[:, begin:end] = x @ self.decoded(known, begin, end).T
        return y

    def is_array(self, m: Any) -> bool:
        """Tell whether a matrix is a plain array, of which views come and go."""
        return isinstance(m, self.device.xp.ndarray)

    def decoded(self, m: GpuMatrix, begin: int, end: int) -> Array:
        """Decode rows to float32."""
        I = m.shape[1]
        out = self.device.xp.empty((end - begin, I), np.float32)
        for start in range(begin, end, 1 << 15):  # a grid is 65,535 high at most
            rows = min(1 << 15, end - start)
            grid = (min(-(-I // THREADS), 64), rows, 1)
            args = (*m.place, out[start - begin :], np.int32(I), np.int32(start))
            self.device.launch(m.form.name, "decode", grid, args, 0)
        return out

    def by_head(self, x: Array, m: GpuMatrix, first: int, count: int, every: int) -> Array:
        """Return y[t, h] = `count` rows of W from h·every + first, times x[t, h]: [T, H, count]."""
        T, H, I = x.shape
        y = self.device.xp.empty((T, H, count), np.float32)
        x = self.device.xp.ascontiguousarray(x)
        self._rows(x, (H * I, I), m, y, (H * count, count), (first, count, every), H)
        return y

    def _rows(
        self,
        x: Array,
        x_strides: tuple[int, int],
        m: GpuMatrix,
        y: Array,
        y_strides: tuple[int, int],
        which: tuple[int, int, int],
        heads: int,
    ) -> None:
        """Launch `rows`. Strides: numbers by token and by head; which: rows of a head."""
        T, count = len(x), which[1]
        at_once = next(t for t in TOKENS if t >= T)
        R = 2 if count * heads >= 48 * self.device.processors else 1
        grid = (-(-count // (R * WARPS)), heads, 1)
        args = (
            *m.place,
            x,
            *map(np.int64, x_strides),
            y,
            *map(np.int64, y_strides),
            *map(np.int32, (m.shape[1] // m.form.wide, T, *which)),
        )
        self.device.launch(m.form.name, f"rows_{R}_{at_once}", grid, args, shared_bytes(m.form))

    def latent(self, q: Array, m: GpuMatrix, every: int) -> Array:
        """Return y[t, h, c] = Σ_n W[h·every + n, c] q[t, h, n]: [T, H, N] → [T, H, C]."""
        (T, H, N), C = q.shape, m.shape[1]
        y = self.device.xp.empty((T, H, C), np.float32)
        q = self.device.xp.ascontiguousarray(q)
        args = (*m.place, q, np.int64(H * N), np.int64(N), y, *map(np.int32, (C, N, every)))
        self.device.launch(m.form.name, "latent", (-(-C // THREADS), H, T), args, 0)
        return y


def _view(m: Any) -> GpuMatrix | None:
    """Return a matrix of the card as kernels take it; None where none reads it."""
    name = format_of(m)
    if name not in FORMS or len(m.shape) != 2:
        return None
    w, *scales = m.arrays().values() if hasattr(m, "arrays") else [m]
    if not w.flags.c_contiguous:
        return None
    s = scales[0] if scales else w
    share = m.unit if hasattr(m, "unit") else 1
    return GpuMatrix(FORMS[name], w, w.strides[0], s, s.strides[0], share, tuple(m.shape))


def _rounds(m: Any, rounded: tuple[str, ...]) -> bool:
    """Tell whether an engine rounds the product of code and scale, which no kernel here does."""
    return bool(rounded) and format_of(m) in rounded


def _complete(w: Any) -> bool:
    """Tell whether every part is on the card; `...` stands for one that is in memory."""
    if isinstance(w, LayerWeights | MoeWeights):
        return all(_complete(part) for part in w)
    return w is not ...


def _joined(mine: Any, theirs: Any) -> Any:
    """Return a layer whose missing parts (`...`) are those in memory."""
    if mine is ...:
        return theirs
    if isinstance(mine, LayerWeights | MoeWeights):
        return type(mine)(*(_joined(a, b) for a, b in zip(mine, theirs, strict=True)))
    return mine
