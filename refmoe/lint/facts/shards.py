"""Gather the tensors of a folder, shard by shard, with whatever is damaged among its files."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.files import InputError, read_object
from refmoe.lint.base import Findings, Place, same_bytes
from refmoe.model.formats.names import canonical
from refmoe.weights.checkpoint import INDEX, TensorEntry, read_header


@dataclass(frozen=True)
class BadFile:
    """A JSON file beside the weights that cannot be read."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "pair")
    problem: str


class Twice(NamedTuple):
    """A tensor that is stored in two places."""

    one: TensorEntry
    other: TensorEntry
    stray: bool  # the index leaves one of them out
    same: bool  # byte for byte


class Stray(NamedTuple):
    """A tensor in a shard where the index does not have it."""

    stored: TensorEntry
    told: str | None  # the shard that the index names


@dataclass
class Shards:
    """Safetensors files of a folder held against their index."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "pair")
    folder: Path
    missing: list[tuple[str, int]] = field(default_factory=list)  # shard, tensors in it
    damaged: list[str] = field(default_factory=list)  # what is wrong with a header
    stray: list[Stray] = field(default_factory=list)
    twice: list[Twice] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)  # tensor, shard


def read_beside(file: Path, findings: Findings) -> dict[str, Any]:
    """Return the JSON object of an optional file; an empty one if it is absent or unreadable."""
    try:
        return read_object(file) if file.exists() else {}
    except InputError as e:
        findings.judge(BadFile(str(e)))
        return {}


def as_object(value: Any) -> dict[str, Any]:
    """Return a decoded JSON object, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def gather(folder: Path, findings: Findings) -> dict[str, TensorEntry]:
    """Return every tensor of the folder that the index knows, by canonical name.

    Without an index every shard counts. Damage becomes `Shards`, shown to the rules.
    """
    weight_map: dict[str, str] = as_object(read_beside(folder / INDEX, findings).get("weight_map"))
    if not all(isinstance(f, str) for f in weight_map.values()):
        findings.judge(BadFile(f"{folder / INDEX}: weight_map has other than file names"))
        weight_map = {}
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    out = Shards(folder)
    # a shard outside the folder counts as missing: nothing is looked for there
    out.missing = [(s, n) for s, n in Counter(weight_map.values()).items() if s not in files]
    tensors: dict[str, TensorEntry] = {}
    seen: set[tuple[str, str]] = set()
    for shard, file in files.items():
        try:
            header = read_header(file)
        except InputError as e:
            out.damaged.append(str(e))
            continue
        for stored in header.values():
            seen.add((stored.name, shard))
            if weight_map and weight_map.get(stored.name) != shard:
                out.stray.append(Stray(stored, weight_map.get(stored.name)))
            elif other := tensors.get(canonical(stored.name)):
                out.twice.append(_twice(stored, other, stray=False))
            else:
                tensors[canonical(stored.name)] = stored
    for stored, _ in out.stray:
        if other := tensors.get(canonical(stored.name)):
            out.twice.append(_twice(stored, other, stray=True))
    out.absent = [
        (name, shard)
        for name, shard in weight_map.items()
        if shard in files and (name, shard) not in seen
    ]
    findings.judge(out)
    return tensors


def _twice(one: TensorEntry, other: TensorEntry, stray: bool) -> Twice:
    """Compare two stored tensors of one name."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return Twice(one, other, stray, alike and same_bytes(_mapped(one), _mapped(other)))


def _mapped(t: TensorEntry) -> np.ndarray:
    """Return the bytes of a tensor; an empty file part cannot be mapped."""
    if not t.nbytes:
        return np.zeros(0, np.uint8)
    return np.memmap(t.file, np.uint8, "r", t.start, (t.nbytes,))
