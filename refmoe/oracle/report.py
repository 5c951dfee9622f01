"""A report as one page to look at: verdict and cause, a map of layers × operations, the evidence.

The page (report.html) is whole in itself: no script, no font, no picture from elsewhere, and a
policy that forbids them. What a dump says of itself, its names above all, is escaped, and what
does not print in it is written as \\x.. . Colour repeats what number, mark or outline say.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import refmoe
from refmoe.files import write_atomically
from refmoe.oracle.faults.dictionary import BY_ID
from refmoe.oracle.judge import Flip, Judgement, Report, flips
from refmoe.oracle.statistics import PointResult, row_levels
from refmoe.oracle.words import split_convention

MOST = 1000  # rows of any list, so that a page of a large model still opens
LONGEST = 300  # letters of a name that is nobody's point
BINS = 240  # marks of a chart
STEPS = (0.25, 0.5, 0.75, 1.0, 3.0, 10.0, 100.0)  # of the map's colours, in multiples
ICONS = {"pass": "✓", "fault": "✗", "undecidable": "?"}
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
LAYER = re.compile(r"model\.layers\.(\d+)\.?(.*)")
EXPERT = re.compile(r"mlp\.experts\.\d+\b.*")
ISSUE = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)", re.ASCII)


def write(case: Judgement, file: str | Path, title: str | None = None) -> Path:
    """Write the page; under its final name it is either whole or not there."""
    file = Path(file)
    page = render(case, title)
    with write_atomically(file) as part:
        part.write_text(page, "utf-8")
    return file


def render(case: Judgement, title: str | None = None) -> str:
    """The page as text. Its title is the dump's file name, unless another is given."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report, found = case.report, list(flips(case.decoder, case.exact, case.envelope))
    cells = _Cells(case, found)
    grid = _Map(case, cells)
    model = [n for n in dict.fromkeys(case.exact.order) if not LAYER.match(n)]
    return env.get_template("report.html").render(
        r=report,
        title=title or case.dump.path.name,
        version=refmoe.__version__,
        icon=ICONS[report.verdict],
        said=_sentences(case),
        cause=_cause(report),
        map=grid,
        model=[(n, cells.points.get(n), cells.of(n)) for n in model],
        steps=_legend(),
        marks=_signs([c for _, row in grid.rows for _, c in row if c] + list(map(cells.of, model))),
        charts=list(_charts(case, found)),
        not_finite=_not_finite(case),
        flips=sorted(found, key=lambda f: f.explained)[:MOST],
        flips_of=len(found),
        routers=sum(p.endswith("#experts") for p in case.exact.theirs),
        sides=[(name, *split_convention(text)) for name, text in report.conventions.items()],
        tokens=len(case.tokens),
        runs=max((len(r.noise) for r in case.rows.values()), default=0),
        lacking=_ranges(report.missing),
        unmatched=[(n[:LONGEST], why) for n, why in report.unmatched.items()][:MOST],
        notes=case.dump.notes[:MOST],
        points=report.points[:MOST],
        most=MOST,
    )


