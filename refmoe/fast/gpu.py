"""What every token uses on a CUDA card, the routed experts in memory: `--gpu`.

A placement (`weights/placement.py`) says which parts live on the card. They go up once, as stored,
and are `Matrix` of the same kinds with CuPy's arrays in them; so do the caches of the layers whose
attention is there. The functions of `model/` compute on whatever arrays they are given, `bring`
carries x from one memory to the other where the weights are, and the seams take what is on the card
to the card:

    linear     few tokens by the kernels of `gpu_kernels.py`, many by cuBLAS on decoded tiles
    gate       the product where the router's weights are; x comes down along with the logits, and
               the choice is made here
    experts    on the x that came down, by `fast/linear.py`; the sum goes up where it is added
    absorbed   queries become latent, and contexts values, as stored; the cache in blocks

So x crosses once each way in a layer with routed experts, and not at all in a dense one. The shared
expert is launched before the processor begins with the routed ones (`Numerics.shared_first`); the
card works meanwhile, because CuPy's calls do not wait. Everything is on one stream: what waits is
the processor, for x, once a layer.

Memory: the pool is limited to the budget. Weights and caches are placed within the budget less a
reserve, caches have room for the whole context at once, and how many rows of a prompt go through
together is chosen so that `scratch` fits what is left. What cannot be kept is refused before
anything is loaded.

The mathematics is that of `model/`; rounding differs as sums are made in other orders (bounds:
`gpu_kernels.py`). cuBLAS multiplies in float32, TF32 is not asked for. CuPy is imported in
`CudaDevice` alone, and a `Device` of another kind serves the tests.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.fast.engine import engine as cpu_engine
from refmoe.fast.gpu_kernels import FEW, FORMS, THREADS, TOKENS, WARPS, Form, shared_bytes, source
from refmoe.files import InputError
from refmoe.model import matrix, mla
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import Experts, Lender, MlpWeights, MoeWeights, swiglu
from refmoe.model.matrix import (
    BF16,
    Q4,
    Q8,
    Coded,
    Fp8Block,
    Heads,
    Int4,
    Matrix,
    Tiled,
    dequantize,
    widen_bf16,
)
from refmoe.model.mla import AttentionWeights
from refmoe.model.numerics import NonFinite, Numerics
from refmoe.model.rope import softmax_scale
from refmoe.model.router import Routing
from refmoe.weights.placement import CARD_RESERVE, Parts, Share, Tier, on_card

CONTEXT = 4096  # tokens
VRAM = 12 * 10**9  # bytes of the card this is for; also where a card has more
MODULE = 16 * 512  # bytes that rounding to STEP takes of a module's arrays, at most
PIECE = 1 << 26  # bytes that go up at a time
ASIDE = 1 << 27  # bytes of the device that cuBLAS and kernels take beside all arrays
STEP = 512  # bytes: arrays begin at multiples
SMALL = 1 << 16  # bytes of an array that is not sent again while it is the same
TILE = 1 << 22  # numbers of a tile that is decoded for cuBLAS: 16 MB
BLOCK = 4096  # positions of a cache at once
SCORES = 1 << 21  # scores at once: 8 MB
ROWS = 32  # queries of a prompt at once, inside attention
MOST = 512  # rows of a prompt that go through together

INSTALL = (
    "pip install 'refmoe[gpu]' for CUDA 12 or 'refmoe[gpu13]' for CUDA 13, with NVIDIA's driver"
)

READS = (
    "; it reads bf16, float16, float32, FP8 in blocks of 128 columns, INT4, Q8_0 and Q4_0: "
    "refmoe export --to gguf makes such a file"
)

Array = Any  # on the card: CuPy has no stubs


class Device(Protocol):
    """What is asked of a card. Copies and launches are queued in order and do not wait."""

    xp: Any  # the array module
    name: str
    total: int  # bytes
    processors: int

    def free(self) -> int: ...

    def limit(self, nbytes: int) -> None:
        """No more than this for all arrays together."""

    def peak(self) -> int:
        """The most bytes that arrays ever took."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Bytes of the processor's memory that the card reads and writes by itself."""
        ...

    def up(self, host: np.ndarray, to: Array) -> None: ...

    def down(self, a: Array, host: np.ndarray) -> None: ...

    def wait(self) -> None: ...

    def launch(
        self, form: str, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...], shared: int
    ) -> None: ...


