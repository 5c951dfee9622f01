"""Put a sweep's parts together into one safetensors file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.run.sweep.layers import Run
from refmoe.run.sweep.work import COPIED, LETTERS, LOGITS, _expert
from refmoe.version import __version__
from refmoe.weights.writer import Spec, write_stream

# --- the result ---------------------------------------------------------------------------------


class Part(NamedTuple):
    """A tensor of the result: so many bytes of a file, from there on."""

    spec: Spec
    file: Path
    begin: int
    less: int  # to be taken off each number: rows of a prompt count from its first


def _result(run: Run, out: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file, under its name only when it is whole."""
    work = run.work
    parts = list(_parts(run))
    metadata = {
        "producer": f"refmoe {__version__}",
        "model": str(work.model.checkpoint.path),
        "numerics": work.decoder.nx.name,
        "conventions": work.decoder.nx.conventions.name,
        "tokens": work.tokens,
    }
    made = run.folder / "result"
    write_stream(out, [p.spec for p in parts], _bytes(parts), metadata=metadata, part=made)
    return {p.spec.name: (p.spec.dtype, p.spec.shape) for p in parts}


def _parts(run: Run) -> Iterator[Part]:
    work, cfg = run.work, run.work.cfg
    dtype = np.dtype(work.decoder.nx.dtype).name
    last = f"model.layers.{cfg.num_hidden_layers - 1}"
    files = {last: (run.x[cfg.num_hidden_layers % 2].file, dtype, [cfg.hidden_size])}
    for name, (kind, row) in run.state["points"].items():
        files[name] = run.points.folder / name, kind, row
    lengths = np.diff(work.starts).tolist()
    several = len(lengths) > 1
    of_experts: dict[str, list[int]] = {}
    for name, (file, kind, row) in files.items():
        counts, at = lengths, 0
        if name.startswith(LOGITS):
            counts = work.counts
        elif ".mlp.experts." in name:
            of = _expert(name)
            if of not in of_experts:
                rows = np.fromfile(run.points.folder / f"{of}#rows", np.int64)
                of_experts[of] = np.diff(np.searchsorted(rows, work.starts)).tolist()
            counts = of_experts[of]
        for n, count in enumerate(counts):
            shape = (count, *row)
            if name.endswith(("#scores", "#probs")):
                shape = (count, row[0], count)
            spec = Spec(f"{n}/{name}" if several else name, LETTERS[kind], shape)
            if count:
                yield Part(spec, file, at, work.starts[n] if name.endswith("#rows") else 0)
            at += spec.nbytes
    if work.picked is not None and work.logits != "none":
        yield from _positions(run, several)


def _positions(run: Run, several: bool) -> Iterator[Part]:
    """Which rows' logits are written."""
    work = run.work
    assert work.picked is not None
    file, at = run.folder / "positions", 0
    owner = np.repeat(work.starts[:-1], work.counts)
    (work.picked - owner).astype(np.int32).tofile(file)
    for n, count in enumerate(work.counts):
        prefix = f"{n}/" if several else ""
        spec = Spec(f"{prefix}{LOGITS}#positions", "I32", (count,))
        if count:
            yield Part(spec, file, at, 0)
        at += spec.nbytes


def _bytes(parts: Sequence[Part]) -> Iterator[np.ndarray]:
    for p in parts:
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
