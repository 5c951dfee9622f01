"""The map of a report: layers × operations, a cell for each."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from refmoe.model.points import LAYER, parse
from refmoe.oracle.judge import Flip, Judgement
from refmoe.oracle.statistics import PointResult

STEPS = (0.25, 0.5, 0.75, 1.0, 3.0, 10.0, 100.0)  # of the map's colours, in multiples
MARKS = (
    ("–", "not in the dump"),
    ("⋯", "not in the dump, judged with the next that is"),
    ("=", "the same experts"),
    ("⇄", "tokens that went to other experts"),
    ("NaN", "not finite"),
    ("≠", "of another shape"),
    ("?", "in the dump, cannot be judged"),
    ("!", "no expert's index"),
)


def operation(name: str) -> tuple[int | None, str]:
    """Return the layer of a point, None for the ends, and its name within; experts are one."""
    point = parse(name)
    if point.expert is not None:
        return point.layer, "mlp.experts.E.*"
    return point.layer, point.name.removeprefix(LAYER).removeprefix(".")


def count(n: int, what: str) -> str:
    """Return a number and its noun: 1 row, 2 rows."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Cell:
    """One cell of the map: what it shows, and how."""

    text: str
    said: str  # in words, for a pointer that rests on it and for a reader's voice
    shade: str  # a class of the style sheet
    rank: float  # of two, the one to show
    outside: bool = False
    first: bool = False


class Cells:
    """The cell of any point of ours."""

    def __init__(self, case: Judgement, flips: list[Flip]):
        self.case = case
        self.points = {p.name: p for p in case.report.points}
        self.within = {name: p.name for p in case.report.points for name in p.through}
        self.flips: dict[int, list[Flip]] = {}
        for f in flips:
            self.flips.setdefault(f.layer, []).append(f)

    def of(self, name: str) -> Cell:
        """Return the cell of this point."""
        exact, first = self.case.exact, name == self.case.report.point
        if name in self.points:
            return self._judged(self.points[name], first)
        if name in exact.theirs and name.endswith("#experts"):
            return self._chosen(name, first)
        if name in exact.theirs:
            if not np.isfinite(exact.theirs[name]).all():
                return Cell("NaN", f"{name}: not finite, outside", "bad", np.inf, True, first)
            return Cell("?", f"{name}: in the dump, cannot be judged", "off", -1)
        if name in exact.broken:
            return Cell("!", f"{name}: {exact.misfits[name]}, outside", "bad", np.inf, True, first)
        if name in exact.misfits:
            return Cell("≠", f"{name}: of another shape, {exact.misfits[name]}", "off", -1)
        if name in self.within:
            said = f"{name}: not in the dump, judged together with {self.within[name]}"
            return Cell("⋯", said, "off", -2)
        return Cell("–", f"{name}: not in the dump", "off", -3)

    def _judged(self, p: PointResult, first: bool) -> Cell:
        outside = first or p.multiple > 1
        said = (
            f"{p.name}: relative error {p.rel_error:.1e}, explained {p.envelope:.1e}, "
            f"{p.multiple:.3g} times, {'outside' if outside else 'inside'}"
        )
        return Cell(multiple(p.multiple), said, shade(p.multiple), p.multiple, outside, first)

    def _chosen(self, name: str, first: bool) -> Cell:
        found = self.flips.get(int(name.split(".")[2]), [])
        wrong = sum(not f.explained for f in found)
        if not found:
            return Cell("=", f"{name}: the same experts, inside", "s0", 0)
        said = f"{name}: {count(len(found), 'choice')} differ, {wrong} not explained by noise"
        text = f"{wrong or len(found)}⇄"
        verdict = "outside" if wrong else "inside"
        return Cell(text, f"{said}, {verdict}", "bad" if wrong else "s1", wrong, wrong > 0, first)


def multiple(m: float) -> str:
    """Return a multiple in few letters; × marks one that is outside."""
    if m <= 1:
        return f"{m:.2f}"[1:] if 0.005 <= m < 0.995 else f"{m:.0f}"
    if m < 999.5:
        return f"{m:.1f}×" if m < 9.95 else f"{m:.0f}×"
    return re.sub(r"e\+0?", "e", f"{m:.0e}×")


def shade(m: float) -> str:
    """Return the class of a multiple's colour: four calm ones up to 1, four warm ones above."""
    return f"s{bisect_right(STEPS, m) if m != 1 else 3}"


def legend() -> list[tuple[str, str]]:
    """Return the classes of colours, and which multiples they stand for."""
    ends = [f"{s:g}" for s in STEPS]
    texts = [f"below {ends[0]}", *(f"{a}–{b}" for a, b in pairwise(ends))]
    return [(f"s{i}", text) for i, text in enumerate([*texts, f"above {ends[-1]}"])]


def signs(shown: list[Cell]) -> list[tuple[str, str]]:
    """Return the marks that are in these cells, and what they mean."""
    return [m for m in MARKS if any(c.text.endswith(m[0]) for c in shown)]


class Map:
    """Layers (rows) × operations (columns), in the order of computation, of all kinds of layers."""

    def __init__(self, case: Judgement, cells: Cells):
        names: dict[int, dict[str, list[str]]] = {}
        for name in dict.fromkeys(case.exact.order):
            layer, op = operation(name)
            if layer is not None and not name.endswith("#rows"):
                names.setdefault(layer, {}).setdefault(op, []).append(name)
        self.columns = merge_orders(names.values())
        runs = groupby(self.columns, key=lambda op: _heading(op)[0])
        self.groups = [(group, len(list(ops))) for group, ops in runs]
        self.starts = {op for i, op in enumerate(self.columns) if self._new_group(i)}
        self.headings = [(op, _heading(op)[1]) for op in self.columns]
        self.rows = [
            (i, [(op, _worst(cells, ops.get(op, []))) for op in self.columns])
            for i, ops in names.items()
        ]

    def _new_group(self, i: int) -> bool:
        return i > 0 and _heading(self.columns[i])[0] != _heading(self.columns[i - 1])[0]


def _worst(cells: Cells, names: list[str]) -> Cell | None:
    """Return the cell to show for several points, those of single experts; None for no point."""
    if not names:
        return None
    found = [cells.of(n) for n in names]
    worst = max(found, key=lambda c: (c.first, c.outside, c.rank))
    if len(found) == 1 or worst.rank < 0:
        return worst
    known = sum(c.rank >= 0 for c in found)
    said = f"worst of {count(known, 'point')} of single experts: {worst.said}"
    return Cell(worst.text, said, worst.shade, worst.rank, worst.outside, worst.first)


def merge_orders(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one order of operations that keeps each layer's.

    Where two layers part, what the earlier one does is first.
    """
    out: list[str] = []
    for ops in layers:
        at = len(out)
        for op in reversed(list(ops)):
            if op in out:
                at = out.index(op)
            else:
                out.insert(at, op)
    return out


def _heading(op: str) -> tuple[str, str]:
    """Return group and name of a column; the group without a name has the layer's own points."""
    for start, group in (
        ("self_attn", "attention"),
        ("mlp.gate_proj", "dense MLP"),
        ("mlp.up_proj", "dense MLP"),
        ("mlp.act", "dense MLP"),
        ("mlp.down_proj", "dense MLP"),
        ("mlp.gate", "router"),
        ("mlp.experts", "experts"),
        ("mlp.shared_experts", "shared expert"),
    ):
        if op.startswith(start):
            short = op.removeprefix("self_attn").removeprefix("mlp.").lstrip(".")
            return group, short.removeprefix("shared_experts.") or "self_attn"
    return "", op or "layer's output"
