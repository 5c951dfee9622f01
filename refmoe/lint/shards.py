"""Check shards and their index."""

from collections import Counter
from pathlib import Path

import numpy as np

from refmoe.files import InputError
from refmoe.lint.base import Level, _Findings, _object, _read, _same_bytes
from refmoe.weights.checkpoint import (
    INDEX,
    TensorEntry,
    canonical,
    read_header,
)

# --- shards


def _gather(folder: Path, out: _Findings) -> dict[str, TensorEntry]:
    """Every tensor of the folder that the index knows, by canonical name; damage is a finding."""
    weight_map: dict[str, str] = _object(_read(folder / INDEX, out).get("weight_map"))
    if not all(isinstance(f, str) for f in weight_map.values()):
        out.add("error", "files", None, f"{folder / INDEX}: weight_map has other than file names")
        weight_map = {}
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    for shard, count in Counter(weight_map.values()).items():
        if shard not in files:  # also one outside the folder, which is not looked for
            text = f"shard {shard!r} of {INDEX} is not in the folder; {count} tensors are lost"
            out.add("error", "shards", None, text)
    tensors: dict[str, TensorEntry] = {}
    strays: list[TensorEntry] = []
    seen: set[tuple[str, str]] = set()
    for shard, file in files.items():
        try:
            header = read_header(file)
        except InputError as e:
            out.add("error", "shards", None, str(e))
            continue
        for stored in header.values():
            seen.add((stored.name, shard))
            if weight_map and weight_map.get(stored.name) != shard:
                strays.append(stored)
            elif other := tensors.get(canonical(stored.name)):
                _twice(stored, other, "refmoe refuses it", "error", out)
            else:
                tensors[canonical(stored.name)] = stored
    for stored in strays:
        where = weight_map.get(stored.name, "nothing of it")
        text = f"in {stored.file.name}, {INDEX} says {where}"
        out.add("warning", "stray tensors", stored.name, text)
        if other := tensors.get(canonical(stored.name)):
            _twice(stored, other, "engines that read whole shards", "warning", out)
    for name, shard in weight_map.items():
        if shard in files and (name, shard) not in seen:
            out.add("error", "absent tensors", name, f"not in {shard}, though {INDEX} says so")
    return tensors


def _twice(a: TensorEntry, b: TensorEntry, who: str, mild: Level, out: _Findings) -> None:
    same = (a.dtype, a.shape) == (b.dtype, b.shape) and _same_bytes(_mapped(a), _mapped(b))
    text = f"in {a.file.name} and, as {b.name}, in {b.file.name} ({who}): "
    text += "the same bytes" if same else "different values, the last one read wins"
    out.add(mild if same else "error", "tensors stored twice", a.name, text)


def _mapped(t: TensorEntry) -> np.ndarray:
    if not t.nbytes:
        return np.zeros(0, np.uint8)
    return np.memmap(t.file, np.uint8, "r", t.start, (t.nbytes,))
