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
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.lint.diff.tile import TILE
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MlpWeights, routed_experts
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, dequantize, round_bf16, rows
from refmoe.model.numerics import Numerics
from refmoe.run.load import Model
from refmoe.weights.dense import replaced
from refmoe.weights.gguf import library
from refmoe.weights.synthetic.random import pack_fp8, pack_int4

FORMATS = ("bf16", "f16", "q8_0", "int4", "int4-7.5", "fp8", "q4_0", "q4_1", "q5_0", "q5_1")


# --- expect


def rounder(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """float32 [O, I] → the values that this format would keep of it."""
    if kind not in FORMATS:
        raise InputError(f"format {kind!r}; supported: {', '.join(FORMATS)}")
    simple: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "bf16": round_bf16,
        "f16": lambda w: w.astype(np.float16).astype(np.float32),
        "q8_0": lambda w: dequantize(Q8.quantize(w)),
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
        w = model.decoder.experts[i](e)
        return MlpWeights(*(cost.whole(at + n, m) for n, m in w._asdict().items()))

    # all chosen experts at once, as the fused twin takes them, are too many in float32
    nx = replace(model.nx, experts=routed_experts)
    nx = nx if experts_only else cost.numerics(nx, model.decoder)
    quantised = model.decoder.with_experts(expert).using(nx)
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
