"""Tiled: a matrix that is read a few rows at a time, because it would not fit."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refmoe.model.matrix import dequantize


class Tiled(NamedTuple):
    """A matrix in tiles of whole rows. A tile becomes invalid when the next one is asked for."""

    shape: tuple[int, ...]
    nbytes: int  # of all tiles
    tiles: Callable[[], Iterator[tuple[slice, Any]]]  # rows, Matrix

    @property
    def format(self) -> str:
        return "tiled"

    @property
    def unit(self) -> int:
        return 0  # it has tiles of its own

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Read and decode all tiles."""
        w = np.empty(self.shape, dtype)
        for block, tile in self.tiles():
            w[block] = dequantize(tile, dtype, rounded)
        return w

    def rows(self, index: Any) -> np.ndarray:
        """Return some rows, decoded: this reads all tiles."""
        return self.dequantize(np.float32)[index]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the decoded values: no array holds the stored ones."""
        return {"values": self.dequantize(np.float32)}
