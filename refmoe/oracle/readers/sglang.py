"""A folder of tensors that SGLang dumped, put together: ranks, steps, and which prompt they are of.

sglang_files.py says what the files are. The server's head is called by no hook: its logits are
those of each pass' last row (`next_token_logits`).

Steps are forward passes. Those of one prompt follow each other, as `positions` or `position_ids`
tell, and are read as one sequence; without positions all steps are. A step that begins before the
last one ended computes rows again, and these are read. Ranks that hold equal tensors are read once.
Parts are put together along the axis that `dims` names in `meta`: "t h[tp]" (comparator/dims_spec),
older "t h(tp)". Parts without `dims` are not read, and the notes say so.

Source: sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import MOST_NUMBERS, Arrays, Dump, Reader, register
from refmoe.oracle.readers.sglang_files import (
    CHOICES,
    LOGITS,
    Files,
    Tensor,
    find_files,
    grouped,
    load,
)
from refmoe.oracle.readers.torch_file import ForeignError

DIM = re.compile(r"(?:\w+|\([\w*]+\))(?:\[(\S+)\]|\((\S+)\))?")

Rows = dict[int, int]  # step → how many


@dataclass
class _Prompt:
    """The steps of one prompt, in order."""

    kept: Rows = field(default_factory=dict)  # less those that come again
    following: int = 0  # the position of the next row
    again: int = 0  # rows that came again

    def add(self, step: int, positions: np.ndarray) -> None:
        """Add a step; the rows of its positions that are there already give way to it."""
        first = int(positions[0])
        for earlier in reversed(self.kept):
            over = min(self.following - first, self.kept[earlier])
            if over <= 0:
                break
            self.kept[earlier] -= over
            self.following -= over
            self.again += over
        self.kept[step] = len(positions)
        self.following = int(positions[-1]) + 1


class _Steps(NamedTuple):
    """How many rows each step has, and how many of them are kept."""

    lengths: Rows
    kept: Rows
    ends: Rows  # rows of the sequence that are there after each step


class _Whole(NamedTuple):
    """Tensors whose parts and steps are put together."""

    arrays: Arrays
    unread: dict[str, str]  # name → why it could not be put together
    nothing: dict[str, str]  # name → why there is nothing of the model in it


def recognise(path: Path) -> bool:
    """Tell whether this is a folder; `read` says whether it is one of SGLang's."""
    return path.is_dir()


def read(path: Path) -> Dump:
    """Read every tensor of the folder, a name at a time.

    Raises `InputError` where a file cannot be read, where a step holds several prompts, and where
    nothing but the fields of a batch was dumped.
    """
    found, notes = find_files(path)
    positions = _positions(path, found.pop("positions", {}))
    prompt, said = _find_prompt(path, positions)
    if prompt is None:
        lengths = _lengths(found)
        ends = dict(
            zip(lengths, np.cumsum(list(lengths.values()), dtype=int).tolist(), strict=True)
        )
        steps = _Steps(lengths, lengths, ends)
    else:
        lengths = {s: x.size for s, x in positions.items()}
        steps = _Steps(lengths, prompt.kept, {s: int(x[-1]) + 1 for s, x in positions.items()})
        found = {n: {s: by[s] for s in by.keys() & prompt.kept} for n, by in found.items()}
    whole = _put_together(found, steps)
    arrays, partial = whole.arrays, frozenset[str]()
    if LOGITS in found and "lm_head" not in arrays:
        logits = _logits(found[LOGITS], steps)
        if isinstance(logits, str):
            whole.nothing[LOGITS] = logits
        else:
            arrays["lm_head"], partial = logits, frozenset({"lm_head"})
    notes += said + grouped(whole.unread | whole.nothing)
    used = {step for by_step in found.values() for step in by_step}
    if len(used) > 1:
        notes.append(f"{len(used)} steps are read as one sequence")
    tokens = arrays.pop("input_ids", None)
    dump = dump_of_arrays(path, arrays, tokens, tuple(notes), partial)
    return replace(dump, unread=whole.unread)


def _lengths(found: Files) -> Rows:
    """Return the rows of each step whose token ids are there."""
    parts = {s: _whole(ranks) for s, ranks in sorted(found.get("input_ids", {}).items())}
    return {s: x.size for s, x in parts.items() if not isinstance(x, str)}


