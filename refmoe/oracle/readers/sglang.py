"""A folder of SGLang's dumper, with a file for each tensor, named by its tags.

    step=0___rank=0___dump_index=7___name=NAME___layer_id=3.pt    {"value": tensor, "meta": {...}}

NAME is `non_intrusive__` and a module path with `.output`, `.output.0`, `.output.1` or
`.inputs.0` (DUMPER_NON_INTRUSIVE_MODE=all), a field of the batch (`input_ids`, `positions`), or
what the user called it, with `layer_id` beside it. The server's head is called by no hook: its
logits are those of each pass' last row (`next_token_logits`).

Steps are forward passes. Those of one prompt follow each other, as `positions` tell, and are read
as one sequence; without positions all steps are. Ranks that hold equal tensors are read once. Parts
are put together along the axis that `dims` names in `meta`: "t h[tp]" (comparator/dims_spec), older
"t h(tp)". Parts without `dims` are not read, and the notes say so.

Source: sgl-project/sglang, python/sglang/srt/debug_utils/dumper.py.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import MOST_NUMBERS, Arrays, Dump, Reader, register
from refmoe.oracle.readers.torch_file import ForeignError, load_torch

INPUTS = {"o_proj": "#context", "down_proj": ".act"}  # a module's input that is a point
FIRST = ("0", "x", "input", "input_", "hidden_states")
FIELDS = ("seq_lens", "req_pool_indices", "rids", "position_ids", "cu_seqlens_q", "cu_seqlens_kv")
LOGITS = "next_token_logits"
DIM = re.compile(r"(?:\w+|\([\w*]+\))(?:\[(\S+)\]|\((\S+)\))?")

Files = dict[str, dict[int, dict[int, Path]]]  # name → step → rank


class _Whole(NamedTuple):
    """Tensors whose parts and steps are put together."""

    arrays: Arrays
    lengths: dict[int, int]  # step → rows, where input_ids or positions tell
    unread: dict[str, str]  # name → why it could not be put together


def recognise(path: Path) -> bool:
    """Tell whether this is a folder; `read` says whether it is one of the dumper's."""
    return path.is_dir()


def read(path: Path) -> Dump:
    """Read every tensor of the folder, a name at a time.

    Raises `InputError` where a file cannot be read, or holds several prompts.
    """
    found, notes = _find_files(path)
    steps, said = _steps_of_prompt(path, found)
    if steps is not None:
        found = {n: {s: by[s] for s in by.keys() & steps} for n, by in found.items()}
    arrays, lengths, unread = _put_together(found)
    partial = frozenset[str]()
    if LOGITS in found and "lm_head" not in arrays:
        logits = _logits(found[LOGITS], lengths)
        if isinstance(logits, str):
            unread[LOGITS] = logits
        else:
            arrays["lm_head"], partial = logits, frozenset({"lm_head"})
    notes += said + _grouped(unread)
    used = {step for by_step in found.values() for step in by_step}
    if len(used) > 1:
        notes.append(f"{len(used)} steps are read as one sequence")
    tokens, _ = arrays.pop("input_ids", None), arrays.pop("positions", None)
    return dump_of_arrays(path, arrays, tokens, tuple(notes), partial)


def _put_together(found: Files) -> _Whole:
    """Join the parts of each tensor's ranks and the rows of its steps."""
    arrays: Arrays = {}
    lengths: dict[int, int] = {}
    unread: dict[str, str] = {}
    for name, by_step in found.items():
        if name == LOGITS or not by_step:
            continue
        parts = {step: _whole(by_step[step]) for step in sorted(by_step)}
        whole = [x for x in parts.values() if not isinstance(x, str)]
        if name in ("input_ids", "positions"):
            lengths |= {s: x.size for s, x in parts.items() if not isinstance(x, str)}
        if len(whole) < len(parts):
            unread[name] = next(why for why in parts.values() if isinstance(why, str))
        elif name.endswith("#experts") and whole[0].dtype.kind not in "iu":
            unread[name] = "no indices; this backend keeps its choices to itself"
        elif (joined := _joined(whole)) is None:
            unread[name] = "its shape is another in each step"
        else:
            arrays[name] = joined
    return _Whole(arrays, lengths, unread)


