"""`refmoe quant`: is this file that model, and what should its format cost?

    verify A B    two files of one model, tensor by tensor, in float64
    expect        a format's error on each tensor of a model, and end to end

Verdicts on a tensor of B, A being right:

    bit-equal    every value is A's: an exact repack
    rounded      within half a step of both types, scales' rounding included; of a format that
                 another library decodes, as far off as such a format can be (`LOOSE`)
    wrong        else; `likely` names the mistake that turns A into B, if one of these does:
                 nibbles swapped within bytes, groups' halves interleaved, offset 7 or 0 for 8,
                 k_b not transposed, gate and up swapped, rows of pairs or halves permuted, scaled

End to end, the divergence of next-token probabilities from those of the model as it is, in its own
numerics (float64 from the command line), KL(P‖Q) = Σ p·(ln p - ln q) nats a position, and how often
the likeliest token stays.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MlpWeights, routed_experts
from refmoe.model.matrix import (
    BF16,
    Q4,
    Q8,
    Coded,
    Fp8Block,
    Heads,
    Int4,
    Matrix,
    dequantize,
    quantize_q8,
    round_bf16,
    rows,
    tiles,
)
from refmoe.model.numerics import Numerics
from refmoe.run.model import Model
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.dense import replaced
from refmoe.weights.gguf import library, opened
from refmoe.weights.random import pack_fp8, pack_int4

LOOSE = 0.35  # of the RMS: two-bit formats are off by a quarter
TILE = 1 << 20
FORMATS = ("bf16", "f16", "q8_0", "int4", "int4-7.5", "fp8", "q4_0", "q4_1", "q5_0", "q5_1")


class Verdict(NamedTuple):
    name: str
    verdict: str
    max_rel: float | None  # largest error over the largest value; None where shapes differ
    likely: str | None


# --- verify


def verify(a: str | Path, b: str | Path) -> Iterator[Verdict]:
    """Each module of the first in the second. Raises `InputError` where one cannot be opened."""
    ours, theirs = opened(a), opened(b)
    if _shape(ours) != _shape(theirs):
        raise InputError(f"{a} and {b} are of different shapes; not two files of one model")
    for module in modules(ours):
        yield _judged(module, ours, theirs)


def _shape(checkpoint: Checkpoint) -> Any:
    return replace(checkpoint.cfg, quantization=None, model_type="", eos_token_id=())


def modules(checkpoint: Checkpoint) -> list[str]:
    """Every matrix and vector of the network, once, in order."""
    plain = expected(replace(checkpoint.cfg, quantization=None))
    return [name.removesuffix(".weight") for name, _, _ in plain]


def _of(checkpoint: Checkpoint, module: str) -> Matrix:
    if not module.endswith("_bias"):
        return checkpoint.matrix(module)
    values = checkpoint.array(module)
    return BF16(values) if checkpoint.tensors[module].dtype == "BF16" else values


@np.errstate(over="ignore", invalid="ignore")  # of two NaN the bits do not matter
def _judged(module: str, ours: Checkpoint, theirs: Checkpoint) -> Verdict:
    try:
        a, b = _of(ours, module), _of(theirs, module)
    except KeyError:
        return Verdict(module, "wrong", None, "it is in one of the two only")
    if a.shape != b.shape:
        return Verdict(module, "wrong", None, f"it is {list(b.shape)} for {list(a.shape)}")
    equal = near = True
    worst = most = squares = total = 0.0
    for x, y, allowed in _compared(a, b):
        d = np.abs(x - y)
        d = np.where(np.isnan(x) & np.isnan(y), 0, d)
        equal = equal and not d.any()
        near = near and bool((d <= allowed).all())
        worst = max(worst, float(d.max(initial=0)))
        most = max(most, float(np.abs(x).max(initial=0)))
        squares, total = squares + float((d * d).sum()), total + float((x * x).sum())
    rel = worst / most if most else worst
    if equal:
        return Verdict(module, "bit-equal", 0.0, None)
    foreign = isinstance(b, Coded) or isinstance(a, Coded)
    if near or (foreign and squares <= LOOSE**2 * total):
        return Verdict(module, "rounded", rel, None)
    return Verdict(module, "wrong", rel, likely(module, ours, a, b))


def _compared(a: Matrix, b: Matrix) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tiles of both in float64, and what rounding allows."""
    if len(a.shape) == 1:
        x, y = (np.asarray(dequantize(m, np.float64)) for m in (a, b))
        yield x, y, half_step(a, x) + half_step(b, y)
        return
    if any(isinstance(m, Heads | Fp8Block) for m in (a, b)):
        x, y = dequantize(a, np.float64), dequantize(b, np.float64)
        yield x, y, half_step(a, x) + half_step(b, y)
        return
    for (_, p), (_, q) in zip(tiles(a, TILE), tiles(b, TILE), strict=True):
        x, y = dequantize(p, np.float64), dequantize(q, np.float64)
        # of two with codes of their own only the scales may have been rounded, to bf16 or float16
        repacked = isinstance(p, Int4 | Q4) and isinstance(q, Int4 | Q4)
        yield x, y, np.abs(x) * 2.0**-8 if repacked else half_step(p, x) + half_step(q, y)


