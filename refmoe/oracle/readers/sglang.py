"""A folder of tensors that SGLang dumped, put together: ranks, steps, and which prompt they are of.

sglang_files.py says what the files are. The server's head is called by no hook: its logits are
those of each pass' last row (`next_token_logits`).

Steps are forward passes. `positions` or `position_ids` tell which rows are of one prompt: they
begin at 0 and go on, side by side in a step or in one step after another. Each prompt's rows are
put together in order, those that were computed again too; without positions all rows are one
prompt's. Ranks that hold equal tensors are read once.
Parts are put together along the axis that `dims` names in `meta`: "t h[tp]" (comparator/dims_spec),
older "t h(tp)". Parts without `dims` are not read, and the notes say so.

Source: sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
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


class _Part(NamedTuple):
    """Rows of one step that are of one prompt."""

    step: int
    rows: slice
    first: int  # its position in the prompt


@dataclass
class _Prompt:
    """The parts of one prompt, in order."""

    parts: list[_Part] = field(default_factory=list)
    following: int = 0  # the position of the next row

    def add(self, step: int, rows: slice, first: int) -> None:
        """Add the rows of a step that begin at this position."""
        self.parts.append(_Part(step, rows, first))
        self.following = first + rows.stop - rows.start


class _Steps(NamedTuple):
    """How many rows each step has, and whose they are."""

    lengths: dict[int, int]  # step → rows
    parts: list[_Part]  # of all prompts, one after the other
    batches: dict[int, tuple[int, int]]  # step → prompts, rows of each; empty: all side by side

    @property
    def ends(self) -> dict[int, int]:
        """How many rows a prompt has after each step that has no other prompt's."""
        alone = Counter(p.step for p in self.parts)
        return {p.step: p.first + self.lengths[p.step] for p in self.parts if alone[p.step] == 1}


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

    Raises `InputError` where a file cannot be read, where a step may go on with several prompts,
    and where nothing but the fields of a batch was dumped.
    """
    found, notes = find_files(path)
    positions = _positions(found.pop("positions", {}))
    prompts, said = _find_prompts(path, positions)
    lengths = {s: x.size for s, x in positions.items()} if prompts else _lengths(found)
    if not prompts and lengths:
        prompts = [_Prompt()]
        for step, rows in lengths.items():
            prompts[0].add(step, slice(0, rows), prompts[0].following)
    batched = any(len(x) > 1 for x in positions.values())
    batches = {s: (len(x), x.shape[1]) for s, x in positions.items() if batched}
    steps = _Steps(lengths, [part for p in prompts for part in p.parts], batches)
    if positions:
        used = {part.step for part in steps.parts}
        found = {n: {s: by[s] for s in by.keys() & used} for n, by in found.items()}
    whole = _put_together(found, steps)
    arrays, partial = whole.arrays, frozenset[str]()
    if LOGITS in found and "lm_head" not in arrays:
        logits = _logits(found[LOGITS], steps)
        if isinstance(logits, str):
            whole.nothing[LOGITS] = logits
        else:
            arrays["lm_head"], partial = logits, frozenset({"lm_head"})
    notes += said + grouped(whole.unread | whole.nothing)
    count = len({step for by_step in found.values() for step in by_step})
    if count > 1:
        what = "one sequence" if len(prompts) < 2 else f"{len(prompts)} prompts"
        notes.append(f"{count} steps are read as {what}")
    tokens = _tokens(arrays.pop("input_ids", None), prompts)
    dump = dump_of_arrays(path, arrays, tokens, tuple(notes), partial, unread=whole.unread)
    return dump


def _tokens(ids: np.ndarray | None, prompts: list[_Prompt]) -> Any:
    """Return the token ids of each prompt; `ids` has those of all parts, in their order."""
    if ids is None or sum(p.rows.stop - p.rows.start for q in prompts for p in q.parts) != ids.size:
        return ids
    out, flat, at = [], ids.reshape(-1).tolist(), 0
    for prompt in prompts:
        own: dict[int, int] = {}
        for part in prompt.parts:
            for i in range(part.rows.stop - part.rows.start):
                own[part.first + i] = flat[at]
                at += 1
        out.append([own[i] for i in sorted(own)])
    return out if len(out) > 1 else out[0]


def _lengths(found: Files) -> dict[int, int]:
    """Return the rows of each step whose token ids are there."""
    parts = {s: _whole(ranks) for s, ranks in sorted(found.get("input_ids", {}).items())}
    return {s: x.size for s, x in parts.items() if not isinstance(x, str)}


def _put_together(found: Files, rows: _Steps) -> _Whole:
    """Join the parts of each tensor's ranks, and the rows of its steps."""
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


def _positions(by_step: dict[int, dict[int, Tensor]]) -> dict[int, np.ndarray]:
    """Return the positions [B, T] of each step's rows; none where their form is not known."""
    out = {}
    for step, ranks in sorted(by_step.items()):
        x = load(ranks[min(ranks)])[0]
        if not isinstance(x, np.ndarray) or not x.size or x.dtype.kind not in "iu":
            return {}
        out[step] = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    return out