def _printable(value: Any) -> Any:
    """Nothing that hides, reorders or ends text: \\x.. in its place. Applied to every output."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


# --- verdict and cause


def _sentences(case: Judgement) -> list[str]:
    """The verdict in plain words."""
    r = case.report
    if r.verdict == "undecidable":
        return [f"This dump does not let anyone say whether the engine is right: {r.reason}."]
    if r.verdict == "pass":
        said = [
            f"All {_count(len(r.points), 'operation')} compared lie within what rounding explains, "
            f"in {r.profile} and by the conventions of {r.engine}."
        ]
        if r.missing:
            said.append(f"Of {_count(len(r.missing), 'operation')} the dump has no result.")
        return said
    before = {p for p in case.exact.order[: case.exact.order.index(r.point or "")]}
    passed = sum(p.name in before for p in r.points)
    point = next((p for p in r.points if p.name == r.point), None)
    if point:
        found = f"its error is {r.reason}"
    elif r.reason == "not finite":
        found = "its result holds numbers that are not finite"
    else:
        found = r.reason
    said = [f"Here the engine first goes wrong: {found}."]
    if passed:
        said.append(
            f"The {_count(passed, 'operation')} compared before it "
            f"{'lies' if passed == 1 else 'lie'} within what rounding explains."
        )
    return said


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _cause(r: Report) -> dict[str, Any] | None:
    if r.cause is None:
        return None
    return {
        "text": _capital(r.cause.text),
        "references": [(text, _link(text)) for text in r.cause.references],
        "equivalent": [(i, _fault(i)) for i in r.cause.equivalent],
        "runner_up": _fault(r.cause.runner_up) if r.cause.runner_up else None,
    }


def _capital(text: str) -> str:
    """As a sentence begins, unless it begins with a name from a config."""
    return text if "_" in text.split(" ")[0] else text[:1].upper() + text[1:]


def _fault(id: str) -> str:
    return BY_ID[id].text if id in BY_ID else ""


def _link(reference: str) -> str | None:
    found = ISSUE.fullmatch(reference)
    return f"https://github.com/{found[1]}/issues/{found[2]}" if found else None


# --- the map


@dataclass(frozen=True)
class Cell:
    text: str
    said: str  # the same in words, for a pointer that rests on it and for a reader's voice
    shade: str  # a class of the style sheet
    rank: float  # of two, the one to show
    outside: bool = False
    first: bool = False


class _Cells:
    """What there is to say of any point of ours."""

    def __init__(self, case: Judgement, flips: list[Flip]):
        self.case = case
        self.points = {p.name: p for p in case.report.points}
        self.within = {name: p.name for p in case.report.points for name in p.through}
        self.flips: dict[int, list[Flip]] = {}
        for f in flips:
            self.flips.setdefault(f.layer, []).append(f)

    def of(self, name: str) -> Cell:
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
        said = f"{name}: {_count(len(found), 'choice')} differ, {wrong} not explained by noise"
        text = f"{wrong or len(found)}⇄"
        verdict = "outside" if wrong else "inside"
        return Cell(text, f"{said}, {verdict}", "bad" if wrong else "s1", wrong, wrong > 0, first)


def multiple(m: float) -> str:
    """Short enough for a cell; the mark says that it is outside."""
    if m <= 1:
        return f"{m:.2f}"[1:] if 0.005 <= m < 0.995 else f"{m:.0f}"
    if m < 999.5:
        return f"{m:.1f}×" if m < 9.95 else f"{m:.0f}×"
    return re.sub(r"e\+0?", "e", f"{m:.0e}×")


def shade(m: float) -> str:
    """By the logarithm, more or less: four calm ones up to 1, four warm ones above."""
    return f"s{bisect_right(STEPS, m) if m != 1 else 3}"


def _legend() -> list[tuple[str, str]]:
    ends = [f"{s:g}" for s in STEPS]
    texts = [f"below {ends[0]}", *(f"{a}–{b}" for a, b in pairwise(ends))]
    return [(f"s{i}", text) for i, text in enumerate([*texts, f"above {ends[-1]}"])]


def _signs(shown: list[Cell]) -> list[tuple[str, str]]:
    """Those that there are, and what they mean."""
    return [m for m in MARKS if any(c.text.endswith(m[0]) for c in shown)]


class _Map:
    """Rows: layers. Columns: operations in order of computation, of all kinds of layers."""

    def __init__(self, case: Judgement, cells: _Cells):
        names: dict[int, dict[str, list[str]]] = {}
        for name in dict.fromkeys(case.exact.order):
            found = LAYER.fullmatch(name)
            if found and not name.endswith("#rows"):
                op = EXPERT.sub("mlp.experts.E.*", found[2])
                names.setdefault(int(found[1]), {}).setdefault(op, []).append(name)
        self.columns = _merged(names.values())
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


def _worst(cells: _Cells, names: list[str]) -> Cell | None:
    if not names:
        return None
    found = [cells.of(n) for n in names]
    worst = max(found, key=lambda c: (c.first, c.outside, c.rank))
    if len(found) == 1 or worst.rank < 0:
        return worst
    known = sum(c.rank >= 0 for c in found)
    said = f"worst of {_count(known, 'point')} of single experts: {worst.said}"
    return Cell(worst.text, said, worst.shade, worst.rank, worst.outside, worst.first)


def _merged(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """One order that keeps each layer's; where they part, what the earlier layer does is first."""
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
    """Group and name of a column; a group of no name holds what is the layer's own."""
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


def _ranges(names: Iterable[str]) -> list[tuple[str, str]]:
    """Operation and its layers: ("mlp.experts", "layers 1–60")."""
    layers: dict[str, list[int]] = {}
    out: dict[str, str] = {}
    for name in names:
        found = LAYER.fullmatch(name)
        if found:
            layers.setdefault(found[2] or "the layer's output", []).append(int(found[1]))
        else:
            out[name] = "of the model"
    for op, numbers in layers.items():
        runs = [
            [n for _, n in run] for _, run in groupby(enumerate(numbers), lambda x: x[1] - x[0])
        ]
        text = ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
        out[op] = f"layer{'s' if len(numbers) > 1 else ''} {text}"
    return list(out.items())


