"""Measure how fast memory is read, and time a function."""

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from refmoe.fast import threads
from refmoe.fast.kernels import VNNI, kernel
from refmoe.fast.linear import Inputs, kernel_view, multiply
from refmoe.model import matrix
from refmoe.model.matrix import (
    Matrix,
    dequantize,
)

READ = 1 << 29  # bytes: far beyond any cache
ROUNDS = 15


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    form = "AVX-512 VNNI" if VNNI else "plain vectors"
    return f"{model}, {threads.pool().threads} threads, {form}, Numba {numba.__version__}"


@kernel
def _read(words):  # type: ignore
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


class Stream:
    """The rate at which this many threads read memory, in GB/s."""

    def __init__(self) -> None:
        words = np.ones(READ // 8, np.uint64)
        read: Any = _read
        self.nbytes, self.rates = words.nbytes, [0.0]
        self.pieces = [partial(read, part) for part in np.split(words, 64)]
        threads.pool().run(self.pieces[:1])  # compiled
        self.rates = [self.measure()]

    def measure(self) -> float:
        rate = self.nbytes / timed(partial(threads.pool().run, self.pieces)) / 1e9
        self.rates.append(rate)
        return rate

    def beside(self, run: Callable[[], float]) -> float:
        """`run`'s rate over that of reading before and after it."""
        before = self.rates[-1]
        rate = run()
        return 2 * rate / (before + self.measure())

    @property
    def rate(self) -> float:
        return float(np.median(self.rates))


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _relative_error(name: str, m: Matrix, x: np.ndarray) -> float:
    """RMS against float64 over 128 rows."""
    few = matrix.rows(m, slice(0, 128))
    known = kernel_view(few, fast=name.endswith("-fast"))
    assert known is not None
    (y,) = multiply([(Inputs(x), known)])
    truth = x.astype(np.float64) @ dequantize(few, np.float64).T
    return float(np.sqrt(((y - truth) ** 2).mean() / (truth**2).mean()))