class CudaDevice:
    """The first CUDA device, through CuPy. `InputError` where there is none."""

    def __init__(self) -> None:
        try:
            cupy = importlib.import_module("cupy")
        except ImportError as e:
            reason = str(e).strip().partition("\n")[0]
            raise InputError(f"--gpu needs CuPy ({reason}): {INSTALL}") from None
        try:
            if not cupy.cuda.runtime.getDeviceCount():
                raise RuntimeError("none is there")
            device = cupy.cuda.Device(0)
            device.use()
            _, self.total = device.mem_info
            facts = cupy.cuda.runtime.getDeviceProperties(0)
        except Exception as e:  # of CuPy's own kinds, by the state of driver and library
            text = f"--gpu finds no CUDA device that CuPy {cupy.__version__} can use ({e})"
            raise InputError(f"{text}: {INSTALL}") from None
        self.xp = cupy
        self.name = facts["name"].decode()
        self.processors = int(facts["multiProcessorCount"])
        self.pool = cupy.get_default_memory_pool()
        self.pool.free_all_blocks()  # of a model that was dropped
        self.most = 0
        self.modules: dict[str, Any] = {}
        self.kernels: dict[tuple[str, str], Any] = {}

    def free(self) -> int:
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def limit(self, nbytes: int) -> None:
        self.pool.set_limit(size=nbytes)

    def peak(self) -> int:
        """What the pool took of the device; it gives nothing back unless the limit is near."""
        self.most = max(self.most, self.pool.total_bytes())
        return self.most

    def pinned(self, nbytes: int) -> np.ndarray:
        memory = self.xp.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def up(self, host: np.ndarray, to: Array) -> None:
        to.data.copy_from_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes, self._stream)

    def down(self, a: Array, host: np.ndarray) -> None:
        a.data.copy_to_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes, self._stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def launch(
        self, form: str, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...], shared: int
    ) -> None:
        if form not in self.modules:  # CuPy keeps what it compiled for the next time
            code = source(FORMS[form])
            self.modules[form] = self.xp.RawModule(code=code, options=("--std=c++17",))
        run = self.kernels.get((form, kernel))
        if run is None:
            run = self.kernels[form, kernel] = self.modules[form].get_function(kernel)
        run(grid, (THREADS, 1, 1), args, shared_mem=shared)

    @property
    def _stream(self) -> Any:
        return self.xp.cuda.get_current_stream()


def open_device() -> Device:
    return CudaDevice()


class Stored(NamedTuple):
    """A matrix as kernels take it."""

    form: Form
    w: Array
    w_row: int  # bytes
    s: Array  # of the weights themselves where there are no scales
    s_row: int
    share: int  # rows of weights to a row of scales
    shape: tuple[int, int]

    @property
    def whole(self) -> bool:
        """Whether `rows` reads it: whole chunks, at addresses that it can read 16 bytes from."""
        return not (self.shape[1] % self.form.wide or self.w_row % self.form.aligned)

    @property
    def place(self) -> tuple[Any, ...]:
        strides = np.int64(self.w_row), np.int64(self.s_row)
        return self.w, strides[0], self.s, strides[1], np.int32(self.share)


