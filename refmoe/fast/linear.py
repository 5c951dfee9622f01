"""The engine's own Numerics: the definition's mathematics with quicker seams.

`linear` dequantises a large matrix in tiles of whole rows, so that no second copy of it is ever
made (the head of K2 would be 4.7 GB in float32) and a tile is multiplied while it is in cache.
Its twin is `refmoe.model.matrix.linear`.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from refmoe.config import Conventions
from refmoe.model import matrix
from refmoe.model.decoder import policy
from refmoe.model.matrix import Matrix
from refmoe.model.numerics import Numerics

TILE = 1 << 20  # elements: 4 MB of float32


def linear(x: np.ndarray, m: Matrix, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """y = x Wᵀ: x [T, I] → [T, O]."""
    if isinstance(m, np.ndarray) and m.dtype == x.dtype:
        return x @ m.T
    y = np.empty((len(x), m.shape[0]), x.dtype)
    for block, tile in matrix.tiles(m, TILE):
        y[:, block] = matrix.linear(x, tile, rounded)
    return y


def engine(name: str, conventions: Conventions | str = "refmoe") -> Numerics:
    """`policy(name)` with this room's seams."""
    nx = policy(name, conventions)
    return replace(nx, linear=partial(linear, rounded=nx.conventions.rounded_products))
