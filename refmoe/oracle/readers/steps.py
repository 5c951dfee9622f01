"""Join what several forward passes of one engine left under numbered names.

A hook that appends to a list, or a dict for each pass, gives a prompt's prefill and every token
after it a tensor of its own. Their rows are put one after the other, in the order of the numbers:

    model.layers.0.mlp.0, model.layers.0.mlp.1, ...      of a list
    step_0.model.layers.0.mlp, step_1.model.layers.0.mlp of a dict for each pass
    step_0.input_ids, ...                                the ids of each pass, likewise

A module that returns a tuple leaves such names as well, each with all rows: its first entry is the
module's output, and of a norm that adds the residual the second is the sum.
"""

import re

import numpy as np

from refmoe.model.formats.names import canonical
from refmoe.model.points import parse
from refmoe.oracle.readers.base import Arrays

PASS = re.compile(r"(?:[A-Za-z]+[-_ ]?)?(\d+)[./:](.+)")
IDS = ("input_ids", "tokens", "positions", "position_ids", "cache_position")


def join_steps(arrays: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    """Return the arrays with the rows of numbered passes joined, and notes on what was done.

    Arrays that cannot be joined keep their names.
    """
    passes: dict[str, dict[int, str]] = {}
    for name in arrays:
        base, number = _numbered(name)
        if number is not None:
            passes.setdefault(base, {})[number] = name
    out = dict(arrays)
    joined: dict[int, int] = {}
    for base, by_number in passes.items():
        names = [by_number[i] for i in sorted(by_number)]
        parts = [arrays[n] for n in names]
        if base in arrays or (len(parts) == 1 and 0 not in by_number):
            continue
        tuple_ = _is_tuple(base, parts, names[0])
        whole = parts[0] if tuple_ else _joined(base, parts)
        if whole is None:
            continue
        for n in names:
            del out[n]
        out[base] = whole
        if tuple_ and len(parts) > 1 and base.endswith("norm"):
            out[f"{base}#residual"] = parts[1]
        elif not tuple_ and base not in IDS:
            joined[len(parts)] = joined.get(len(parts), 0) + 1
    notes = [f"{count} tensors are of {n} passes, joined" for n, count in joined.items() if n > 1]
    return out, tuple(notes)


def _numbered(name: str) -> tuple[str, int | None]:
    """Return the name without the number of a pass, and that number; None: it has none."""
    found = PASS.fullmatch(name)
    if found and _is_known(canonical(found[2])):
        return canonical(found[2]), int(found[1])
    base, _, last = name.rpartition(".")
    base = canonical(base)
    if last.isdecimal() and parse(canonical(name)).point is None and _is_known(base):
        return base, int(last)
    return name, None


def _is_known(name: str) -> bool:
    """Tell whether a name is of token ids, a point, or anything inside a layer (adapt.py)."""
    if name in IDS or parse(name.removesuffix("#residual")).point is not None:
        return True
    inside = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
    return inside is not None and not inside[1].endswith("experts")


def _is_tuple(base: str, parts: list[np.ndarray], first: str) -> bool:
    """Tell whether these are entries of a module's output: equally many rows, or other things."""
    point = parse(base).point
    if PASS.fullmatch(first) or point is None or len(parts) > 2 or base in IDS:
        return False
    if len(parts) == 1:
        return True
    return (parts[0].shape == parts[1].shape and base.endswith(("norm", "mlp"))) or (
        parts[0].shape != parts[1].shape and parts[0].ndim != parts[1].ndim
    )


def _joined(base: str, parts: list[np.ndarray]) -> np.ndarray | None:
    """Return the rows of all passes; None where their other axes differ."""
    ndim = parts[0].ndim
    if not ndim or any(x.ndim != ndim for x in parts):
        return None
    shapes = np.array([x.shape for x in parts])
    differ = np.flatnonzero((shapes != shapes[0]).any(axis=0))
    if len(differ) > 1:
        return None
    point = parse(base).point
    own = 0 if point is None else len(point.axes) - 1
    axis = int(differ[0]) if len(differ) else max(0, ndim - 1 - own)
    if own == 2 and ndim == 4 and not len(differ):
        axis = 2  # heads before the rows
    if base in IDS:
        axis = ndim - 1
    return np.concatenate(parts, axis)
