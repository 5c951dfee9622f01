"""Define a dump, and the registry of readers that make one of a file.

A reader is one file of this folder. It says which paths it reads and how:

    def recognise(path: Path) -> bool:
        return path.is_file() and path.suffix == ".mine"

    def read(path: Path) -> Dump:
        arrays, tokens = ...                                 by point or module path, rows first
        return dump_of_arrays(path, arrays, tokens)          arrays.py: names, tokens, precision

    register(Reader("mine", ".mine", recognise, read))

`read_dump` (dump.py) imports every file of the folder and asks the readers in turn, so that a new
reader is a new file and nothing else. `read` raises `InputError` for a file that is damaged, too
large or something else; nothing in a file is ever executed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmoe.files import InputError

if TYPE_CHECKING:
    from refmoe.oracle.listing.base import Listing

Arrays = dict[str, np.ndarray]

MOST_NUMBERS = 1 << 28  # of arrays that are mostly unknown: 2 GB of float64, more is an error


@dataclass(frozen=True)
class Dump:
    """Another engine's tensors of one sequence, and what else its file says."""

    path: Path
    arrays: Arrays  # by name; those that are points of the model are compared
    tokens: list[int] | None
    rounded: str  # the narrowest type that holds every value: bfloat16, float16, float32, float64
    partial: frozenset[str] = frozenset()  # NaN where unknown: compared where known, never fed back
    step: float = 0.0  # half of the last decimal, where numbers were printed
    top: tuple[np.ndarray, np.ndarray] | None = None  # ids [T, K], -1: none; log-probabilities
    notes: tuple[str, ...] = ()  # what was not read, and why
    form: str | None = None  # in which a server wrote log-probabilities
    listing: "Listing | None" = None  # log-probabilities whose tokens are not known yet
    logits: bool = False  # the numbers of `top` are logits
    sampled: bool = False  # the numbers are of after sampling, as the file itself says
    generated: int | None = None  # index of the first token that was generated; None: none was
    others: "tuple[Dump, ...]" = ()  # further sequences of the same file
    unread: Mapping[str, str] = field(default_factory=dict)  # of the file → why it is not here
    prompts: tuple[list[int], ...] = ()  # token ids of each, where there are several
    ranks: tuple[Arrays, ...] = ()  # of each rank of a parallel engine, instead of `arrays`
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)  # name → positions; absent: all
    columns: Mapping[str, slice] = field(default_factory=dict)  # name → of axis 1; absent: all


@dataclass(frozen=True)
class Reader:
    """A kind of dump: which paths are of this kind, and how one is read."""

    name: str
    files: str  # as an error message lists what is supported: ".npz", "or a folder of ..."
    recognise: Callable[[Path], bool]  # by the path's name and whether it is a folder
    read: Callable[[Path], Dump]


READERS: dict[str, Reader] = {}


def register(reader: Reader) -> None:
    """Add a reader; one of the same name is replaced."""
    READERS[reader.name] = reader


def read_ids(where: str, value: Any) -> list[int]:
    """Return the token ids of one sequence, whatever axes of length one stand before them.

    `where` begins the message of the `InputError` that anything else raises.
    """
    x = value if isinstance(value, np.ndarray) else None
    if x is None and isinstance(value, list) and all(type(i) is int for i in value):
        x = np.array(value)  # of ids too large: objects, refused below
    if x is None or x.dtype.kind not in "iu" or not x.size:
        found = "no list of integers" if x is None else f"{x.dtype} {list(x.shape)}"
        raise InputError(f"{where} is {found}, expected the token ids of one sequence")
    if x.ndim and x.size != x.shape[-1]:
        raise InputError(f"{where} is {list(x.shape)}, several sequences; dump one at a time")
    ids: list[int] = x.reshape(-1).tolist()
    return ids


def read_prompts(
    where: str, value: Any, mask: np.ndarray | None = None, positions: np.ndarray | None = None
) -> list[list[int]]:
    """Return the token ids of each prompt: of [prompts, T], or of a row that holds several.

    mask       [prompts, T]: 0 where an id is padding; another shape says nothing of these
    positions  of each id of one row: where they do not go on, another prompt begins, or goes on
    Raises `InputError`, which `where` begins, for what is no array or list of integers.
    """
    if isinstance(value, np.ndarray) and value.ndim > 1 and value.size > value.shape[-1]:
        value = list(value.reshape(-1, value.shape[-1]))
    lists = isinstance(value, list) and value and not isinstance(value[0], int)
    rows = [read_ids(where, row) for row in (value if lists else [value])]
    count = sum(map(len, rows))
    if mask is not None and mask.size == count and np.isin(mask, (0, 1)).all():
        kept = mask.reshape(len(rows), -1) != 0
        rows = [np.array(r)[k].tolist() for r, k in zip(rows, kept, strict=True) if k.any()]
    if len(rows) == 1 and positions is not None and positions.size == len(rows[0]):
        rows = _apart(rows[0], positions.reshape(-1).tolist())
    return rows


def _apart(ids: list[int], positions: list[int]) -> list[list[int]]:
    """Return the prompts that a row of ids holds, by their positions; one if these make none."""
    prompts: list[list[int]] = []
    waiting: list[int] = []  # numbers of prompts, the one that went on last at the end
    for n, (i, p) in enumerate(zip(ids, positions, strict=True)):
        going = [k for k in waiting if len(prompts[k]) == p]
        if p == 0:
            waiting.append(len(prompts))
            prompts.append([i])
        elif not going:
            return [ids]
        else:  # the one before, as in a prefill; else the one that has waited longest, as in turns
            turns = p in positions[n + 1 : n + 2] or (
                n > 1 and positions[n - 1] == positions[n - 2]
            )
            chosen = going[-1] if going[-1] == waiting[-1] and not turns else going[0]
            prompts[chosen].append(i)
            waiting.remove(chosen)
            waiting.append(chosen)
    return prompts


def narrowest_type(arrays: Iterable[np.ndarray]) -> str:
    """Return the narrowest type that holds the values of most arrays, whatever they are stored in.

    Only most, because some (router logits) are wide in every engine.
    """
    votes = {"bfloat16": 0, "float16": 0, "float32": 0, "float64": 0}
    for x in arrays:
        if x.dtype.kind != "f" or not x.size:
            continue
        some = x.reshape(-1)
        some = some[~np.isnan(some)][:4096]
        if not some.size:
            continue
        if x.dtype == np.float16:
            votes["float16"] += 1
        elif (some.astype(np.float32) != some).any():
            votes["float64"] += 1
        elif not (some.astype(np.float32).view(np.uint32) & 0xFFFF).any():
            votes["bfloat16"] += 1
        elif (some.astype(np.float32).astype(np.float16) == some).all():
            votes["float16"] += 1
        else:
            votes["float32"] += 1
    return max(votes, key=lambda name: votes[name])
