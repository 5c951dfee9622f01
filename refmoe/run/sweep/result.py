"""Put what a sweep has kept in many files together into one safetensors file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.run.sweep.files import COPIED
from refmoe.run.sweep.plan import LOGITS, expert_of
from refmoe.run.sweep.run import Run
from refmoe.version import __version__
from refmoe.weights.writer import Spec, write_stream

LETTERS = {  # NumPy's names of types → safetensors'
    "float64": "F64",
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
}


class Slice(NamedTuple):
    """The bytes of a file that one tensor of the result is made of."""

    spec: Spec  # its name, dtype and shape
    file: Path
    begin: int  # byte of the file
    less: int  # to be taken off each number: rows of a prompt count from its first


def write_result(run: Run, out: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Write the result, which has its name only once it is whole → dtype and shape by name."""
    plan = run.plan
    slices = list(_slices(run))
    metadata = {
        "producer": f"refmoe {__version__}",
        "model": str(plan.model.checkpoint.path),
        "numerics": plan.decoder.nx.name,
        "conventions": plan.decoder.nx.conventions.name,
        "tokens": plan.tokens,
    }
    specs, part = [p.spec for p in slices], run.folder / "result"
    write_stream(out, specs, _read_bytes(slices), metadata=metadata, part=part)
    return {p.spec.name: (p.spec.dtype, p.spec.shape) for p in slices}


def _slices(run: Run) -> Iterator[Slice]:
    """Yield the tensors of the result: each point of each prompt that has rows of it."""
    plan, cfg = run.plan, run.plan.cfg
    dtype = np.dtype(plan.decoder.nx.dtype).name
    last = f"model.layers.{cfg.num_hidden_layers - 1}"
    files = {last: (run.x[cfg.num_hidden_layers % 2].file, dtype, [cfg.hidden_size])}
    for name, (kind, row) in run.state["points"].items():
        files[name] = run.points.folder / name, kind, row
    lengths = np.diff(plan.starts).tolist()
    several = len(lengths) > 1
    of_experts: dict[str, list[int]] = {}
    for name, (file, kind, row) in files.items():
        counts, at = lengths, 0
        if name.startswith(LOGITS):
            counts = plan.counts
        elif ".mlp.experts." in name:
            of = expert_of(name)
            if of not in of_experts:
                rows = np.fromfile(run.points.folder / f"{of}#rows", np.int64)
                of_experts[of] = np.diff(np.searchsorted(rows, plan.starts)).tolist()
            counts = of_experts[of]
        for n, count in enumerate(counts):
            shape = (count, *row)
            if name.endswith(("#scores", "#probs")):
                shape = (count, row[0], count)
            spec = Spec(f"{n}/{name}" if several else name, LETTERS[kind], shape)
            if count:
                yield Slice(spec, file, at, plan.starts[n] if name.endswith("#rows") else 0)
            at += spec.nbytes
    if plan.picked is not None and plan.logits != "none":
        yield from _positions(run, several)


def _positions(run: Run, several: bool) -> Iterator[Slice]:
    """Write and yield the positions whose logits are in the result."""
    plan = run.plan
    assert plan.picked is not None
    file, at = run.folder / "positions", 0
    owner = np.repeat(plan.starts[:-1], plan.counts)
    (plan.picked - owner).astype(np.int32).tofile(file)
    for n, count in enumerate(plan.counts):
        prefix = f"{n}/" if several else ""
        spec = Spec(f"{prefix}{LOGITS}#positions", "I32", (count,))
        if count:
            yield Slice(spec, file, at, 0)
        at += spec.nbytes


def _read_bytes(slices: Sequence[Slice]) -> Iterator[np.ndarray]:
    """Yield the bytes of all slices, in pieces."""
    for p in slices:
        with p.file.open("rb") as raw:
            raw.seek(p.begin)
            left = p.spec.nbytes
            while left:
                piece = raw.read(min(left, COPIED))
                if not piece:
                    raise InputError(f"{p.file} is shorter than it was; --restart begins anew")
                left -= len(piece)
                if p.less:
                    yield np.frombuffer(piece, np.int64) - p.less
                else:
                    yield np.frombuffer(piece, np.uint8)
