"""Say whether two checkpoints hold the same weights."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.lint.diff.tile import TILE
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, dequantize, tiles
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.gguf import opened

LOOSE = 0.35  # of the RMS: two-bit formats are off by a quarter


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