def _find_files(folder: Path) -> tuple[Files, list[str]]:
    """Return the files by name, step and rank, in the order of dumping, and notes; open none."""
    listed, others = [], 0
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        tags = dict(part.partition("=")[::2] for part in entry.name[:-3].split("___"))
        if not entry.name.endswith(".pt") or "name" not in tags or not entry.is_file():
            others += 1
        elif tags.get("recompute_status") != "recompute":  # a second time, for the gradients
            order = [_number(entry.name, tags, key) for key in ("step", "dump_index", "rank")]
            listed.append((order, tags, Path(entry.path)))
    if not listed:
        inside = sorted(e.name for e in entries if e.is_dir())[:3]
        hint = f"; give a folder inside it: {', '.join(inside)}" if inside else ""
        raise InputError(
            f"{folder}: no .pt file named like step=0___rank=0___dump_index=7___name=..., as "
            f"SGLang's dumper writes one for each tensor{hint}"
        )
    found: Files = {}
    fused, again = set(), Counter[str]()
    for (step, _, rank), tags, path in sorted(listed, key=lambda t: t[0]):
        if re.search(r"post_attention_layernorm\.inputs\.(1|residual)$", tags["name"]):
            fused.add(_layer(tags["name"]))
        name = _point(tags)
        if name is not None:
            ranks = found.setdefault(name, {}).setdefault(step, {})
            again[name] += rank in ranks
            ranks.setdefault(rank, path)
    for layer in fused:  # it adds the residual itself: its input is not the sum
        found.pop(f"model.layers.{layer}#attn_residual", None)
    notes = [f"{others} entries are no .pt files of the dumper"] if others else []
    twice = {n: "called more than once in a step, the first is read" for n in again if again[n]}
    fields = ("input_ids", "positions")  # every layer is given them
    return found, notes + _grouped({n: why for n, why in twice.items() if n not in fields})


def _number(file: str, tags: dict[str, str], key: str) -> int:
    """Return the number that a tag of a file's name has."""
    text = tags.get(key, "0")
    if not text.isdecimal() or len(text) > 18:
        raise InputError(f"{file}: {key} is {text!r}, expected a number; was the file renamed?")
    return int(text)


def _layer(name: str) -> str | None:
    """Return the number of the layer in a module path."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return found[1] if found else None


def _point(tags: dict[str, str]) -> str | None:
    """Return a tensor's name as adapt.py knows it; None for what is no result of a module."""
    name = tags["name"]
    if name in ("input_ids", "positions"):
        return name  # also from within a layer
    if name in FIELDS or name.startswith(("param__", "grad__")):
        return None
    if not name.startswith("non_intrusive__"):
        name = name.removesuffix("__output").removesuffix(".output")
        bare = "layer_id" in tags and _layer(name) is None
        return f"model.layers.{tags['layer_id']}.{name}" if bare else name
    path = name.removeprefix("non_intrusive__")
    found = re.fullmatch(r"(?:(.*)\.)?(output|inputs)(?:\.(\w+))?", path)
    if found is None:
        return None
    module, role, key = found[1] or "", found[2], found[3]
    at, _, last = module.rpartition(".")
    if role == "inputs":
        if last == "post_attention_layernorm" and key in FIRST:
            return f"{at}#attn_residual"
        return at + INPUTS[last] if last in INPUTS and key in FIRST else None
    if key == LOGITS:
        return LOGITS
    if last == "topk":  # weights, ids, logits; the weights are scaled by some backends
        return f"{at}.gate#experts" if key == "1" else None
    if key is None:
        return module
    if key == "0" and not last.isdecimal():  # of a layer it is the mlp's part without the residual
        return module
    return f"{module}#residual" if key == "1" and last.endswith("norm") else None