def _put_together(found: Files, rows: _Steps) -> _Whole:
    """Join the parts of each tensor's ranks and the rows that are kept of its steps."""
    whole = _Whole({}, {}, {})
    for name, by_step in found.items():
        if name == LOGITS or not by_step:
            continue
        parts = {step: _whole(by_step[step]) for step in sorted(by_step)}
        steps = {s: x for s, x in parts.items() if not isinstance(x, str)}
        if len(steps) < len(parts):
            why = next(why for why in parts.values() if isinstance(why, str))
            (whole.nothing if why.endswith("no tensor") else whole.unread)[name] = why
        elif (joined := _joined(steps, rows)) is None:
            whole.unread[name] = "its shape is another in each step"
        else:
            whole.arrays[name] = joined
    _sort_choices(whole.arrays)
    for name, x in list(whole.arrays.items()):
        if name.endswith("#experts") and x.dtype.kind not in "iu":
            whole.nothing[name] = "no indices; this backend keeps its choices to itself"
            del whole.arrays[name]
    return whole


def _sort_choices(arrays: Arrays) -> None:
    """Put the integers that a gate returned under the name of choices, whatever their order."""
    for gate in {n.partition("#")[0] for n in arrays if n.partition("#")[0].endswith(".gate")}:
        names = [n for n in (gate, *(gate + end for end in CHOICES)) if n in arrays]
        integers = [n for n in names if arrays[n].dtype.kind in "iu"]
        if len(integers) == 1 and integers[0] != f"{gate}#experts":
            chosen = arrays.pop(integers[0])
            if f"{gate}#experts" in arrays:
                arrays[integers[0]] = arrays.pop(f"{gate}#experts")
            arrays[f"{gate}#experts"] = chosen


def _positions(folder: Path, by_step: dict[int, dict[int, Tensor]]) -> dict[int, np.ndarray]:
    """Return the positions of each step's rows; none where they are of no form that is known.

    Raises `InputError` where a step holds several prompts.
    """
    out = {}
    for step, ranks in sorted(by_step.items()):
        x = load(ranks[min(ranks)])[0]
        if not isinstance(x, np.ndarray) or not x.size or x.dtype.kind not in "iu":
            return {}
        x = x.reshape(-1, x.shape[-1] if x.ndim else 1)
        if len(x) > 1 or (np.diff(x[0]) != 1).any():
            raise InputError(
                f"{folder}: step {step} holds several prompts (positions "
                f"{x.ravel()[:40].tolist()}); dump one request at a time"
            )
        out[step] = x[0]
    return out


def _find_prompt(
    folder: Path, positions: dict[int, np.ndarray]
) -> tuple[_Prompt | None, list[str]]:
    """Return the prompt to read, the longest, and notes on the others.

    It is None where no positions tell which steps belong together. Raises `InputError` where a
    step may belong to several prompts, or none is there from its beginning.
    """
    prompts: list[_Prompt] = []
    late: list[int] = []
    for step, x in positions.items():
        first = int(x[0])
        goes_on = [p for p in prompts if p.following == first]
        if first == 0:
            goes_on = [_Prompt()]
            prompts += goes_on
        elif not goes_on and prompts and first < prompts[-1].following:
            goes_on = prompts[-1:]  # computed again from here on
        if len(goes_on) > 1:
            begin = _listed([min(p.kept) for p in goes_on])
            raise InputError(
                f"{folder}: step {step} begins at position {first} and may go on with any of the "
                f"prompts that begin at steps {begin}; dump one request at a time"
            )
        for prompt in goes_on:
            prompt.add(step, x)
        if not goes_on:
            late.append(step)
    if not prompts:
        if late:
            raise InputError(
                f"{folder}: no step begins at position 0, so a prefix came from the cache; start "
                "the server with --disable-radix-cache"
            )
        return None, []
    # the server warms up with a prompt of its own, which is short
    chosen = max(prompts, key=lambda p: (p.following, min(p.kept)))
    others = sorted({s for p in prompts for s in p.kept} - chosen.kept.keys())
    notes = []
    if others:
        notes.append(f"steps {_listed(others)} are other prompts and are not read")
    if late:
        notes.append(
            f"steps {_listed(late)} follow no other and are not read; if their prefix came from "
            "the cache, start the server with --disable-radix-cache"
        )
    if chosen.again:
        notes.append(f"{chosen.again} rows come twice; those of the later step are read")
    return chosen, notes


