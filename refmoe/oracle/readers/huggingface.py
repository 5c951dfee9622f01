"""Names of what a Hugging Face model returns → names of points.

Of a forward pass (`output_hidden_states`, `output_router_logits`), and of generate with
`return_dict_in_generate`, where each entry is a tuple over steps as well:

    hidden_states.i        model.embed_tokens, model.layers.0, ..., the last: model.norm
    last_hidden_state      model.norm
    router_logits.i        model.layers.L.mlp.gate of the last layers
    logits                 lm_head
    hidden_states.s.i      hidden_states.i of step s: a prompt, then a token at a time
    logits.s               the last row of step s; `scores` are what sampling made of them

hidden_states has one more entry than there are layers, and the last is what the final norm made of
the last layer (huggingface/transformers, utils/output_capturing.py); all of them must be there, or
none can be told to be the last. Only `sequences` says what was generated, one token more than rows.
"""

import re
from typing import NamedTuple

import numpy as np

from refmoe.oracle.readers.base import MOST_NUMBERS, Arrays


class Outputs(NamedTuple):
    """A model's outputs under the names of points."""

    arrays: Arrays
    sequence: np.ndarray | None  # as many tokens as rows
    partial: frozenset[str]
    notes: tuple[str, ...]


def name_outputs(arrays: Arrays, sequence: np.ndarray | None) -> Outputs:
    """Return the arrays under the names of points; what is no such output keeps its name.

    `sequence` are all tokens after generate, the last of which was never an input.
    """
    left, notes = dict(arrays), []
    hidden = _take_steps(left, "hidden_states") or _take(left, "hidden_states")
    routers = _take_steps(left, "router_logits") or _take(left, "router_logits")
    logits = _take(left, "logits")
    if _take(left, "scores"):
        notes.append("scores: what sampling made of the logits; give logits (output_logits)")
    out: Arrays = {}
    last = max(hidden, default=0)
    if whole := len(hidden) == last + 1 > 1:
        out["model.norm"] = hidden.pop(last)
    elif last:
        del hidden[last]
        notes.append(f"hidden_states.{last}: others are missing; is it the last, after the norm?")
    for i, x in hidden.items():
        out[f"model.layers.{i - 1}" if i else "model.embed_tokens"] = x
    numbers = [int(m[1]) for n in arrays if (m := re.match(r"model\.layers\.(\d+)", n))]
    layers = last if whole else max(numbers, default=-1) + 1
    if routers and layers >= len(routers) == max(routers) + 1:
        for i, x in routers.items():
            out[f"model.layers.{layers - len(routers) + i}.mlp.gate"] = x
    elif routers:
        notes.append("router_logits: of which layers? hidden_states or all routers are missing")
    rows = _rows(out) or _rows({n: left[n] for n in ("logits",) if n in left})
    if sequence is not None and sequence.ndim:
        rows = rows or (sequence.shape[-1] - 1 if logits else 0)
        sequence = sequence[..., : rows or None]
    partial = frozenset[str]()
    if logits:
        known = _last_rows([logits[i] for i in sorted(logits)], rows)
        if known is None:
            notes.append(f"logits of {len(logits)} steps: no hidden_states, no sequences, no rows")
        else:
            out["lm_head"], partial = known, frozenset({"lm_head"})
    for name, x in left.items():
        out.setdefault({"logits": "lm_head", "last_hidden_state": "model.norm"}.get(name, name), x)
    return Outputs(out, sequence, partial, tuple(notes))


def _take(arrays: Arrays, name: str) -> dict[int, np.ndarray]:
    """Take the entries NAME.i of a tuple out of the arrays: i → array."""
    found = [n for n in arrays if re.fullmatch(rf"{name}\.\d{{1,9}}", n)]
    return dict(sorted((int(n.rpartition(".")[2]), arrays.pop(n)) for n in found))


def _take_steps(arrays: Arrays, name: str) -> dict[int, np.ndarray]:
    """Take the entries NAME.step.i out of the arrays, and join the rows of all steps: i → array.

    Nothing is taken where the shapes of the steps do not fit each other.
    """
    found = [n for n in arrays if re.fullmatch(rf"{name}\.\d{{1,9}}\.\d{{1,9}}", n)]
    parts: dict[int, dict[int, np.ndarray]] = {}
    for n in found:
        _, step, layer = n.rsplit(".", 2)
        parts.setdefault(int(layer), {})[int(step)] = arrays[n]
    out: dict[int, np.ndarray] = {}
    for i, by_step in sorted(parts.items()):
        rows = [by_step[s] for s in sorted(by_step)]
        axis = max(rows[0].ndim - 2, 0)
        if len({(*x.shape[:axis], *x.shape[axis + 1 :]) for x in rows}) == 1 and rows[0].ndim:
            out[i] = np.concatenate(rows, axis)
    if len(out) == len(parts):
        for n in found:
            del arrays[n]
    return out if len(out) == len(parts) else {}  # beams of another number: no sequence


def _rows(named: Arrays) -> int:
    """Return the number of rows of these arrays, 0 where none tells."""
    return next((x.shape[-2] for x in named.values() if x.ndim > 1), 0)


def _last_rows(steps: list[np.ndarray], rows: int) -> np.ndarray | None:
    """Return logits [T, Z] of which the last rows are known, one a step; the others are NaN.

    The engine's own NaN becomes infinite: a fault, and no unknown number.
    """
    if rows < len(steps) or len({x.shape for x in steps}) > 1 or steps[0].dtype.kind != "f":
        return None
    width = steps[0].shape[-1] if steps[0].ndim else 0
    if any(x.size != width for x in steps) or not width or rows * width > MOST_NUMBERS:
        return None
    out = np.full((rows, width), np.nan, steps[0].dtype)
    for t, x in enumerate(steps, rows - len(steps)):
        out[t] = np.where(np.isnan(x), np.inf, x).reshape(-1)
    return out
