"""Named arrays, from whatever file → a dump: names, tokens and precision.

Module paths are those of the Hugging Face model. Wrapper prefixes are taken off, and what Hugging
Face's forward and generate return is read under the names of the points it is (huggingface.py).
Token ids are an array named `tokens`, `input_ids` or `sequences`, [T] or [prompts, T]. An array
`attention_mask` beside it says which are padding; `positions`, or `position_ids`, tell the prompts
of one row of ids apart, as a server has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError
from refmoe.model.formats.names import canonical
from refmoe.oracle.readers.base import Arrays, Dump, narrowest_type, read_prompts
from refmoe.oracle.readers.huggingface import name_outputs
from refmoe.oracle.readers.steps import join_steps

TOKENS = ("tokens", "input_ids", "sequences")
POSITIONS = ("positions", "position_ids", "cache_position")
DEPTH = 20  # of dicts in dicts: a pickle may hold itself
ENTRIES = 1_000_000  # of all dicts and lists together


def dump_of_arrays(
    path: Path,
    arrays: Arrays,
    tokens: Any = None,
    notes: tuple[str, ...] = (),
    partial: frozenset[str] = frozenset(),
    unread: Mapping[str, str] | None = None,
) -> Dump:
    """Return the dump of these arrays; `tokens` are the ids that the file gives beside them.

    unread  arrays of the file that are not here, and why: no pass is given over them
    """
    where = f"{path}: tokens"
    arrays, said = join_steps(arrays)
    named = {canonical(name): x for name, x in arrays.items()}
    ids = {name: named.pop(name) for name in TOKENS if name in named}
    outputs = name_outputs(named, ids.pop("sequences", None))
    if outputs.sequence is not None:
        ids.setdefault("sequences", outputs.sequence)
    for name, value in ids.items():  # the last says most
        tokens = value
        where = f"{path}: {name}"
    found = outputs.arrays
    mask = found.pop("attention_mask", None)
    positions = [x for n in POSITIONS if (x := found.pop(n, None)) is not None]
    prompts: list[list[int]] = []
    if tokens is not None:
        prompts = read_prompts(where, tokens, mask, positions[0] if positions else None)
    numbers = {n: x for n, x in found.items() if x.dtype.kind in "fiub"}
    others = {n: f"{found[n].dtype}, no numbers" for n in found.keys() - numbers}
    partial = (partial | outputs.partial) & numbers.keys()
    rounded = narrowest_type(numbers.values())
    return Dump(
        path,
        numbers,
        prompts[0] if len(prompts) == 1 else None,
        rounded,
        partial,
        notes=notes + said + outputs.notes,
        unread=others | {canonical(n): why for n, why in (unread or {}).items()},
        prompts=tuple(prompts) if len(prompts) > 1 else (),
    )


def flatten(path: Path, value: Any) -> Arrays:
    """Return the tensors of nested dicts and lists under names like a.b and a.0.

    What is no tensor is left out. Raises `InputError` for endless nesting and for lists of numbers.
    """
    out: Arrays = {}
    left: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(ENTRIES):
        if not left:
            return out
        name, part, depth = left.pop()
        if isinstance(part, np.ndarray):
            out[name] = part
            continue
        if depth > DEPTH:
            raise InputError(f"{path}: dicts or lists nested {depth} deep, or in a circle")
        items: list[tuple[Any, Any]] = []
        if isinstance(part, dict):
            items = list(part.items())
        elif isinstance(part, list | tuple):
            if name in TOKENS and part and all(type(i) is int for i in part):
                out[name] = np.array(part)
                continue
            items = list(enumerate(part))
        at = f"{name}." if name else ""
        left += [(f"{at}{key}", x, depth + 1) for key, x in reversed(items)]
    raise InputError(f"{path}: more than {ENTRIES} entries; save tensors, not lists of numbers")