# --- the evidence


@dataclass(frozen=True)
class Mark:
    row: int
    value: float
    level: float | None  # of noise
    limit: float  # what is explained of one row

    @property
    def outside(self) -> bool:
        return self.value > self.limit


class Chart:
    """Values by row on a logarithmic scale, in a box of SVG; what lies outside has another form."""

    width, height, left, bottom = 1080, 280, 52, 44

    def __init__(self, id: str, point: str, what: str, unit: str, marks: list[Mark]):
        self.id, self.point, self.what, self.unit = id, point, what, unit
        self.marks, self.wrong = marks, sum(m.outside for m in marks)
        self.per_bin = -(-len(marks) // BINS)
        bins = [marks[i : i + self.per_bin] for i in range(0, len(marks), self.per_bin)]
        self.shown = [max(b, key=lambda m: m.value / m.limit) for b in bins]
        self.worst = max(marks, key=lambda m: m.value / m.limit)
        seen = [v for m in self.shown for v in (m.value, m.level, m.limit) if v]
        top = int(np.ceil(np.log10(max(seen)) + 0.05))
        low = max(int(np.floor(np.log10(min(seen)) - 0.05)), top - 8)
        self.low, self.top = low, max(top, low + 2)

    @property
    def step(self) -> float:
        return (self.width - self.left - 8) / len(self.shown)

    def x(self, i: float) -> float:
        return round(self.left + i * self.step, 1)

    def y(self, value: float) -> float:
        share = (np.log10(max(value, 10.0**self.low)) - self.low) / (self.top - self.low)
        return round(float((1 - share) * (self.height - self.bottom - 10) + 10), 1)

    @property
    def floor(self) -> int:
        return self.height - self.bottom

    def stairs(self, name: str) -> str:
        """A path that keeps its level over each row."""
        levels = [self.y(getattr(m, name)) for m in self.shown]
        return "M" + "L".join(f"{self.x(i)} {y}L{self.x(i + 1)} {y}" for i, y in enumerate(levels))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        every = -(-(self.top - self.low) // 5)
        signs = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        exponents = range(self.low, self.top + 1, every)
        return [(self.y(10.0**k), "10" + str(k).translate(signs) if k else "1") for k in exponents]

    @property
    def labels(self) -> list[tuple[float, int]]:
        every = -(-len(self.shown) // 12)
        return [(self.x(i + 0.5), self.shown[i].row) for i in range(0, len(self.shown), every)]

    @property
    def text(self) -> str:
        w = self.worst
        return (
            f"{self.what} by {self.unit}, on a logarithmic scale. {self.wrong} of "
            f"{_count(len(self.marks), self.unit)} outside what noise explains of one alone. "
            f"{'Furthest' if self.wrong else 'Nearest to it'} is {self.unit} {w.row}, "
            f"{w.value:.2g} where {w.limit:.2g} is explained."
        )


def _charts(case: Judgement, flips: list[Flip]) -> Iterator[Chart]:
    """Of the point at fault; of a healthy engine, the one nearest to its limit."""
    r, point = case.report, case.report.point
    if point is None and r.points:
        point = max(r.points, key=lambda p: p.multiple).name
    if point in case.rows:
        marks = _marks(case, point)
        unit = "token" if len(marks) == len(case.tokens) else "row"
        yield Chart("chart-rows", point, "Relative error", unit, marks)
    elif point is not None and point.endswith("#experts"):
        layer = int(point.split(".")[2])
        here = [f for f in flips if f.layer == layer and np.isfinite(f.gap)]
        if here:
            marks = [Mark(f.token, f.gap, None, f.tie) for f in here]
            yield Chart(
                "chart-gaps", point, "Gap of the scores that changed places", "token", marks
            )


def _marks(case: Judgement, point: str) -> list[Mark]:
    rows = case.rows[point]
    level = row_levels((rows.noise**2).mean(axis=0))
    each = zip(rows.error.tolist(), level.tolist(), strict=True)
    most = float(rows.explained[1])
    return [Mark(i, error, noise, noise * most) for i, (error, noise) in enumerate(each)]


def _not_finite(case: Judgement) -> dict[str, Any] | None:
    point = case.report.point
    if point is None or case.report.reason != "not finite" or point not in case.exact.theirs:
        return None
    theirs = case.exact.theirs[point]
    bad = ~np.isfinite(theirs).reshape(len(theirs), -1)
    rows = np.flatnonzero(bad.any(axis=1))
    return {"numbers": int(bad.sum()), "of": bad.size, "rows": rows[:20].tolist(), "in": len(rows)}
