"""Measure each stored format's kernel beside the rate of plain reading."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.fast.linear import Inputs, kernel_view, multiply
from refmoe.model import matrix
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix
from refmoe.run.bench import base
from refmoe.run.bench.base import Stream, describe_machine, relative_error, time_call
from refmoe.run.export import int4_to_q4

NAMES = ("bf16", "q8", "int4-fast", "int4-exact", "q4-fast", "q4", "fp8", "f16", "f32")
SHAPES = ((2048, 7168), (7168, 2048))  # K2's experts: gate and up, down
EIGHT = 8  # matrices at once, as many as a token has experts
ROWS = 128  # of which the error is measured


def draw(name: str, O: int, I: int, rng: np.random.Generator) -> Matrix:
    """Return a random matrix [O, I] in the format of one of `NAMES`."""
    if name.startswith("q4"):
        m = draw("int4", O, I, rng)
        assert isinstance(m, Int4)
        return int4_to_q4(m)
    if name.startswith("int4"):
        packed = rng.integers(-(2**31), 2**31, (O, I // 8), np.int32)
        scale = rng.uniform(0.5, 1, (O, I // 32)).astype(np.float32).view(np.uint32) >> 16
        return Int4(packed, scale.astype(np.uint16))
    if name == "fp8":
        finite = np.flatnonzero(np.isfinite(E4M3)).astype(np.uint8)
        scale = rng.uniform(0.5, 1, (-(-O // 128), -(-I // 128))).astype(np.float32)
        return Fp8Block(finite[rng.integers(0, len(finite), (O, I), np.uint8)], scale, (128, 128))
    w = rng.standard_normal((O, I), np.float32)
    if name == "bf16":
        return BF16((w.view(np.uint32) >> 16).astype(np.uint16))
    if name == "q8":
        return Q8.quantize(w)
    return w.astype(np.float16) if name == "f16" else w


def measure_kernels(
    names: Sequence[str] = NAMES,
    counts: Sequence[int] = (),
    tokens: Sequence[int] = (1, 4),
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> dict[str, Any]:
    """Measure each format, shape, number of tokens and of threads → a document with a row each.

    `counts` are numbers of threads; none: one, and all there are.
    """
    counts = list(counts) or sorted({1, threads.available()})
    rng = np.random.default_rng(0)
    streams: dict[int, Stream] = {}
    for count in counts:
        threads.use(count)
        streams[count] = Stream()
    rows: list[dict[str, Any]] = []
    for name in names:
        for O, I in shapes:
            each = [draw(name, O, I, rng) for _ in range(EIGHT)]
            for T in tokens:
                x = rng.standard_normal((T, I)).astype(np.float32)
                few = matrix.rows(each[0], slice(0, ROWS))
                known = kernel_view(few, fast=name.endswith("-fast"))
                assert known is not None
                error = relative_error(multiply([(Inputs(x), known)])[0], x, few)
                for count in counts:
                    threads.use(count)
                    rates, ratios = _rates(name, each, x, streams[count])
                    shape = {"rows": O, "cols": I, "tokens": T}
                    row: dict[str, Any] = {"name": name, "format": _format(each[0])}
                    row |= {"threads": count, **shape}
                    middle, best = float(np.median(rates)), max(rates)
                    row |= {"gbs": middle, "gbs_best": best, "ratio": float(np.median(ratios))}
                    rows.append({**row, "rel_error": error})
    threads.use(threads.available())
    reading = {str(count): s.rate for count, s in streams.items()}
    return {"machine": describe_machine(), "stream_gbs": reading, "kernels": rows}


def _format(m: Matrix) -> str:
    return m.dtype.name if isinstance(m, np.ndarray) else type(m).__name__


def _rates(
    name: str, each: Sequence[Matrix], x: np.ndarray, stream: Stream
) -> tuple[list[float], list[float]]:
    """Measure rates in GB/s of weights, and each one's ratio to that of reading."""
    known = [kernel_view(m, fast=name.endswith("-fast")) for m in each]
    here = [m for m in known if m is not None]
    nbytes = sum(m.nbytes for m in each)
    rates: list[float] = []

    def run() -> float:
        inputs = Inputs(x)
        rates.append(nbytes / time_call(lambda: multiply([(inputs, m) for m in here])) / 1e9)
        return rates[-1]

    run()
    stream.measure()
    rates.clear()
    return rates, [stream.compare(run) for _ in range(base.ROUNDS)]


def format_kernels(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_kernels` to people."""
    out = [document["machine"]]
    for count, rate in document["stream_gbs"].items():
        out.append(f"{count} threads read {rate:.1f} GB/s")
    out.append(f"{'kernel':<12}{'rows':>6}{'cols':>6}{'tokens':>8}{'threads':>8}")
    out[-1] += f"{'GB/s':>8}{'ratio':>7}  rel error"
    for r in document["kernels"]:
        shape = f"{r['rows']:>6}{r['cols']:>6}{r['tokens']:>8}{r['threads']:>8}"
        rest = f"{r['gbs']:>8.1f}{r['ratio']:>7.2f}  {r['rel_error']:.1e}"
        out.append(f"{r['name']:<12}{shape}{rest}")
    return out
