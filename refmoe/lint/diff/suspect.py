"""Hold two matrices that differ so that a mistake can be tried on the first."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.lint.diff.weights import half_step, half_unit, same_format
from refmoe.lint.matrices import widen
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.matrix import Matrix
from refmoe.weights.checkpoint import Checkpoint


class Cause(NamedTuple):
    """The mistake that turns the first matrix into the second."""

    category: str  # the same for one mistake, whatever numbers its text has
    text: str


class Seen(NamedTuple):
    """Values, and how far the numbers meant may be from each."""

    values: np.ndarray
    bound: np.ndarray

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Seen":
        """Return them in another order or shape."""
        return Seen(move(self.values), move(self.bound))

    def is_(self, other: "Seen") -> bool:
        """Return whether both may have been made of the same numbers."""
        if self.values.shape != other.values.shape:
            return False
        return bool((np.abs(self.values - other.values) <= self.bound + other.bound).all())

    def off(self, other: "Seen") -> float:
        """Return Σ(self - other)² / Σ self²; infinite if the shapes differ."""
        if self.values.shape != other.values.shape:
            return np.inf
        square = float((self.values**2).sum())
        away = float(((self.values - other.values) ** 2).sum())
        return away / square if square > 0 and np.isfinite(away) else np.inf


@dataclass(frozen=True)
class Suspect:
    """Two matrices of one key that do not hold the same weights."""

    key: str
    ours: Checkpoint
    a: Matrix  # ours, taken to be right
    b: Matrix
    x: Seen = field(init=False)
    y: Seen = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", see(self.a, self.b))
        object.__setattr__(self, "y", see(self.b, self.a))

    @property
    def cfg(self) -> Config:
        """The settings of our checkpoint."""
        return self.ours.cfg


def see(m: Matrix, other: Matrix) -> Seen:
    """Return the values of a matrix with the rounding that a mistake may hide behind.

    Between two matrices in one format that is the rounding of scales, not of codes.
    """
    w = widen(m)
    bound = half_unit(m, w)
    if not _one_grid(m, other):
        bound = bound + half_step(m, w, w)
    elif not isinstance(m, BF16 | np.ndarray):
        unit = {Int4: 2.0**-8, Fp8Block: 2.0**-24}.get(type(m), 2.0**-11)
        bound = bound + unit * np.abs(w)
    return Seen(w, np.broadcast_to(bound, w.shape))


def _one_grid(a: Matrix, b: Matrix) -> bool:
    """Return whether two matrices have codes of one kind, whose scales alone may be rounded."""
    return same_format(a, b) or (isinstance(a, Int4 | Q4) and isinstance(b, Int4 | Q4))
