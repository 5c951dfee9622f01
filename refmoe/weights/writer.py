"""Write safetensors files as a stream: one tensor after another, no other in memory.

The library's writer (safetensors.serialize_file) wants all of them at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.files import write_atomically
from refmoe.progress import Progress
from refmoe.weights.checkpoint import DTYPES

ALIGNED = 64  # bytes: tensors begin at whole cache lines where their sizes let them


class Spec(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers."""
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def header(specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes before the tensors, which lie one behind the other in the order given."""
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
    part: Path | None = None,
) -> None:
    """Write a safetensors file, which has its name only once it is whole and on the disk.

    `chunks` are the tensors' bytes in the order of `specs`, in pieces of any size; `said` is the
    progress's name (None: none is shown); `part` where the file is while it is written. Raises
    ValueError if the chunks have more or fewer bytes than the specs.
    """

    head, total = header(specs, metadata), sum(spec.nbytes for spec in specs)
    bar = Progress(total, name=said or "", shown=said is not None)
    written = 0
    with write_atomically(file, part=part, to_disk=True) as path:
        with path.open("wb") as out, bar:
            out.write(head)
            for chunk in chunks:
                out.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                written += chunk.nbytes
                bar.advance(chunk.nbytes)
        if written != total:
            raise ValueError(f"{file}: {written} bytes came for tensors of {total}")
