"""Record named points of one forward pass.

`trace` keeps what the watcher sees and hands it back unchanged; `write` puts it into a
safetensors file whose names are the points. Shapes have the rows first: [T, ...].

A *sketch* of a point is small whatever its width: for each row its RMS and its product with a
seeded random matrix. Two rows that differ by ε in relative RMS have sketches that differ by ε,
to within 1/√(2·64), 9 % (Johnson and Lindenstrauss 1984). With 65 numbers a row, it shows which
layer went wrong as well as the tensors themselves do.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError, write_atomically
from refmoe.run.load import Model

DIRECTIONS = 64  # of a sketch
COLUMNS = 1 << 14  # of the random matrix made at once


@single_blas_thread()
def sketch(name: str, x: np.ndarray) -> np.ndarray:
    """Return the sketch of x [T, ...] as [T, 1 + 64].

    Each row's RMS, then row · G / √n with n numbers in a row, G [n, 64] normal, seeded by `name`.
    """
    flat = x.reshape(len(x), -1).astype(np.float64)
    n = flat.shape[1]
    out = np.zeros((len(x), 1 + DIRECTIONS))
    out[:, 0] = np.sqrt((flat * flat).mean(axis=1))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for start in range(0, n, COLUMNS):
        part = flat[:, start : start + COLUMNS]
        out[:, 1:] += part @ rng.standard_normal((part.shape[1], DIRECTIONS))
    out[:, 1:] /= np.sqrt(n)
    return out


class Recorder:
    """A watcher that keeps a copy of every point whose path matches one of the patterns."""

    def __init__(self, points: Iterable[str] | None = None, sketched: bool = False):
        self.points = None if points is None else list(points)
        self.sketched = sketched
        self.seen: dict[str, np.ndarray] = {}

    def wants(self, path: str) -> bool:
        """Tell whether this point is to be kept; the engine need not compute what nobody wants."""
        return self.points is None or any(fnmatchcase(path, p) for p in self.points)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.sketched and x.dtype.kind == "f":
            self.seen[path + "#sketch"] = sketch(path, x)
        elif not self.sketched or path.endswith("#experts"):
            self.seen[path] = np.array(x, order="C")
        return x


def trace(
    model: Model,
    tokens: Sequence[int],
    points: Iterable[str] | None = None,
    sketched: bool = False,
) -> dict[str, np.ndarray]:
    """Return the points of one forward pass over `tokens`, by path.

    `points` are names or shell patterns (`model.layers.*.mlp.gate*`); None keeps all, of which
    `#scores` and `#probs` are [T, H, S]. `sketched` keeps `NAME#sketch` [T, 65] in place of each
    tensor, and the chosen experts as they are. Raises `InputError` for a pattern that nothing
    matches.
    """
    recorder = Recorder(points, sketched)
    model.using(model.nx.watching(recorder)).logits(tokens)
    for pattern in recorder.points or ():
        if not any(fnmatchcase(p.removesuffix("#sketch"), pattern) for p in recorder.seen):
            raise InputError(
                f"no point matches {pattern!r}; points are named like lm_head, model.layers.0, "
                "model.layers.0.self_attn.q_a_proj, model.layers.0.self_attn#probs"
            )
    return recorder.seen


def write(file: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; under its final name it is either whole or not there.

    Raises `OSError` for a full disk or a missing folder.
    """
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    try:
        with write_atomically(Path(file)) as part:
            safetensors.numpy.save_file(whole, part, dict(metadata))
    except safetensors.SafetensorError as e:  # its own name for a full disk or a missing folder
        raise OSError(f"{file}: {e}") from None
