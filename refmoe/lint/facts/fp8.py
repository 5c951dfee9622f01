"""Read the block scales of FP8 matrices."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np

from refmoe.lint.base import Place
from refmoe.lint.facts.int4 import histogram
from refmoe.model.formats.fp8_block import E4M3
from refmoe.weights.checkpoint import Checkpoint

ROWS = 1024  # of codes that are counted at a time


@dataclass(frozen=True)
class Fp8Matrix:
    """The block scales of one matrix, and its RMS read both ways up."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    scale: str  # name that the file has
    blocks: int
    zero: int  # scales
    negative: int
    times: float  # RMS of code · scale; 0 if no scale is positive and finite
    divided: float  # RMS of code / scale


def read_fp8(name: str, checkpoint: Checkpoint) -> Fp8Matrix | None:
    """Read the matrix whose `weight_scale_inv` is called `name`; None if it is not in e4m3."""
    stored, weight = checkpoint.tensors[name], name.removesuffix("_scale_inv")
    if checkpoint.tensors[weight].dtype != "F8_E4M3":
        return None
    s = np.asarray(checkpoint.array(name), np.float64)
    zero, negative = int((s == 0).sum()), int(((s < 0) & np.isfinite(s)).sum())
    good = s[np.isfinite(s) & (s > 0)]
    times = divided = 0.0
    if good.size:
        bits = checkpoint.array(weight)
        counts = sum(histogram(bits[i : i + ROWS]) for i in range(0, len(bits), ROWS))
        squares = np.nan_to_num(E4M3.astype(np.float64)) ** 2
        code = sqrt(float((counts * squares).sum()) / bits.size)
        times, divided = (code * sqrt(float((each**2).mean())) for each in (good, 1 / good))
    return Fp8Matrix(stored.name, s.size, zero, negative, times, divided)