def _whole(ranks: dict[int, Tensor]) -> np.ndarray | str:
    """Return what all ranks hold together, or in words why that is not known."""
    first, split, size = None, None, 0
    parts: dict[int, np.ndarray] = {}
    for rank, tensor in sorted(ranks.items()):
        try:
            x, meta = load(tensor)
        except ForeignError:
            return "no tensor"
        if not isinstance(x, np.ndarray):
            return f"a {type(x).__name__}, no tensor"
        if first is None:
            first, split = x, _split(meta.get("dims"))
        if split is None:
            if not _same(x, first):
                return "its ranks hold different parts; dump it where it is whole"
            continue
        info = [d for key, d in meta.items() if key.endswith("_parallel_info")]
        own = {k: v for d in info if isinstance(d, dict) for k, v in d.items() if type(v) is int}
        at, size = own.get(f"{split[1]}_rank", rank), own.get(f"{split[1]}_size", 0)
        if not _same(x, parts.setdefault(at, x)):
            return f"its ranks differ within one {split[1]}"
    assert first is not None
    if split is None:
        return first
    if size and len(parts) != size:
        return f"{len(parts)} of its {size} parts are there"
    try:
        return np.concatenate([x for _, x in sorted(parts.items())], axis=split[0])
    except (ValueError, TypeError):
        shapes = ", ".join(str(list(x.shape)) for x in parts.values())
        return f"its parts are {shapes}, which no axis {split[0]} joins"


def _split(dims: Any) -> tuple[int, str] | None:
    """Return the axis that is split, and by what kind of rank: "t h[tp]" → 1, tp.

    None where no axis is split, several are, or one is in another way than in order.
    """
    if not isinstance(dims, str):
        return None
    found = []
    for axis, word in enumerate(dims.partition("#")[0].split()):
        m = DIM.fullmatch(word)
        if m is None:
            return None
        if how := m[1] or m[2]:
            found.append((axis, how))
    if len(found) != 1:
        return None
    axis, how = found[0]
    kind, _, order = how.partition(":")
    return (axis, kind) if kind.isalpha() and order in ("", "sharded", "natural") else None


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    """Tell whether two tensors are equal, NaN to NaN."""
    return x is y or (x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))


def _joined(parts: dict[int, np.ndarray], steps: _Steps) -> np.ndarray | None:
    """Put the rows of one step that are kept after those of another; None where they do not fit.

    Keys and values that were made anew for the whole cache have the rows of all steps before: the
    last ones are the step's own.
    """
    if len({x.ndim for x in parts.values()}) > 1:
        return None
    if not next(iter(parts.values())).ndim:
        return next(iter(parts.values())) if len(parts) == 1 else None
    lengths, kept, ends = steps
    axis = _row_axis(parts, lengths)
    cache = _row_axis(parts, ends) if axis is None else None
    if axis is not None:
        rows = [x.take(range(kept[s]), axis) for s, x in parts.items()]
    elif cache is not None:
        axis, begin = cache, {s: ends[s] - lengths[s] for s in parts}
        rows = [x.take(range(begin[s], begin[s] + kept[s]), axis) for s, x in parts.items()]
    elif all(kept.get(s) == lengths.get(s) for s in parts):  # as those of an expert
        shapes, rows = [x.shape for x in parts.values()], list(parts.values())
        axis = next((a for a in range(len(shapes[0])) if len({s[a] for s in shapes}) > 1), 0)
    else:  # which of its rows come again is not known
        return None
    if len({(*x.shape[:axis], *x.shape[axis + 1 :]) for x in rows}) > 1:
        return None
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=axis)


def _row_axis(parts: dict[int, np.ndarray], lengths: Rows) -> int | None:
    """Return the axis that is as long as each step; of several, one that is not always one."""
    axes = range(next(iter(parts.values())).ndim)
    fit = [a for a in axes if all(x.shape[a] == lengths.get(s) for s, x in parts.items())]
    return min(fit, key=lambda a: all(x.shape[a] == 1 for x in parts.values()), default=None)


def _logits(by_step: dict[int, dict[int, Tensor]], steps: _Steps) -> np.ndarray | str:
    """Return logits [T, Z], NaN but for the last row of each step, or in words why not."""
    out = None
    lengths, kept, _ = steps
    total = sum(kept.values())
    end = 0
    for step in sorted(kept):
        length = lengths[step]
        end += kept[step]
        x = _whole(by_step[step]) if step in by_step else None
        if isinstance(x, str):
            return x
        if x is None or x.ndim != 2 or x.dtype.kind != "f" or len(x) > length:
            continue
        x = x[: max(0, len(x) - (length - kept[step]))]
        if out is None:
            if total * x.shape[1] > MOST_NUMBERS:
                return f"too many numbers for {total} rows; use a shorter prompt"
            out = np.full((total, x.shape[1]), np.nan, x.dtype)
        if x.shape[1] == out.shape[1]:  # NaN is "unknown" here: the engine's own becomes infinite
            out[end - len(x) : end] = np.where(np.isnan(x), np.inf, x)
    return "without input_ids or positions nobody knows its rows" if out is None else out


def _listed(steps: list[int]) -> str:
    """Return the first of these numbers, and how many more there are."""
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if steps[5:] else "")


register(Reader("sglang", "or a folder of SGLang's dumper", recognise, read))
