"""Record named points of one forward pass.

`trace` keeps what the watcher sees and hands it back unchanged; `write` puts it into a
safetensors file whose names are the points. Shapes have the rows first: [T, ...].
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import safetensors.numpy

from refmoe.config import InputError
from refmoe.run.model import Model


class Recorder:
    """A watcher that keeps a copy of every point whose path matches one of the patterns."""

    def __init__(self, points: Iterable[str] | None = None):
        self.points = None if points is None else list(points)
        self.seen: dict[str, np.ndarray] = {}

    def wants(self, path: str) -> bool:
        return self.points is None or any(fnmatchcase(path, p) for p in self.points)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        self.seen[path] = np.array(x, order="C")
        return x


def trace(
    model: Model, tokens: Sequence[int], points: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """The points of one forward pass over `tokens`, by path.

    `points` are names or shell patterns (`model.layers.*.mlp.gate*`); None keeps all, of which
    `#scores` and `#probs` are [T, H, S]. Raises `InputError` for a pattern that nothing matches.
    """
    recorder = Recorder(points)
    model.using(model.nx.watching(recorder)).logits(tokens)
    for pattern in recorder.points or ():
        if not any(fnmatchcase(path, pattern) for path in recorder.seen):
            raise InputError(
                f"no point matches {pattern!r}; points are named like lm_head, model.layers.0, "
                "model.layers.0.self_attn.q_a_proj, model.layers.0.self_attn#probs"
            )
    return recorder.seen


def write(file: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; under its final name it is either whole or not there."""
    file = Path(file)
    part = file.with_name(file.name + ".part")
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    try:
        safetensors.numpy.save_file(whole, part, dict(metadata))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
