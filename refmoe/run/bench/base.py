"""Time functions, and measure the rate at which memory is read meanwhile.

Rates of a shared machine change by half from one second to the next. So reading and measuring take
turns, a ratio is of neighbours, and the middle one of all ratios counts; rates are the middle ones
too, and the best is given beside them. Reading adds up 64-bit words, which the compiler makes as
wide as the machine.
"""

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
from refmoe.model.matrix import Matrix, dequantize

READ = 1 << 29  # bytes: far beyond any cache
ROUNDS = 15  # measurements whose middle one counts


def describe_machine() -> str:
    """Return the processor, the threads in use, the form of the kernels, and Numba's version."""
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
    """Measures the rate, in GB/s, at which the threads in use read memory."""

    def __init__(self) -> None:
        words = np.ones(READ // 8, np.uint64)
        read: Any = _read
        self.nbytes, self.rates = words.nbytes, [0.0]
        self.pieces = [partial(read, part) for part in np.split(words, 64)]
        threads.pool().run(self.pieces[:1])  # compiled
        self.rates = [self.measure()]

    def measure(self) -> float:
        """Read once, and return and keep the rate."""
        rate = self.nbytes / time_call(partial(threads.pool().run, self.pieces)) / 1e9
        self.rates.append(rate)
        return rate

    def compare(self, run: Callable[[], float]) -> float:
        """Return the rate that `run` returns over that of reading before and after it."""
        before = self.rates[-1]
        rate = run()
        return 2 * rate / (before + self.measure())

    @property
    def rate(self) -> float:
        """The middle one of all rates so far."""
        return float(np.median(self.rates))


def time_call(run: Callable[[], Any]) -> float:
    """Call a function and return the seconds that it took."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def relative_error(y: np.ndarray, x: np.ndarray, m: Matrix) -> float:
    """Return the RMS error of y [T, O] against float64's x [T, I] times m [O, I], over its RMS."""
    truth = x.astype(np.float64) @ dequantize(m, np.float64).T
    return float(np.sqrt(((y - truth) ** 2).mean() / (truth**2).mean()))
