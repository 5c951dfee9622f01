"""The definition's products, with the same bits for any number of threads.

    linear     rows of the weights in tiles, which threads share; each tile is one thread's
    expanded   attention by its definition, in one BLAS thread
    absorbed   likewise

BLAS by itself divides a product among its threads, and on many processors adds in another order for
another number of them. Here each product that BLAS sees is one thread's, and its size depends on
the weights and the rows of x alone. Nothing in this file needs Numba. Twins: `matrix.linear`,
`mla.expanded` and `mla.absorbed`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from refmoe.engines import Conventions
from refmoe.fast import threads
from refmoe.fast.threads import single_blas_thread
from refmoe.model import matrix, mla
from refmoe.model.decoder import policy
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix
from refmoe.model.numerics import Numerics

TILE = 1 << 20  # elements that a thread takes at a time: 8 MB of float64


def reproducible_policy(name: str, conventions: Conventions | str = "refmoe") -> Numerics:
    """Return `policy(name)` with operations whose bits no number of threads changes.

    Raises `InputError` for an unknown precision or engine.
    """
    nx = policy(name, conventions)
    own = partial(linear, rounded=nx.conventions.rounded_products)
    return replace(nx, linear=own, gate=linear, expanded=expanded, absorbed=absorbed)


def linear(x: np.ndarray, m: Matrix, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """Return y = x Wᵀ by the definition, tile by tile: x [T, I] → [T, O]."""
    if _is_one_tile(m):
        with single_blas_thread():
            return matrix.linear(x, m, rounded)
    y = np.empty((len(x), m.shape[0]), x.dtype)

    def multiply(rows: slice, tile: Matrix) -> None:
        y[:, rows] = matrix.linear(x, tile, rounded)

    for_each_tile(m, multiply)
    return y


def for_each_tile(m: Matrix, work: Callable[[slice, Matrix], None]) -> None:
    """Call work(rows, these rows of the matrix) for all tiles: in any order, several at once.

    BLAS uses one thread in each call.
    """
    with single_blas_thread():
        if _is_one_tile(m):
            work(slice(0, m.shape[0]), m)
        elif isinstance(m, Tiled):  # each tile becomes invalid when the next one is asked for
            for rows, tile in m.tiles():
                _share(tile, rows.start, work)
        else:
            _share(m, 0, work)


def _is_one_tile(m: Matrix) -> bool:
    """Tell whether a matrix is small, or its rows lie in two places: then nothing is shared."""
    if isinstance(m, Tiled):
        return False
    return isinstance(m, Heads) or m.shape[0] * m.shape[1] <= TILE


def _share(m: Matrix, first: int, work: Callable[[slice, Matrix], None]) -> None:
    """Have the threads share the tiles of a matrix whose row 0 is number `first` to `work`."""
    pieces = [
        partial(work, slice(first + rows.start, first + rows.stop), tile)
        for rows, tile in matrix.tiles(m, TILE)
    ]
    threads.pool().run(pieces)


expanded = single_blas_thread()(mla.expanded)
absorbed = single_blas_thread()(mla.absorbed)