def _steps_of_prompt(folder: Path, found: Files) -> tuple[set[int] | None, list[str]]:
    """Return the steps of the prompt to read, the longest, and notes on the others.

    The steps are None where no positions tell which belong together. Raises `InputError` where a
    step holds several prompts, or no prompt is there from its beginning.
    """
    prompts: list[list[int]] = []
    late: list[int] = []
    following: int | None = None
    for step, ranks in sorted(found.get("positions", {}).items()):
        x = _load(ranks[min(ranks)])[0]
        if not isinstance(x, np.ndarray) or x.ndim != 1 or not x.size or x.dtype.kind not in "iu":
            return None, []
        if (np.diff(x) != 1).any():
            raise InputError(
                f"{folder}: step {step} holds several prompts (positions {x[:40].tolist()}); dump "
                "one request at a time"
            )
        if x[0] == 0:
            prompts.append([])
        elif x[0] != following:
            late.append(step)
            following = None
            continue
        prompts[-1].append(step)
        following = int(x[-1]) + 1
    if not prompts:
        if late:
            raise InputError(
                f"{folder}: no step begins at position 0, so a prefix came from the cache; start "
                "the server with --disable-radix-cache"
            )
        return None, []
    # the server warms up with a prompt of its own, which is short
    chosen = max(prompts, key=lambda steps: (_rows(found, steps), steps))
    others = sorted({s for steps in prompts for s in steps} - set(chosen))
    notes = []
    if others:
        notes.append(f"steps {_listed(others)} are other prompts and are not read")
    if late:
        notes.append(
            f"steps {_listed(late)} follow no other and are not read; if their prefix came from "
            "the cache, start the server with --disable-radix-cache"
        )
    return set(chosen), notes


def _rows(found: Files, steps: list[int]) -> int:
    """Return the number of positions in these steps."""
    by_step = found["positions"]
    return sum(_load(by_step[s][min(by_step[s])])[0].size for s in steps)


def _load(file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the value of a file, lists of integers as arrays, and its meta."""
    saved = load_torch(file)
    if not isinstance(saved, dict) or "value" not in saved:
        return saved, {}
    value, meta = saved["value"], saved.get("meta")
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        value = np.array(value)
    return value, meta if isinstance(meta, dict) else {}


def _whole(ranks: dict[int, Path]) -> np.ndarray | str:
    """Return what all ranks hold together, or in words why that is not known."""
    first, split, size = None, None, 0
    parts: dict[int, np.ndarray] = {}
    for rank, file in sorted(ranks.items()):
        try:
            x, meta = _load(file)
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


def _joined(parts: list[np.ndarray]) -> np.ndarray | None:
    """Put the rows of one step after those of another, behind a batch axis of one too.

    None where the shapes do not fit each other.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim and len({x.shape[1:] for x in parts}) == 1:
        return np.concatenate(parts)
    if all(x.ndim > 2 and len(x) == 1 for x in parts) and len({x.shape[2:] for x in parts}) == 1:
        return np.concatenate(parts, axis=1)
    return None


def _logits(by_step: dict[int, dict[int, Path]], lengths: dict[int, int]) -> np.ndarray | str:
    """Return logits [T, Z], NaN but for the last row of each step, or in words why not."""
    out = None
    total = sum(lengths.values())
    end = 0
    for step, length in sorted(lengths.items()):
        end += length
        x = _whole(by_step[step]) if step in by_step else None
        if isinstance(x, str):
            return x
        if x is None or x.ndim != 2 or x.dtype.kind != "f" or len(x) > length:
            continue
        if out is None:
            if total * x.shape[1] > MOST_NUMBERS:
                return f"too many numbers for {total} rows; use a shorter prompt"
            out = np.full((total, x.shape[1]), np.nan, x.dtype)
        if x.shape[1] == out.shape[1]:  # NaN is "unknown" here: the engine's own becomes infinite
            out[end - len(x) : end] = np.where(np.isnan(x), np.inf, x)
    return "without input_ids or positions nobody knows its rows" if out is None else out


def _grouped(reasons: dict[str, str]) -> list[str]:
    """Return a line for each reason, which stands for all layers and experts that it is said of."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault((re.sub(r"\.\d+(?=\W|$)", ".*", name), why), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{kind} ({len(names)} of them)'}: {why}"
        for (kind, why), names in groups.items()
    ]


def _listed(steps: list[int]) -> str:
    """Return the first of these numbers, and how many more there are."""
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if steps[5:] else "")


register(Reader("sglang", "or a folder of SGLang's dumper", recognise, read))