def half_step(m: Matrix, w: np.ndarray) -> np.ndarray:
    """How far a value of this type may be from what it was made of."""
    size = np.abs(w)
    match m:
        case BF16():
            return size * 2.0**-8
        case Int4():  # half a code, and code 8 times the scale's rounding
            return _steps(m, 0.5 + 8 * 2.0**-8)
        case Q4():  # ggml's quantiser has d = max/-8: what lies above 7.5·d is cut to 7·d
            d = signed_steps(m)
            return np.where(w == 7 * d, 1, 0.5) * np.abs(d) + 8 * 2.0**-8 * np.abs(d)
        case Q8():
            return _steps(m, 0.5 + 127 * 2.0**-11)
        case Fp8Block():
            return size * 2.0**-4 + np.abs(w).max(initial=0) * 2.0**-9
        case Heads(k_b, v_b):
            if isinstance(k_b, Q8) or isinstance(v_b, Q8):  # groups run across the keys' rows
                return np.full_like(size, (0.5 + 127 * 2.0**-11) * size.max(initial=0) / 127)
            return size * 2.0**-8 + 2.0**-25
        case np.ndarray(dtype=np.float16):
            return size * 2.0**-11 + 2.0**-25
        case np.ndarray(dtype=np.float32):
            return size * 2.0**-24
        case _:
            return np.zeros_like(size)


def _steps(m: Int4 | Q4 | Q8, count: float) -> np.ndarray:
    """So many steps of each group of 32."""
    return count * np.abs(signed_steps(m))


def likely(module: str, ours: Checkpoint, a: Matrix, b: Matrix) -> str | None:
    """The mistake after which the right tensor is the wrong one."""
    x, y = dequantize(a, np.float64), dequantize(b, np.float64)
    for text, changed in _mistakes(module, ours, a, x):
        if changed.shape == y.shape and _alike(changed, y):
            return text
    top = float((x * y).sum() / max((x * x).sum(), 1e-300))
    if top and _alike(x * top, y) and abs(top - 1) > 1e-3:
        return f"the right one times {top:.4g}"
    return None


def signed_steps(m: Int4 | Q4 | Q8) -> np.ndarray:
    if isinstance(m, Int4):
        step = dequantize(BF16(m.scale), np.float64)
    else:
        step = np.ascontiguousarray(m.blocks[..., :2]).view(np.float16)[..., 0].astype(np.float64)
    return np.repeat(step, 32, axis=1)


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    """But for quantising: as near as a four-bit format leaves them."""
    return bool(((x - y) ** 2).sum() <= 0.02 * (x * x).sum())


