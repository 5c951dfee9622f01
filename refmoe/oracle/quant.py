"""Measure what storing a model in a format costs: `refmoe quant expect`.

    per tensor    √(Σ(q(w) - w)² / Σw²), the relative RMS error of rounding a matrix w to q(w)
    end to end    KL(P‖Q) = Σ p·(ln p - ln q) nats a position: how far the next-token probabilities
                  Q of the rounded model are from those of the model as it is, P, in its own
                  numerics (float64 from the command line); and how often the likeliest token stays

Whether two files hold the same weights is decided in lint/diff/.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
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

TILE = 1 << 20  # elements of a matrix that are rounded at a time
FORMATS = ("bf16", "f16", "q8_0", "int4", "int4-7.5", "fp8", "q4_0", "q4_1", "q5_0", "q5_1")

GROUP = 32  # columns that share a scale in INT4 and in a GGUF's blocks
FP8_BLOCK = (128, 128)


def rounder(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that rounds float32 [O, I] to the values that a format can hold.

    Raises `InputError` for a format that is not in `FORMATS`, and for one that takes the gguf
    package where that is not installed.
    """
    if kind not in FORMATS:
        raise InputError(f"format {kind!r}; supported: {', '.join(FORMATS)}")
    simple: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "bf16": round_bf16,
        "f16": lambda w: w.astype(np.float16).astype(np.float32),
        "q8_0": lambda w: dequantize(Q8.quantize(w)),
        "int4": lambda w: dequantize(Int4(*pack_int4(w))),
        "int4-7.5": lambda w: dequantize(Int4(*pack_int4(w, 7.5))),
        "fp8": lambda w: dequantize(Fp8Block(*pack_fp8(w, FP8_BLOCK), FP8_BLOCK)),
    }
    if kind in simple:
        return simple[kind]
    which = library(f"the format {kind}").GGMLQuantizationType[kind.upper()]
    quants = importlib.import_module("gguf.quants")
    return lambda w: quants.dequantize(quants.quantize(w, which), which)


class Cost(NamedTuple):
    """The cost of a format, tensor by tensor and end to end."""

    tensors: list[dict[str, Any]]  # name, and rel_rms: the relative RMS error
    kl_mean: float  # nats a position
    kl_p99: float  # 99 % of positions are below
    top1_agree: float  # share of positions where the likeliest token stays

    def as_json(self) -> dict[str, Any]:
        """Return the document of `quant expect --json`."""
        return self._asdict()


@single_blas_thread()
def expect(
    model: Model,
    kind: str,
    tokens: Sequence[int],
    experts_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Cost:
    """Run a text through a model as it is and with its matrices rounded to a format.

    Matrices whose rows are no whole groups of 32, router, norms and embedding stay as they are.
    Experts that the text does not reach are not listed. A matrix is rounded at the moment it is
    used, a tile of rows at a time, and an expert when it is chosen: nothing rounded is kept.

    kind: one of `FORMATS`
    experts_only: round the routed experts alone
    progress: called with (layers done, layers in all) after each layer of the two passes
    """
    if progress is not None and model.nx.watch is None:
        model = model.using(
            model.nx.watching(_LayerCounter(progress, 2 * model.cfg.num_hidden_layers))
        )
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
class _LayerCounter:
    """A watcher that tells how many layers are done."""

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
    """Round matrices when they are used, and remember how far off each was the last time."""

    keep: Callable[[np.ndarray], np.ndarray]
    off_by: dict[str, float] = field(default_factory=dict)

    def pieces(self, name: str, m: Matrix) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield rounded rows in float32 with their place; a tile is of whole blocks of rows."""
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
        """Return a rounded matrix; one whose rows are no whole groups is returned as it is."""
        if m.shape[1] % GROUP:
            return m
        out = np.empty(m.shape, np.float32)
        for tile, kept in self.pieces(name, m):
            out[tile] = kept
        return out

    def numerics(self, nx: Numerics, decoder: Decoder) -> Numerics:
        """Return numerics whose products round the dense matrices of a decoder on use."""
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
    """Return ln of the softmax of each row, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
