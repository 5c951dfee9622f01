"""The charts of a report: errors by row against what is explained."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refmoe.oracle.judge import Flip, Judgement
from refmoe.oracle.report.map import count
from refmoe.oracle.statistics import row_levels

BINS = 240  # marks of a chart


@dataclass(frozen=True)
class Mark:
    """One row of a chart."""

    row: int
    value: float
    level: float | None  # of noise
    limit: float  # what is explained of one row

    @property
    def outside(self) -> bool:
        return self.value > self.limit


class Chart:
    """Values by row on a logarithmic scale, in a box of SVG; what lies outside has another form.

    Of more rows than `BINS` only the worst of neighbouring ones are drawn.
    """

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
        """Return where row i begins."""
        return round(self.left + i * self.step, 1)

    def y(self, value: float) -> float:
        """Return the height of a value."""
        share = (np.log10(max(value, 10.0**self.low)) - self.low) / (self.top - self.low)
        return round(float((1 - share) * (self.height - self.bottom - 10) + 10), 1)

    @property
    def floor(self) -> int:
        return self.height - self.bottom

    def stairs(self, name: str) -> str:
        """Return an SVG path of an attribute of the marks, level over each row."""
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
            f"{count(len(self.marks), self.unit)} outside what noise explains of one alone. "
            f"{'Furthest' if self.wrong else 'Nearest to it'} is {self.unit} {w.row}, "
            f"{w.value:.2g} where {w.limit:.2g} is explained."
        )


def charts(case: Judgement, flips: list[Flip]) -> Iterator[Chart]:
    """Yield the chart of the point at fault; of a healthy engine, the one nearest its limit."""
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
    """Return the errors of a point by row, with their noise and what is explained of one row."""
    rows = case.rows[point]
    level = row_levels((rows.noise**2).mean(axis=0))
    each = zip(rows.error.tolist(), level.tolist(), strict=True)
    most = float(rows.explained[1])
    return [Mark(i, error, noise, noise * most) for i, (error, noise) in enumerate(each)]
