"""A safetensors file written as a stream: one tensor after another, no other in memory.

The library's writer (safetensors.serialize_file) wants all of them at once.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from refmoe.weights.checkpoint import DTYPES

ALIGNED = 64  # bytes: tensors begin at whole cache lines where their sizes let them


class Spec(NamedTuple):
    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def header(specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """What comes before the tensors, which lie one behind the other in the order given."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        fields[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def write_stream(
    file: Path,
    specs: Sequence[Spec],
    chunks: Iterable[np.ndarray],
    said: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The file, under its name only once it is whole and on the disk. `chunks`: the tensors' bytes
    in order, in pieces of any size. `said`: a name for the progress bar."""
    head, total = header(specs, metadata), sum(spec.nbytes for spec in specs)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=said, disable=said is None)
    written = 0
    try:
        with part.open("wb") as out, bar:
            out.write(head)
            for chunk in chunks:
                out.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                written += chunk.nbytes
                bar.update(chunk.nbytes)
            out.flush()
            os.fsync(out.fileno())
        if written != total:
            raise ValueError(f"{file}: {written} bytes came for tensors of {total}")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
