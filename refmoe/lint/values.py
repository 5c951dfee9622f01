"""Check the values of plain tensors."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from refmoe.lint.base import TILE, _Findings, _of, _same_bytes, _watched
from refmoe.lint.fp8 import _fp8
from refmoe.lint.int4 import Int4Facts, _int4, _q4_0
from refmoe.lint.matrices import _label, _named
from refmoe.weights.checkpoint import (
    Checkpoint,
    known_extra,
    tensor_class,
)


class Bits(NamedTuple):
    """A float format by the bits of its magnitude."""

    dtype: Any
    infinity: int  # from here on not finite
    normal: int  # the least that is not subnormal


BITS = {
    "F64": Bits(np.uint64, 0x7FF << 52, 1 << 52),
    "F32": Bits(np.uint32, 0xFF << 23, 1 << 23),
    "F16": Bits(np.uint16, 0x1F << 10, 1 << 10),
    "BF16": Bits(np.uint16, 0xFF << 7, 1 << 7),
    "F8_E5M2": Bits(np.uint8, 0x1F << 2, 1 << 2),
    "F8_E4M3": Bits(np.uint8, 0x7F, 1 << 3),
}
MANY_SUBNORMAL = 0.1


@dataclass
class Scan:
    n: int = 0
    nonfinite: int = 0
    first: int = -1  # flat index of the first that is not finite
    zeros: int = 0
    subnormal: int = 0


def _scan(x: np.ndarray, bits: Bits) -> Scan:
    """Kinds of numbers in a tensor, by integer operations on pieces of it."""
    out, flat = Scan(), x.reshape(-1).view(bits.dtype)
    magnitude = np.iinfo(bits.dtype).max >> 1
    for start in range(0, len(flat), TILE):
        m = flat[start : start + TILE] & bits.dtype(magnitude)
        bad = m >= bits.dtype(bits.infinity)
        count = int(np.count_nonzero(bad))
        if count and out.first < 0:
            out.first = start + int(bad.argmax())
        zeros = len(m) - int(np.count_nonzero(m))
        out.n += len(m)
        out.nonfinite += count
        out.zeros += zeros
        out.subnormal += int(np.count_nonzero(m < bits.dtype(bits.normal))) - zeros
    return out


def _values(checkpoint: Checkpoint, fit: list[str], out: _Findings) -> None:
    """Read every tensor once; those that do not fit the config as plain numbers."""
    tensors = checkpoint.tensors
    prints: dict[bytes, str] = {}
    packed: dict[str, Int4Facts] = {}
    ok = set(fit)
    for name in _watched(tensors, lambda name: tensors[name].nbytes):
        stored = tensors[name]
        if not stored.nbytes:
            continue
        x = checkpoint.array(name)
        if stored.dtype in BITS:
            _floats(name, x, checkpoint, out)
        if name not in ok:
            continue
        if name.endswith(".weight_packed") and name.replace("_packed", "_scale") in ok:
            _int4(name, checkpoint, packed, out)
        if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in ok:
            _fp8(name, checkpoint, out)
        if tensor_class(name, checkpoint.cfg) == "norms":
            _gain(name, checkpoint, out)
        _copies(name, x, checkpoint, prints, out)
    for kind, facts in packed.items():
        facts.note(kind, out)
    _q4_0(list(packed.values()), out)


def _floats(name: str, x: np.ndarray, checkpoint: Checkpoint, out: _Findings) -> None:
    stored, label = checkpoint.tensors[name], _label(checkpoint, name)
    seen = _scan(x, BITS[stored.dtype])
    if seen.nonfinite:
        at = [int(i) for i in np.unravel_index(seen.first, stored.shape)]
        what = "NaN codes" if stored.dtype == "F8_E4M3" else "values that are not finite"
        text = f"{seen.nonfinite:,} {what}, first at {at}"
        out.add("error", "not finite", label, text, seen.nonfinite)
    if seen.zeros == seen.n:
        bias = name.endswith(("e_score_correction_bias", ".bias"))
        mild = bias or known_extra(name, checkpoint.cfg)
        text = "all zero: never written or never loaded?"
        out.add("warning" if mild else "error", "all zero", label, text)
    # subnormal e4m3 is what a block with an outlier looks like
    elif stored.dtype != "F8_E4M3" and seen.subnormal > MANY_SUBNORMAL * seen.n:
        text = f"{_of(seen.subnormal, seen.n)} of its values are subnormal: another dtype's bytes?"
        out.add("warning", "subnormal", label, text, seen.subnormal)


def _gain(name: str, checkpoint: Checkpoint, out: _Findings) -> None:
    """A norm's gains: trained ones vary and, but for a few, are positive."""
    w, label = _named(checkpoint, name), _label(checkpoint, name)
    if len(w) < 8 or not np.isfinite(w).all() or not w.any():
        return
    if (w == w[0]).all():
        text = f"every gain is {w[0]:g}: the initial value, never loaded?"
        out.add("warning", "norms", label, text)
    elif abs(np.median(w)) < 0.05 and 0.2 < np.mean(w < 0) < 0.8:
        text = f"gains lie around 0 (median {np.median(w):.2g}): stored less 1, as x·(1 + w) wants?"
        out.add("warning", "norms", label, text)


def _copies(
    name: str, x: np.ndarray, checkpoint: Checkpoint, prints: dict[bytes, str], out: _Findings
) -> None:
    """Two tensors of the graph with the same bytes: trained ones are never alike."""
    raw = x.reshape(-1).view(np.uint8)
    if len(raw) < 64:
        return
    n, size = len(raw), x.itemsize
    middle = n // 2 // size * size
    pieces = [raw[:4096], raw[middle : middle + 4096], raw[max(0, n - 4096) :]]
    if all(len(np.unique(p[: len(p) // size * size].view(x.dtype))) == 1 for p in pieces):
        return  # constant: zeros, initial gains
    seen = blake2b(b"".join(p.tobytes() for p in pieces) + str((n, x.dtype)).encode()).digest()
    other = prints.setdefault(seen, name)
    if other != name and _same_bytes(x, checkpoint.array(other)):
        text = f"the same bytes as {_label(checkpoint, other)}"
        out.add("warning", "copies", _label(checkpoint, name), text)
