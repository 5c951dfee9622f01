"""Read the codes and scales of INT4 matrices."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from refmoe.lint.base import TILE, Place
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import tiles, widen_bf16
from refmoe.weights.checkpoint import Checkpoint

ZERO_CODES = 0x88888888  # a word whose eight nibbles are 8, the code of 0
FLOAT16_NORMAL = 2.0**-14  # the least float16 that is not subnormal


@dataclass
class Int4Matrix:
    """The codes and scales of one matrix, counted by groups of 32."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    packed: str  # names that the file has
    scale: str
    groups: int = 0
    unwritten: int = 0  # groups with every code -8: bytes that nobody wrote
    lost: int = 0  # groups with codes other than 0 and a scale of 0
    negative: int = 0  # scales
    beyond: int = 0  # scales that float16 cannot hold, being too large
    inexact: int = 0  # scales that float16 changes, those included
    subnormal: int = 0  # scales that are subnormal in float16, exact or not
    least: float = np.inf  # |scale|
    largest: float = 0.0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # two codes each
    shape: tuple[int, ...] = ()
    shape_name: str | None = None  # of weight_shape
    shape_told: list[int] = field(default_factory=list)  # by weight_shape


@dataclass
class Int4Kind:
    """The codes and scales of one kind of matrix, over all layers and experts."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    kind: str  # module with * for numbers
    tensors: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    least: float = np.inf
    largest: float = 0.0
    inexact: int = 0
    subnormal: int = 0

    def add(self, m: Int4Matrix) -> None:
        """Count one more matrix of this kind."""
        self.tensors += 1
        self.bytes += m.bytes
        self.least, self.largest = min(self.least, m.least), max(self.largest, m.largest)
        self.inexact += m.inexact
        self.subnormal += m.subnormal

    @property
    def codes(self) -> np.ndarray:
        """How often each code is used, from -8 to 7."""
        return count_codes(self.bytes)


@dataclass(frozen=True)
class AllInt4:
    """All kinds of INT4 matrices of a checkpoint; at least one."""

    places: ClassVar[tuple[Place, ...]] = ("folder",)
    kinds: list[Int4Kind]


def kind_of(module: str) -> str:
    """Return the name of a module with * for its layer and expert."""
    return re.sub(r"\.\d+\.", ".*.", module)


def read_int4(name: str, checkpoint: Checkpoint) -> Int4Matrix:
    """Count the codes and scales of the matrix whose `weight_packed` is called `name`."""
    module = name.removesuffix(".weight_packed")
    tensors = checkpoint.tensors
    out = Int4Matrix(tensors[name].name, tensors[module + ".weight_scale"].name)
    m = Int4(checkpoint.array(name), checkpoint.array(module + ".weight_scale"))
    out.groups, out.shape = m.scale.size, m.shape
    for _, tile in tiles(m, TILE):
        assert isinstance(tile, Int4)
        O, G = tile.scale.shape
        words = np.ascontiguousarray(tile.packed).reshape(O, G, -1)
        s = widen_bf16(tile.scale)
        out.bytes += histogram(words)
        out.unwritten += int(np.count_nonzero(~words.any(axis=-1)))
        if not s.all():
            coded = (words.view(np.uint32) != ZERO_CODES).any(axis=-1)
            out.lost += int(np.count_nonzero((s == 0) & coded))
        out.negative += int(np.count_nonzero((s < 0) & np.isfinite(s)))
        size = np.abs(s[np.isfinite(s)])
        with np.errstate(over="ignore"):
            half = size.astype(np.float16).astype(np.float32)
        out.inexact += int(np.count_nonzero(half != size))
        out.beyond += int(np.count_nonzero(half == np.inf))
        out.subnormal += int(np.count_nonzero((size > 0) & (size < FLOAT16_NORMAL)))
        out.least = min(out.least, float(size.min(initial=np.inf)))
        out.largest = max(out.largest, float(size.max(initial=0)))
    if shape := tensors.get(module + ".weight_shape"):
        out.shape_name = shape.name
        out.shape_told = checkpoint.array(module + ".weight_shape").tolist()
    return out


def histogram(x: np.ndarray) -> np.ndarray:
    """Return how often each byte occurs [256]; counts pairs of bytes, which halves the time."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    pairs = np.bincount(flat[: len(flat) & ~1].view(np.uint16), minlength=1 << 16)
    two = pairs.reshape(256, 256)
    out = two.sum(axis=0) + two.sum(axis=1)
    if len(flat) & 1:
        out[flat[-1]] += 1
    return out


def count_codes(byte_counts: np.ndarray) -> np.ndarray:
    """Return how often each nibble occurs [16] in bytes that hold two."""
    two = byte_counts.reshape(16, 16)
    return two.sum(axis=0) + two.sum(axis=1)
