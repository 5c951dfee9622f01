"""A report as one HTML page: verdict and cause, a map of layers × operations, the evidence.

The page (page.html) needs nothing else: no script, no font, no picture from elsewhere, and a policy
that forbids them. What a dump says of itself, its names above all, is escaped, and what does not
print in it is written as \\x.. . Colour repeats what number, mark or outline say.
"""

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import refmoe
from refmoe.files import write_atomically
from refmoe.model.points import parse
from refmoe.oracle.faults.dictionary import BY_ID
from refmoe.oracle.judge import Judgement, Report, flips
from refmoe.oracle.report.chart import charts
from refmoe.oracle.report.map import Cells, Map, count, legend, operation, signs
from refmoe.oracle.words import split_convention

MOST = 1000  # rows of any list, so that a page of a large model still opens
LONGEST = 300  # letters of a name that is nobody's point
ICONS = {"pass": "✓", "fault": "✗", "undecidable": "?"}
ISSUE = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)", re.ASCII)


def write(case: Judgement, file: str | Path, title: str | None = None) -> Path:
    """Write the page; under its final name it is either whole or not there."""
    file = Path(file)
    page = render(case, title)
    with write_atomically(file) as part:
        part.write_text(page, "utf-8")
    return file


def render(case: Judgement, title: str | None = None) -> str:
    """Return the page as text; its title is the dump's file name, unless another is given."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report, found = case.report, list(flips(case.decoder, case.exact, case.envelope, case.profile))
    cells = Cells(case, found)
    grid = Map(case, cells)
    model = [n for n in dict.fromkeys(case.exact.order) if parse(n).layer is None]
    return env.get_template("page.html").render(
        r=report,
        title=title or case.dump.path.name,
        version=refmoe.__version__,
        icon=ICONS[report.verdict],
        said=_sentences(case),
        cause=_cause(report),
        map=grid,
        model=[(n, cells.points.get(n), cells.of(n)) for n in model],
        steps=legend(),
        marks=signs([c for _, row in grid.rows for _, c in row if c] + list(map(cells.of, model))),
        charts=list(charts(case, found)),
        not_finite=_not_finite(case),
        flips=sorted(found, key=lambda f: f.explained)[:MOST],
        flips_of=len(found),
        routers=sum(p.endswith("#experts") for p in case.exact.theirs),
        sides=[(name, *split_convention(text)) for name, text in report.conventions.items()],
        tokens=len(case.tokens),
        runs=max((len(r.noise) for r in case.rows.values()), default=0),
        lacking=layer_ranges(report.missing),
        unmatched=[(n[:LONGEST], why) for n, why in report.unmatched.items()][:MOST],
        notes=case.dump.notes[:MOST],
        points=report.points[:MOST],
        most=MOST,
    )


def _printable(value: Any) -> Any:
    """Return a value with \\x.. for what hides, reorders or ends text; applied to every output."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


# --- verdict and cause


def _sentences(case: Judgement) -> list[str]:
    """Return the verdict in plain sentences."""
    r = case.report
    if r.verdict == "undecidable":
        return [f"This dump does not let anyone say whether the engine is right: {r.reason}."]
    if r.verdict == "pass":
        said = [
            f"All {count(len(r.points), 'operation')} compared lie within what rounding explains, "
            f"in {r.profile} and by the conventions of {r.engine}."
        ]
        if r.missing:
            said.append(f"Of {count(len(r.missing), 'operation')} the dump has no result.")
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
            f"The {count(passed, 'operation')} compared before it "
            f"{'lies' if passed == 1 else 'lie'} within what rounding explains."
        )
    return said


def _cause(r: Report) -> dict[str, Any] | None:
    """Return what the page says of the cause."""
    if r.cause is None:
        return None
    return {
        "text": _capital(r.cause.text),
        "references": [(text, _link(text)) for text in r.cause.references],
        "equivalent": [(i, _fault(i)) for i in r.cause.equivalent],
        "runner_up": _fault(r.cause.runner_up) if r.cause.runner_up else None,
    }


def _capital(text: str) -> str:
    """Return a text as a sentence begins, unless it begins with a name from a config."""
    return text if "_" in text.split(" ")[0] else text[:1].upper() + text[1:]


def _fault(id: str) -> str:
    """Return what a fault of the dictionary is."""
    return BY_ID[id].text if id in BY_ID else ""


def _link(reference: str) -> str | None:
    """Return the address of an issue; None for anything else."""
    found = ISSUE.fullmatch(reference)
    return f"https://github.com/{found[1]}/issues/{found[2]}" if found else None


# --- lists


def layer_ranges(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return operations and their layers: ("mlp.experts", "layers 1–60")."""
    layers: dict[str, list[int]] = {}
    out: dict[str, str] = {}
    for name in names:
        layer, op = operation(name)
        if layer is not None:
            layers.setdefault(op or "the layer's output", []).append(layer)
        else:
            out[name] = "of the model"
    for op, numbers in layers.items():
        runs = [
            [n for _, n in run] for _, run in groupby(enumerate(numbers), lambda x: x[1] - x[0])
        ]
        text = ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
        out[op] = f"layer{'s' if len(numbers) > 1 else ''} {text}"
    return list(out.items())


def _not_finite(case: Judgement) -> dict[str, Any] | None:
    """Return how much of the point at fault is not finite, and in which rows."""
    point = case.report.point
    if point is None or case.report.reason != "not finite" or point not in case.exact.theirs:
        return None
    theirs = case.exact.theirs[point]
    bad = ~np.isfinite(theirs).reshape(len(theirs), -1)
    rows = np.flatnonzero(bad.any(axis=1))
    return {"numbers": int(bad.sum()), "of": bad.size, "rows": rows[:20].tolist(), "in": len(rows)}