def _mistakes(
    module: str, ours: Checkpoint, a: Matrix, x: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    if x.ndim == 2 and not x.shape[1] % 32:
        groups = x.reshape(len(x), -1, 32)
        swapped = groups.reshape(len(x), -1, 16, 2)[..., ::-1].reshape(x.shape)
        yield "nibbles swapped within each byte", swapped
        halves = groups.reshape(len(x), -1, 2, 16).swapaxes(2, 3).reshape(x.shape)
        yield "nibbles in the order of Q4_0 (j, j + 16) where pairs are wanted", halves
        pairs = groups.reshape(len(x), -1, 16, 2).swapaxes(2, 3).reshape(x.shape)
        yield "nibbles in pairs where the order of Q4_0 (j, j + 16) is wanted", pairs
    if isinstance(a, Int4 | Q4):
        signed = signed_steps(a)
        for offset in (7, 0):
            yield f"codes less {offset}, not less 8", x + (8 - offset) * signed
    cfg = ours.cfg
    if module.endswith("kv_b_proj"):
        H, N = cfg.num_attention_heads, cfg.qk_nope_head_dim
        by_head = x.reshape(H, -1, x.shape[1]).copy()
        keys = by_head[:, :N]
        by_head[:, :N] = keys.transpose(0, 2, 1).reshape(keys.shape)
        yield "attn_k_b read without its transposition", by_head.reshape(x.shape)
    for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if module.endswith(one):
            twin = module.removesuffix(one) + other
            yield f"it is {other}: gate and up are swapped", dequantize(_of(ours, twin), np.float64)
    if x.ndim == 2 and not len(x) % 2:
        rows = x.reshape(2, len(x) // 2, -1)
        yield "rows of both halves interleaved", rows.swapaxes(0, 1).reshape(x.shape)
        rows = x.reshape(len(x) // 2, 2, -1)
        yield "even rows before odd ones", rows.swapaxes(0, 1).reshape(x.shape)
        yield "rows in pairs, each pair turned", rows[:, ::-1].reshape(x.shape)
    if x.ndim == 2 and x.shape[0] == x.shape[1]:
        yield "transposed", x.T


def as_json(found: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "tensors": [v._asdict() for v in found],
        "ok": all(v.verdict != "wrong" for v in found),
    }


# --- expect


def rounder(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """float32 [O, I] → the values that this format would keep of it."""
    if kind not in FORMATS:
        raise InputError(f"format {kind!r}; supported: {', '.join(FORMATS)}")
    simple: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "bf16": round_bf16,
        "f16": lambda w: w.astype(np.float16).astype(np.float32),
        "q8_0": lambda w: dequantize(quantize_q8(w)),
        "int4": lambda w: dequantize(Int4(*pack_int4(w))),
        "int4-7.5": lambda w: dequantize(Int4(*pack_int4(w, 7.5))),
        "fp8": lambda w: dequantize(Fp8Block(*pack_fp8(w, (128, 128)), (128, 128))),
    }
    if kind in simple:
        return simple[kind]
    which = library(f"the format {kind}").GGMLQuantizationType[kind.upper()]
    quants = importlib.import_module("gguf.quants")
    return lambda w: quants.dequantize(quants.quantize(w, which), which)


class Cost(NamedTuple):
    tensors: list[dict[str, Any]]  # name, rel_rms
    kl_mean: float
    kl_p99: float
    top1_agree: float

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def expect(
    model: Model,
    kind: str,
    tokens: Sequence[int],
    experts_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Cost:
    """Every matrix in this format (or the routed experts alone), and the same text through both.

    Matrices whose rows are no whole groups of 32, router, norms and embedding stay as they are;
    experts that the text does not reach are not listed. A matrix is rounded when it is multiplied
    by, a tile of rows at a time, an expert when it is chosen: nothing rounded is kept.
    `progress(done, of)` is called after each layer of the two passes.
    """
    if progress is not None and model.nx.watch is None:
        model = model.using(model.nx.watching(_Layers(progress, 2 * model.cfg.num_hidden_layers)))
    cost = _Rounding(rounder(kind))

    def expert(i: int, e: int) -> MlpWeights:
        at = f"model.layers.{i}.mlp.experts.{e}."
        w = model.decoder.experts(i, e)
        return MlpWeights(*(cost.whole(at + n, m) for n, m in w._asdict().items()))

    # all chosen experts at once, as the fused twin takes them, are too many in float32
    nx = replace(model.nx, experts=routed_experts)
    nx = nx if experts_only else cost.numerics(nx, model.decoder)
    quantised = replace(model.decoder, experts=expert, nx=nx)
    p, q = (d.logits(tokens) for d in (model.decoder, quantised))
    kl, agree = [], []
    for row, other in zip(p, q, strict=True):
        a, b = _log_softmax(row), _log_softmax(other)
        kl.append((np.exp(a) * (a - b)).sum())
        agree.append(a.argmax() == b.argmax())
    tensors = [{"name": name, "rel_rms": off} for name, off in cost.off_by.items()]
    return Cost(tensors, float(np.mean(kl)), float(np.quantile(kl, 0.99)), float(np.mean(agree)))


@dataclass
class _Layers:
    """A watcher that counts them."""

    progress: Callable[[int, int], None]
    of: int
    done: int = 0

    def wants(self, path: str) -> bool:
        return re.fullmatch(r"model\.layers\.\d+", path) is not None

    def __call__(self, _: str, x: np.ndarray) -> np.ndarray:
        self.done += 1
        self.progress(self.done, self.of)
        return x


@dataclass
class _Rounding:
    """Matrices in another format, and how far off each was when it was last used."""

    keep: Callable[[np.ndarray], np.ndarray]
    off_by: dict[str, float] = field(default_factory=dict)

    def pieces(self, name: str, m: Matrix) -> Iterator[tuple[slice, np.ndarray]]:
        """Tiles of the rounded rows in float32. A format's blocks may be of 128 rows."""
        unit = lcm(128, m.block[0]) if isinstance(m, Fp8Block) else 128
        m = dequantize(m) if isinstance(m, Heads) else m  # its rows are columns
        square = off = 0.0
        step = unit * max(1, TILE // (unit * m.shape[1]))
        for start in range(0, m.shape[0], step):
            tile = slice(start, min(start + step, m.shape[0]))
            w = dequantize(rows(m, tile))
            kept = self.keep(w)
            square += float((w.astype(np.float64) ** 2).sum())
            off += float(((kept.astype(np.float64) - w) ** 2).sum())
            yield tile, kept
        self.off_by[name] = float(np.sqrt(off / square)) if square else 0.0

    def whole(self, name: str, m: Matrix) -> Matrix:
        if m.shape[1] % 32:
            return m
        out = np.empty(m.shape, np.float32)
        for tile, kept in self.pieces(name, m):
            out[tile] = kept
        return out

    def numerics(self, nx: Numerics, decoder: Decoder) -> Numerics:
        """Under which this decoder's dense matrices are rounded when they are used."""
        names: dict[int, str] = {}

        def note(name: str, m: Matrix) -> Matrix:
            names[id(m)] = name
            return m

        replaced(decoder, note)

        def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
            if id(m) not in names:
                return nx.linear(x, m)
            y = np.empty((len(x), m.shape[0]), x.dtype)
            for tile, kept in self.pieces(names[id(m)], m):
                y[:, tile] = nx.linear(x, kept)
            return y

        def absorbed(
            q_nope: np.ndarray, q_pe: np.ndarray, kv_b_proj: Matrix, *rest: Any
        ) -> np.ndarray:
            name = names.get(id(kv_b_proj))
            kept = kv_b_proj if name is None else self.whole(name, kv_b_proj)
            return nx.absorbed(q_nope, q_pe, kept, *rest)

        return replace(nx, linear=linear, absorbed=absorbed)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