class Pieces(NamedTuple):
    """A matrix in pieces of whole rows, all of them on the card."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


def first_array(there: Any) -> Any:
    """Of an array, a matrix, or several: what tells in which memory they are."""
    while isinstance(there, tuple):
        there = next((part for part in there if part is not None), None)
    return there


@dataclass
class Card:
    """A device under a budget, and what it is told to do."""

    device: Device
    budget: int = VRAM
    room: int | None = None  # tokens in each cache
    rows: int | None = None  # of a prompt at a time
    cache: str = "float32"  # or bf16, as caches were planned
    said: str = ""  # the placement, for people
    _known: dict[int, tuple[Matrix, Stored | None]] = field(default_factory=dict)
    _same: dict[Any, list[tuple[np.ndarray, Array]]] = field(default_factory=dict)
    _pinned: np.ndarray | None = None
    _place: tuple[Array, int] | None = None  # and how much of it is taken
    _leaving: bool = False  # something from there is on its way up
    _down: tuple[Array, np.ndarray] | None = None  # an x that came down, and what it is here

    def __post_init__(self) -> None:
        self.device.limit(self.budget)

    def has(self, there: Any) -> bool:
        """Whether an array, or a matrix, is on the card."""
        return isinstance(first_array(there), self.device.xp.ndarray)

    # --- to the card and back

    def bring(self, x: Array, there: Any) -> Array:
        """The seam: x in the memory of `there`; None is the processor's."""
        if self.has(there) == self.has(x):
            return x
        if not self.has(x):
            return self.send(x)
        if self._down is not None and self._down[0] is x:
            return self._down[1]
        return self.fetch(x)[0]

    def keep(self, x: Array, host: np.ndarray) -> None:
        """x is here now; whoever brings it has this, until another x comes down."""
        self._down = x, host

    def send(self, x: np.ndarray) -> Array:
        """To the card. Small ones that were sent a moment ago, as angles are, are there still."""
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
            host = self._leave(x.nbytes).view(x.dtype).reshape(x.shape)
            host[...] = x
            self.device.up(host, to)
        return to

    def _leave(self, nbytes: int) -> np.ndarray:
        """Where to put what goes up, once what went from there before is gone."""
        if self._leaving:
            self.device.wait()
        self._leaving = True
        return self._staging(nbytes)

    def fetch(self, *arrays: Array) -> list[np.ndarray]:
        """From the card, all with one wait."""
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
        """One place for the arrays that follow: the device deals in pieces of 2 MiB."""
        self._place = self.device.xp.empty(nbytes, np.uint8), 0

    def leave(self) -> None:
        """Arrays that follow have places of their own."""
        self._place = None

    def _placed(self, a: np.ndarray) -> Array:
        if self._place is not None:
            whole, at = self._place
            if at + a.nbytes <= whole.nbytes:
                self._place = whole, at + -(-a.nbytes // STEP) * STEP
                return whole[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
        return self.device.xp.empty(a.shape, a.dtype)

    def array(self, a: np.ndarray) -> Array:
        """Weights to the card, as they are, piece by piece."""
        a = np.ascontiguousarray(a)
        to = self._placed(a)
        raw, flat = a.reshape(-1).view(np.uint8), to.reshape(-1).view(np.uint8)
        for start in range(0, a.nbytes, PIECE):
            piece = raw[start : start + PIECE]
            host = self._leave(piece.nbytes)
            host[...] = piece
            self.device.up(host, flat[start : start + piece.nbytes])
        return to

    def matrix(self, m: Matrix) -> Any:
        """A matrix to the card. `InputError` for what no kernel there reads."""
        match m:
            case BF16(bits):
                return BF16(self.array(bits))
            case Int4(packed, scale):
                return Int4(self.array(packed), self.array(scale))
            case Fp8Block(bits, scale, block) if block[1] == 128:
                return Fp8Block(self.array(bits), self.array(scale.astype(np.float32)), block)
            case Q8(blocks):
                return Q8(self.array(blocks))
            case Q4(blocks):
                return Q4(self.array(blocks))
            case Heads(k_b, v_b, heads):
                return Heads(self.matrix(k_b), self.matrix(v_b), heads)
            case Tiled():
                return Pieces(tuple(self.matrix(tile) for _, tile in m.tiles()))
            case np.ndarray(dtype=np.float16 | np.float32):
                return self.array(m)
        name = getattr(m, "name", None) or getattr(m, "dtype", type(m).__name__)
        raise InputError(f"--gpu has no kernel for {name}{READS}")

    def vector(self, m: Matrix) -> Array:
        """A gain to the card, exact in float32."""
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
        """A layer with these parts of it on the card; None: all. It is freed when it is dropped."""

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

    def stored(self, m: Matrix) -> Stored | None:
        """None where no kernel reads it. Matrices are remembered, and so held."""
        known = self._known.get(id(m))
        if known is None or known[0] is not m:
            known = self._known[id(m)] = m, _stored(m)
        return known[1]

    def forget(self) -> None:
        """Layers that were dropped are no longer held, nor is an x."""
        self._known.clear()
        self._down = None

    def linear(self, x: Array, m: Any, rounded: tuple[str, ...] = ()) -> Array:
        """y = x Wᵀ, both on the card: float32 [T, O]."""
        xp = self.device.xp
        if isinstance(m, Pieces):
            return xp.concatenate([self.linear(x, p, rounded) for p in m.parts], axis=1)
        known = None if _rounds(m, rounded) else _stored(m) if self.has_no_id(m) else self.stored(m)
        if known is not None and 0 < len(x) <= FEW and known.whole:
            O, I = known.shape
            y = xp.empty((len(x), O), np.float32)
            self._rows(xp.ascontiguousarray(x), (I, 0), known, y, (O, 0), (0, O, 0), 1)
            return y
        if self.has_no_id(m) and m.dtype == x.dtype:
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

    def has_no_id(self, m: Any) -> bool:
        """An array is a matrix by itself: views of it come and go."""
        return isinstance(m, self.device.xp.ndarray)

    def decoded(self, m: Stored, begin: int, end: int) -> Array:
        """Rows as float32."""
        I = m.shape[1]
        out = self.device.xp.empty((end - begin, I), np.float32)
        for start in range(begin, end, 1 << 15):  # a grid is 65,535 high at most
            rows = min(1 << 15, end - start)
            grid = (min(-(-I // THREADS), 64), rows, 1)
            args = (*m.place, out[start - begin :], np.int32(I), np.int32(start))
            self.device.launch(m.form.name, "decode", grid, args, 0)
        return out

    def by_head(self, x: Array, m: Stored, first: int, count: int, every: int) -> Array:
        """y[t, h] = W[h·every + first …] x[t, h], so many rows: [T, H, I] → [T, H, count]."""
        T, H, I = x.shape
        y = self.device.xp.empty((T, H, count), np.float32)
        x = self.device.xp.ascontiguousarray(x)
        self._rows(x, (H * I, I), m, y, (H * count, count), (first, count, every), H)
        return y

    def _rows(
        self,
        x: Array,
        x_strides: tuple[int, int],
        m: Stored,
        y: Array,
        y_strides: tuple[int, int],
        which: tuple[int, int, int],
        heads: int,
    ) -> None:
        """Strides in numbers: token to token, head to head. which: first, count, every."""
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

    def latent(self, q: Array, m: Stored, every: int) -> Array:
        """y[t, h, c] = Σ_n W[h·every + n, c] q[t, h, n]: [T, H, N] → [T, H, C]."""
        (T, H, N), C = q.shape, m.shape[1]
        y = self.device.xp.empty((T, H, C), np.float32)
        q = self.device.xp.ascontiguousarray(q)
        args = (*m.place, q, np.int64(H * N), np.int64(N), y, *map(np.int32, (C, N, every)))
        self.device.launch(m.form.name, "latent", (-(-C // THREADS), H, T), args, 0)
        return y


def _stored(m: Any) -> Stored | None:
    scale: Array = None
    share = 1
    match m:
        case BF16(w):
            name = "bf16"
        case Int4(w, scale):
            name = "int4"
        case Fp8Block(w, scale, (share, 128)):
            name = "fp8"
        case Q8(w):
            name = "q8"
        case Q4(w):
            name = "q4"
        case _ if getattr(m, "dtype", None) in (np.float32, np.float16) and m.ndim == 2:
            name, w = {4: "f32", 2: "f16"}[m.dtype.itemsize], m
        case _:
            return None
    if not w.flags.c_contiguous:
        return None
    s = w if scale is None else scale
    return Stored(FORMS[name], w, w.strides[0], s, s.strides[0], share, tuple(m.shape))


def _rounds(m: Any, rounded: tuple[str, ...]) -> bool:
    return (isinstance(m, Int4) and "int4" in rounded) or (
        isinstance(m, Fp8Block) and "fp8" in rounded
    )


# --- seams


@dataclass(frozen=True)
class CardExperts:
    """A layer's routed experts in memory, and those of them that are on the card as well."""

    inner: Experts  # or a Lender
    up: bool  # the sum is added to the shared expert's on the card
    own: Mapping[int, MlpWeights]

    def __call__(self, e: int) -> MlpWeights:
        return self.inner(e)


class CardLender(CardExperts):
    """The same where experts are lent."""

    def loans(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        assert isinstance(self.inner, Lender)
        return self.inner.loans(chosen, x)


class Seams:
    """Each takes what is on the card to the card, and all else to the processor's engine."""

    def __init__(self, card: Card, base: Numerics):
        self.card, self.base = card, base
        self.rounded = base.conventions.rounded_products

    def linear(self, x: Array, m: Matrix) -> Array:
        return self.card.linear(x, m, self.rounded) if self.card.has(x) else self.base.linear(x, m)

    def gate(self, x: Array, m: Matrix) -> np.ndarray:
        """Logits in the processor's memory, whose choice it is."""
        card = self.card
        if not card.has(x):
            if not card.has(m):
                return self.base.gate(x, m)
            return card.fetch(card.linear(card.send(x), m))[0]
        if card.has(m):
            host, logits = card.fetch(x, card.linear(x, m))
        else:
            (host,) = card.fetch(x)
            logits = self.base.gate(host, m)
        card.keep(x, host)
        return logits

    def experts(self, x: Array, routing: Routing, expert: Experts, nx: Numerics) -> Array:
        card = self.card
        here = expert if isinstance(expert, CardExperts) else CardExperts(expert, False, {})
        host = card.bring(x, None)
        if nx.stop_at_nonfinite and card.has(x) and not np.isfinite(host).all():
            row = int(np.argwhere(~np.isfinite(host))[0][0])
            raise NonFinite(
                f"{nx.path('#input')}: what came from the card is not finite, in row {row}; it "
                "began there, since x last came down. Without --gpu the point is named"
            )
        own, rest = self._own(x, routing, here, nx)
        y: Array = None if rest is None else self.base.experts(host, rest, here.inner, nx)
        if card.has(x) and here.up:
            y = None if y is None else card.send(y)
        elif own is not None:
            (own,) = card.fetch(own)
        if y is None:
            return own
        return y if own is None else y + own

    def _own(
        self, x: Array, routing: Routing, here: CardExperts, nx: Numerics
    ) -> tuple[Array | None, Routing | None]:
        """Launched: the sum over a single token's experts on the card; and who is left."""
        chosen = routing.experts[0].tolist() if len(routing.experts) == 1 else []
        mine = [k for k, e in enumerate(chosen) if e in here.own]
        inside = (".gate_proj", ".up_proj", ".act", ".down_proj", "#rows")
        watched = nx.watch is not None and any(
            nx.watches(f"experts.{chosen[k]}{name}") for k in mine for name in inside
        )
        if not mine or watched:
            return None, routing
        x = x if self.card.has(x) else self.card.send(x)
        total: Array = None
        for k in mine:
            part = swiglu(x, here.own[chosen[k]], nx) * float(routing.weights[0, k])
            total = part if total is None else total + part
        others = [k for k in range(len(chosen)) if k not in mine]
        if not others:
            return total, None
        rest = routing._replace(
            experts=routing.experts[:, others], weights=routing.weights[:, others]
        )
        return total, rest

    def expanded(self, *args: Any) -> Array:
        return self._attention(args, self.base.expanded)

    def absorbed(self, *args: Any) -> Array:
        return self._attention(args, self.base.absorbed)

    def _attention(self, args: tuple[Any, ...], on_host: Callable[..., Array]) -> Array:
        """On the card always absorbed: nothing there grows with context and prompt together."""
        q_nope, q_pe, kv_b_proj, cache, cfg, nx = args
        if not self.card.has(q_nope):
            return on_host(*args)
        if on_host is self.base.expanded and nx.watches("kv_b_proj"):
            return mla.expanded(*args)
        inside = ("#q_latent", "#scores", "#probs", "#context_latent")
        if any(nx.watches(name) for name in inside) or _rounds(kv_b_proj, self.rounded):
            return mla.absorbed(*args)
        T, S = len(q_nope), cache.length
        if T <= FEW:
            return self._latent_attention(q_nope, q_pe, kv_b_proj, cache, S, cfg, nx)
        xp = self.card.device.xp
        w = self._by_heads(kv_b_proj, cfg)
        context = xp.empty((T, cfg.num_attention_heads, cfg.v_head_dim), np.float32)
        for start in range(0, T, ROWS):
            rows = slice(start, min(start + ROWS, T))
            seen = S - T + rows.stop  # by the last of them
            context[rows] = self._latent_attention(
                q_nope[rows], q_pe[rows], w, cache, seen, cfg, nx
            )
        return context

    def _by_heads(self, m: Any, cfg: Config) -> Array:
        """kv_b_proj in float32: [H, N+V, C]."""
        known = self.card.stored(m)
        w = dequantize(m) if known is None else self.card.decoded(known, 0, known.shape[0])
        return w.reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)

    def _latent_attention(
        self,
        q_nope: Array,
        q_pe: Array,
        m: Any,
        cache: LatentCache,
        seen: int,
        cfg: Config,
        nx: Numerics,
    ) -> Array:
        """Queries whose last sees `seen` positions, with kv_b_proj as stored or [H, N+V, C]."""
        card = self.card
        N, V, H = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.num_attention_heads
        scale = nx.dtype(softmax_scale(cfg))
        if isinstance(m, Heads):
            k_b, v_b = card.stored(m.k_b), card.stored(m.v_b)
            if k_b is not None and v_b is not None and k_b.whole and v_b.whole:
                C = k_b.shape[0] // H
                q_latent = card.by_head(q_nope, k_b, 0, C, C)
                return card.by_head(self.attend(q_latent, q_pe, cache, seen, scale), v_b, 0, V, V)
        elif not card.has_no_id(m):
            known = card.stored(m)
            if known is not None and known.whole:
                q_latent = card.latent(q_nope, known, N + V)
                context = self.attend(q_latent, q_pe, cache, seen, scale)
                return card.by_head(context, known, N, V, N + V)
        if not card.has_no_id(m) or m.ndim == 2:
            m = self._by_heads(m, cfg)
        q_latent = (q_nope.transpose(1, 0, 2) @ m[:, :N]).transpose(1, 0, 2)  # [T, H, C]
        context = self.attend(q_latent, q_pe, cache, seen, scale)
        return (context.transpose(1, 0, 2) @ m[:, N:].transpose(0, 2, 1)).transpose(1, 0, 2)

    def attend(
        self, q_latent: Array, q_pe: Array, cache: LatentCache, seen: int, scale: np.floating
    ) -> Array:
        """softmax(scale · (q_latent·c_kv + q_pe·k_pe)) c_kv, causal: [T, H, C] → [T, H, C].

        Over blocks of positions: the largest score, the sum and the context so far are brought to
        the new largest (Milakov and Gimelshein, arXiv:1805.02867). All see the first block.
        """
        xp = self.card.device.xp
        T, H, C = q_latent.shape
        q = xp.ascontiguousarray(q_latent).reshape(T * H, C)
        p = xp.ascontiguousarray(q_pe).reshape(T * H, -1)
        c_kv, k_pe = cache.stored
        step = max(1, min(BLOCK, SCORES // (T * H)))
        last = xp.repeat(xp.arange(seen - T, seen), H)[:, None]
        most: Array = None
        for start in range(0, seen, step):
            stop = min(start + step, seen)
            latent, key = (
                widen_bf16(a[start:stop]) if cache.bf16 else a[start:stop] for a in (c_kv, k_pe)
            )
            s = (q @ latent.T + p @ key.T) * scale  # [T·H, block]
            if stop > seen - T + 1:
                s = xp.where(xp.arange(start, stop) <= last, s, np.float32(-np.inf))
            top = s.max(axis=1, keepdims=True)
            if most is None:
                e = xp.exp(s - top)
                most, total, context = top, e.sum(axis=1, keepdims=True), e @ latent
                continue
            new = xp.maximum(most, top)
            e, kept = xp.exp(s - new), xp.exp(most - new)
            total = total * kept + e.sum(axis=1, keepdims=True)
            context = context * kept + e @ latent
            most = new
        return (context / total).reshape(T, H, C)


def engine(card: Card, conventions: Conventions | str = "refmoe", fast: bool = False) -> Numerics:
    """The processor's engine in float32, with what is on the card computed there."""
    base = cpu_engine("float32", conventions, fast)
    seams = Seams(card, base)
    return replace(
        base,
        linear=seams.linear,
        experts=seams.experts,
        gate=seams.gate,
        expanded=seams.expanded,
        absorbed=seams.absorbed,
        bring=card.bring,
        shared_first=True,
        room=card.room,
        rows=card.rows,
        cache="bf16" if card.cache == "bf16" else None,
    )


# --- a placement, carried out


class _Layers(Sequence[LayerWeights]):
    """Layers with their parts on the card; the rest is asked for where it is."""

    def __init__(self, inner: Sequence[LayerWeights], parts: Sequence[LayerWeights | None]):
        self.inner, self.parts = inner, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        mine = self.parts[i]
        if mine is None:
            return self.inner[i]
        return mine if _complete(mine) else _joined(mine, self.inner[i])


class _Passing(Sequence[LayerWeights]):
    """Layers that go up when they are asked for. Whoever asked drops each before the next."""

    def __init__(self, inner: Sequence[LayerWeights], card: Card):
        self.inner, self.card = inner, card

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.card.forget()
        return self.card.layer(self.inner[i])


def _complete(w: Any) -> bool:
    """Whether every part is there; `...` stands for one that is in memory."""
    if isinstance(w, LayerWeights | MoeWeights):
        return all(_complete(part) for part in w)
    return w is not ...


def _joined(mine: Any, theirs: Any) -> Any:
    if mine is ...:
        return theirs
    if isinstance(mine, LayerWeights | MoeWeights):
        return type(mine)(*(_joined(a, b) for a, b in zip(mine, theirs, strict=True)))
    return mine


class _Experts:
    """The decoder's experts, each layer's with what of it is on the card."""

    def __init__(
        self, inner: Callable[[int], Experts], own: Mapping[int, Any], up: Mapping[int, bool]
    ):
        self.inner, self.own, self.up = inner, own, up

    def of_layer(self, i: int) -> CardExperts:
        inner = self.inner(i)
        kind = CardLender if isinstance(inner, Lender) else CardExperts
        return kind(inner, self.up.get(i, False), self.own.get(i, {}))

    def __call__(self, i: int, e: int) -> MlpWeights:
        return self.inner(i)(e)


def scratch(cfg: Config, rows: int) -> int:
    """Bytes that are computed on the card at once, at most, with so many rows of a prompt.

    What a layer holds beside its weights, in float32: x and its sums; queries, rotated and not,
    and contexts, or what SwiGLU makes; a decoded tile with its results; in attention kv_b_proj, and
    for `ROWS` queries the latents, scores and contexts of a block.
    """
    D, H, C = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    few = min(rows, ROWS)
    widest = max(cfg.intermediate_size, cfg.moe_intermediate_size * (cfg.n_shared_experts or 0))
    x = 5 * rows * D
    heads = rows * ((cfg.q_lora_rank or 0) + 2 * H * (N + R) + 5 * H * R + 3 * H * V)
    block = 5 * max(SCORES, few * H) + 3 * BLOCK * (C + R)
    inside = (H * (N + V) * C if rows > FEW else 0) + few * H * (5 * C + N + V) + block
    swiglu_ = 8 * rows * widest
    tile = max(TILE, D) + rows * max(TILE // min(D, C), 1)
    most = x + max(heads + inside, heads + tile, swiglu_ + tile)
    return 5 * most  # float32, and a quarter for what libraries copy on their way


def rows_within(cfg: Config, nbytes: int) -> int:
    """How many rows go through together: the most, up to 512, whose scratch fits. 0: none."""
    rows = MOST
    while rows and scratch(cfg, rows) > nbytes:
        rows //= 2
    return rows


@dataclass(frozen=True)
class Request:
    """What `--gpu` asks for."""

    vram: int | None = None  # None: 12 GB, or what the card has free
    experts: int = 0
    context: int = CONTEXT
    cache: str = "float32"
    passing: bool = False  # layers are on the card one after another, as a sweep asks for them


class Planned(NamedTuple):
    """What goes onto the card, and the card, on which nothing is yet."""

    share: Share
    card: "Card"


def _passing(cfg: Config, parts: Parts, request: Request, device: Device, budget: int) -> Planned:
    """One layer at a time, its caches and what is computed: they grow with the longest prompt."""
    layers: dict[int, int] = {}
    for p in parts.always:
        if p.layer is not None:
            layers[p.layer] = layers.get(p.layer, 0) + p.nbytes + MODULE
    context = min(request.context, cfg.max_position_embeddings)
    layer = max(layers.values()) + _gains(cfg) + 8 * SMALL
    left = budget - layer

    def needed(rows: int) -> int:  # a cache that grows is there twice
        return scratch(cfg, rows) + 3 * parts.cache_bytes(context + rows)

    rows = MOST
    while rows and needed(rows) > left:
        rows //= 2
    if not rows:
        raise InputError(
            f"a budget of {budget / 1e9:.2f} GB: the largest layer takes {layer / 1e9:.2f} GB, and "
            f"computing it for prompts of {context} tokens {needed(1) / 1e9:.2f} GB"
        )
    said = f"on {device.name}: {len(layers)} layers one after another, {rows} rows at a time"
    share = Share(Tier("card", "vram", budget, 1, CARD_RESERVE), (), (), 0, 0, parts.expert)
    return Planned(share, Card(device, budget, context, rows, said=said))


def budget_of(vram: int | None, device: Device) -> int:
    """`--vram`, or 12 GB, or what is free, less what libraries take, if that is less."""
    free = device.free() - ASIDE
    if vram is not None and vram > free:
        raise InputError(
            f"--vram {vram / 1e9:.2f} GB: {device.name} has {device.total / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB of them free beside what CUDA's libraries take; ask for less"
        )
    return min(VRAM, free) if vram is None else vram


def planned(cfg: Config, parts: Parts, request: Request, device: Device) -> Planned:
    """Raises `InputError` where the budget cannot be kept, before anything is loaded."""
    budget = budget_of(request.vram, device)
    if request.passing:
        return _passing(cfg, parts, request, device, budget)
    number = 2 if request.cache == "bf16" else 4
    context = min(request.context, cfg.max_position_embeddings)
    share = on_card(parts, budget, context, number, request.experts)
    cache = parts.cache_bytes(context, number)
    if not share.layers("attention"):
        least = min(p.nbytes for p in parts.always if p.kind == "attention") + cache + CARD_RESERVE
        raise InputError(
            f"a budget of {budget / 1e9:.2f} GB on the card holds no layer: attention, its cache "
            f"for {context} tokens and {CARD_RESERVE / 1e9:.2f} GB for what is computed need "
            f"{least / 1e9:.2f} GB"
        )
    if request.experts > share.experts:
        raise InputError(
            f"--gpu-experts {request.experts}: beside what every token uses there is room for "
            f"{share.experts}, of {parts.expert / 1e6:.1f} MB each"
        )
    left = budget - share.nbytes - beside(cfg, share)
    rows = rows_within(cfg, left)
    if not rows:
        raise InputError(
            f"{share.nbytes / 1e9:.2f} GB of weights and caches leave {left / 1e9:.2f} GB of the "
            f"card's {budget / 1e9:.2f}, and {scratch(cfg, 1) / 1e9:.2f} GB are needed to compute"
        )
    return Planned(
        share, Card(device, budget, context, rows, request.cache, _said(parts, share, device))
    )


def beside(cfg: Config, share: Share) -> int:
    """Bytes at most that the share takes more than it says: gains in float32, the pool's steps of
    512 for each array, and small arrays that stay from step to step."""
    gains = _gains(cfg) * (len(share.layers("attention")) + 1)
    return MODULE * (len(share.parts) + len(share.caches) + share.experts) + gains + 8 * SMALL


def _gains(cfg: Config) -> int:
    """Bytes of a layer's, in float32."""
    return 4 * (2 * cfg.hidden_size + (cfg.q_lora_rank or 0) + cfg.kv_lora_rank)


def _said(parts: Parts, share: Share, device: Device) -> str:
    kinds = ("attention", "shared experts", "dense mlp", "router")
    of = {kind: sum(p.kind == kind for p in parts.always) for kind in kinds}
    held = [
        f"{kind} of {len(share.layers(kind))} of {of[kind]} layers" for kind in kinds if of[kind]
    ]
    held.append("the head" if share.has("lm_head") else "not the head")
    if share.experts:
        held.append(f"{share.experts} of {parts.all_experts} routed experts")
    return f"on {device.name}, {share.nbytes / 1e9:.2f} GB: {', '.join(held)}"


def facts(card: Card) -> dict[str, Any]:
    """For programs."""
    return {
        "device": card.device.name,
        "placement": card.said,
        "context": card.room,
        "rows": card.rows,
        "budget": card.budget,
        "vram_peak": card.device.peak(),
    }


def hottest(use: np.ndarray | None, parts: Parts, count: int) -> dict[int, list[int]]:
    """Layer → experts: the most used ones, or, where nothing is known, as many in each layer."""
    moe = parts.moe_layers
    if use is None or not use.any():
        use = np.zeros((max(moe, default=-1) + 1, parts.experts), np.float32)
        use[list(moe)] = np.arange(parts.experts, 0, -1)
    order = np.argsort(-use, axis=None, kind="stable")
    found: dict[int, list[int]] = {}
    for at in order.tolist():
        layer, e = divmod(at, use.shape[1])
        if count and layer in moe:
            found.setdefault(layer, []).append(e)
            count -= 1
    return found


def loaded(
    decoder: Decoder,
    found: Planned,
    own: Mapping[int, Sequence[int]],
    conventions: Conventions | str,
) -> Decoder:
    """The decoder with its share on the card. Weights go up here, once, layer by layer."""
    share, card = found
    if not share.parts:
        layers = _Passing(decoder.layers, card)
        return replace(decoder, nx=engine(card, conventions), layers=layers)
    names = {p.name for p in share.parts}
    parts: list[LayerWeights | None] = []
    experts: dict[int, dict[int, MlpWeights]] = {}
    up: dict[int, bool] = {}
    kinds = {p.layer: set[str]() for p in share.parts}
    for p in share.parts:
        kinds[p.layer].add(p.kind)
    if isinstance(decoder.layers, list):  # mapped; asking a store would read them
        for i in range(len(decoder.layers)):
            _check_formats(decoder.layers[i] if i in kinds else None)
        _check_formats(decoder.lm_head if "lm_head" in names else None)
    size = share.nbytes - len(share.caches) * share.cache
    with tqdm(total=size, unit="B", unit_scale=True, desc="to the card", disable=None) as bar:
        for i in range(decoder.cfg.num_hidden_layers):
            here = frozenset(kinds.get(i, set()))
            held = [p for p in share.parts if p.layer == i]
            if here:
                card.reserve(sum(p.nbytes + MODULE for p in held) + _gains(decoder.cfg))
            mine = _part(decoder.layers[i], here, card) if here else None
            parts.append(mine)
            no_shared = not decoder.cfg.n_shared_experts
            up[i] = "attention" in here and ("shared experts" in here or no_shared)
            bar.update(sum(p.nbytes for p in held))
            for e in own.get(i, ()):
                card.reserve(share.expert + MODULE)
                experts.setdefault(i, {})[e] = card.mlp(decoder.experts_of(i)(e))
                bar.update(share.expert)
        card.leave()
        head = "lm_head" in names
        norm = card.vector(decoder.norm) if head else decoder.norm
        lm_head = card.matrix(decoder.lm_head) if head else decoder.lm_head
        card.device.wait()
    return replace(
        decoder,
        nx=engine(card, conventions),
        layers=_Layers(decoder.layers, parts),
        experts=_Experts(decoder.experts_of, experts, up),
        norm=norm,
        lm_head=lm_head,
    )


def _check_formats(w: Any) -> None:
    """`InputError` for K-quants, before anything goes up."""
    if isinstance(w, Coded):
        raise InputError(f"--gpu has no kernel for {w.name}{READS}")
    if isinstance(w, LayerWeights | AttentionWeights | MoeWeights | MlpWeights | Heads):
        for part in w:
            _check_formats(part)


def _part(w: LayerWeights, kinds: frozenset[str], card: Card) -> LayerWeights:
    """The parts that are on the card, and `...` for the others."""
    there = card.layer(w, kinds)
    missing: Any = ...
    attention = "attention" in kinds
    inside: Any
    if isinstance(there.mlp, MoeWeights):
        gate, shared = there.mlp
        bias = np.array(dequantize(gate.e_score_correction_bias))  # the choice is made in memory
        gate = gate._replace(e_score_correction_bias=bias)
        of_all = "shared experts" in kinds or shared is None
        inside = MoeWeights(gate if "router" in kinds else missing, shared if of_all else missing)
    else:
        inside = there.mlp if "dense mlp" in kinds else missing
    return LayerWeights(
        there.input_layernorm if attention else missing,
        there.self_attn if attention else missing,
        there.post_attention_layernorm if attention else missing,
        inside,
    )
