"""Check FP8 matrices."""

from math import sqrt

import numpy as np

from refmoe.lint.base import _Findings
from refmoe.lint.int4 import _histogram
from refmoe.model.formats.fp8_block import E4M3
from refmoe.weights.checkpoint import (
    Checkpoint,
)

# --- FP8

ABSURD, SANE = 100.0, 10.0  # RMS of a weight


def _fp8(name: str, checkpoint: Checkpoint, out: _Findings) -> None:
    """Block scales: positive, and the right way up."""
    stored, weight = checkpoint.tensors[name], name.removesuffix("_scale_inv")
    if checkpoint.tensors[weight].dtype != "F8_E4M3":
        return
    s = np.asarray(checkpoint.array(name), np.float64)  # not finite: found among all floats
    for count, what in (
        (int((s == 0).sum()), "0"),
        (int(((s < 0) & np.isfinite(s)).sum()), "negative"),
    ):
        if count:
            text = f"{count:,} of {s.size:,} block scales are {what}"
            out.add("error", f"block scales {what}", stored.name, text, count / s.size)
    good = s[np.isfinite(s) & (s > 0)]
    if not good.size:
        return
    bits = checkpoint.array(weight)
    hist = sum(_histogram(bits[i : i + 1024]) for i in range(0, len(bits), 1024))
    squares = np.nan_to_num(E4M3.astype(np.float64)) ** 2
    code = sqrt(float((hist * squares).sum()) / bits.size)
    up, down = (code * sqrt(float((scale**2).mean())) for scale in (good, 1 / good))
    if up > ABSURD and down < SANE:
        text = f"weights have RMS {up:.2g} times the scale, {down:.2g} divided by it: inverted?"
        out.add("error", "inverted scales", stored.name, text, up)