def _find_prompts(
    folder: Path, positions: dict[int, np.ndarray]
) -> tuple[list[_Prompt], list[str]]:
    """Return the prompts whose beginning is there, and notes on what is not read.

    Raises `InputError` where a step may go on with several prompts, or none is there from its
    beginning.
    """
    prompts: list[_Prompt] = []
    late: list[int] = []
    for step, x in positions.items():
        going = list(prompts)
        for rows, first in _runs(x):
            on = [p for p in going if p.following == first]
            if first == 0:
                on = [_Prompt()]
                prompts += on
            elif not on and going and first < going[-1].following:
                on = going[-1:]  # computed again from here on
            if len(on) > 1:
                begin = _listed([p.parts[0].step for p in on])
                raise InputError(
                    f"{folder}: step {step} begins at position {first} and may go on with any of "
                    f"the prompts that begin at steps {begin}; dump one request at a time"
                )
            for prompt in on:
                prompt.add(step, rows, first)
                going = [p for p in going if p is not prompt]
            if not on:
                late.append(step)
    dry = [p for p in prompts if p.following == 1]  # a server's dry runs have nothing to say
    notes = []
    if 0 < len(dry) < len(prompts):
        prompts = [p for p in prompts if p.following > 1]
        notes.append(f"{len(dry)} prompts of a single token, as of dry runs, are not read")
    if late and not prompts:
        raise InputError(
            f"{folder}: no step begins at position 0, so a prefix came from the cache; start "
            "the server with --disable-radix-cache"
        )
    if late:
        notes.append(
            f"steps {_listed(late)} have rows that follow no other and are not read: padding, or a "
            "prefix came from the cache; then start the server with --disable-radix-cache"
        )
    return prompts, notes


def _runs(positions: np.ndarray) -> list[tuple[slice, int]]:
    """Return rows of [B, T], as one axis, that go on with each other, and the first position."""
    flat = positions.reshape(-1)
    breaks = np.flatnonzero(np.diff(flat) != 1) + 1
    width = positions.shape[1]
    starts = sorted({0, *breaks.tolist(), *range(0, flat.size, width)})
    return [
        (slice(a, b), int(flat[a])) for a, b in zip(starts, [*starts[1:], flat.size], strict=True)
    ]


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


def _joined(steps: dict[int, np.ndarray], rows: _Steps) -> np.ndarray | None:
    """Put the rows of each prompt after those of the one before; None where they do not fit.

    Keys and values that were made anew for the whole cache have the rows of all steps before: the
    last ones are the step's own.
    """
    ranks = {x.ndim for x in steps.values()}
    if len(ranks) > 1 or ranks == {0}:
        return next(iter(steps.values())) if len(steps) == 1 else None
    lengths = rows.lengths
    flat = {s: _one_axis(x, rows.batches.get(s)) for s, x in steps.items()}
    axis, ends = _row_axis(flat, lengths), rows.ends
    cache = _row_axis(flat, ends) if axis is None else None
    own = [p for p in rows.parts if p.step in steps]
    if axis is not None:
        parts = [flat[p.step].take(range(p.rows.start, p.rows.stop), axis) for p in own]
    elif cache is not None:
        axis = cache
        parts = [flat[p.step].take(range(p.first, ends[p.step]), axis) for p in own]
    else:  # the rows of an expert, or nobody said how many a step has
        order = [p.step for p in own] if lengths else list(steps)
        if order != sorted(set(order)):
            return None  # which of its rows are whose is not known
        parts = [flat[step] for step in order]
        shapes = [x.shape for x in parts]
        axis = next((a for a in range(len(shapes[0])) if len({s[a] for s in shapes}) > 1), 0)
    if len({(*x.shape[:axis], *x.shape[axis + 1 :]) for x in parts}) > 1:
        return None
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def _one_axis(x: np.ndarray, batch: tuple[int, int] | None) -> np.ndarray:
    """Return a batch [B, T, ...] or [B, 1, S, ...] with one axis of rows, of S the last T."""
    if batch is None or x.ndim < 2 or len(x) != batch[0]:
        return x
    if x.ndim == 4 and x.shape[1] == 1 and x.shape[2] >= batch[1] > 1:
        x = x[:, 0, -batch[1] :]
    return x.reshape(-1, *x.shape[2:]) if x.shape[1] == batch[1] else x


def _row_axis(parts: dict[int, np.ndarray], lengths: dict[int, int]) -> int | None:
    """Return the axis that is as long as each step; of several, one that is not always one."""
    axes = range(next(iter(parts.values())).ndim)
    fit = [a for a in axes if all(x.shape[a] == lengths.get(s) for s, x in parts.items())]
    return min(fit, key=lambda a: all(x.shape[a] == 1 for x in parts.values()), default=None)


def _logits(by_step: dict[int, dict[int, Tensor]], steps: _Steps) -> np.ndarray | str:
    """Return logits [T, Z], NaN but for the last rows of each part, or in words why not.

    A step that has a row of logits for each of its prompts has the last ones.
    """
    out = None
    total = sum(p.rows.stop - p.rows.start for p in steps.parts)
    end = 0
    for part in steps.parts:
        length = part.rows.stop - part.rows.start
        end += length
        x = _whole(by_step[part.step]) if part.step in by_step else None
        if isinstance(x, str):
            return x
        if x is None or x.ndim != 2 or x.dtype.kind != "f" or len(x) > steps.lengths[part.step]:
            continue
        beside = sorted(p.rows.start for p in steps.parts if p.step == part.step)
        if len(x) == len(beside) > 1:
            x = x[beside.index(part.rows.start)][None]
        elif len(beside) > 1:
            continue
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
