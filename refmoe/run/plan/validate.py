"""Hold predictions against public reports."""

import math
import tomllib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refmoe.run.plan.hardware import SPLITS, Hardware, Table, parse_machine, read_data
from refmoe.run.plan.time import Constants, Placed, model_config
from refmoe.weights.placement import Parts


class PublicReport(NamedTuple):
    """A rate that somebody published, and the hardware it was measured on."""

    system: str  # engine and hardware, in words
    source: str  # where it was published
    assumed: str  # what the source leaves unsaid and the table had to assume
    decode: float  # tokens a second
    prefill: float | None  # tokens a second of a prompt
    batch: int  # tokens of that prompt
    placed: Placed


def read_reports(
    text: str | None = None,
) -> tuple[list[PublicReport], list[dict[str, Any]]]:
    """Read the table of reports → those that are judged, and those excluded with the reason.

    `text` is another table in place of `reports.toml`.
    """
    where = "reports.toml"
    table = tomllib.loads(read_data(where) if text is None else text)
    exact = Parts.of(model_config())
    rows = []
    for i, raw in enumerate(table["report"]):
        t = Table(raw, f"{where}: report {i + 1}")
        parts = exact.with_bits(*t.pair("bits"))
        machines = tuple(parse_machine(m) for m in t.tables("machine"))
        hardware = Hardware("", machines, t.text("split", "pipeline", SPLITS))
        share = t.number("experts_on_cards", -1.0) if "experts_on_cards" in raw else None
        cards = None if share is None else round(share * parts.all_experts)
        placed = Placed.of(parts, hardware, 4096, 2, None, cards)
        prefill = t.number("prefill", 0.0) or None
        decode, batch = t.number("decode", 0.0), t.whole("batch", 512)
        names = t.text("system"), t.text("source"), t.text("assumed", "")
        rows.append(PublicReport(*names, decode, prefill, batch, placed))
        t.finish("see the head of the file")
    excluded = [{"reported": None, **row} for row in table.get("excluded", [])]
    return rows, excluded


# The values that `fit` tries: fine enough that the next one changes a prediction by less than the
# narrowest range.
GRID = (
    np.arange(0.30, 1.001, 0.025),  # efficiency
    np.arange(0.5, 1.01, 0.1),  # socket
    np.arange(0, 301, 20) * 1e-6,  # exchange
    np.arange(0, 501, 25) * 1e-6,  # handover
)
COMPUTE = np.arange(0.2, 1.001, 0.025)  # share of a data sheet's flops


def fit(rows: Sequence[PublicReport]) -> Constants:
    """Return the constants with the least squares of log(reported / predicted) over these rows."""
    e, s, x, h = (a.reshape(-1) for a in np.meshgrid(*GRID, indexing="ij"))
    total = np.zeros(len(e))
    for row in rows:
        w = row.placed.work()
        plain = sum(t for name, t in w.seconds.items() if name not in w.divided)
        divided = sum(t for name, t in w.seconds.items() if name in w.divided)
        t = (plain + divided / s) / e + w.exchanges * x + w.handovers * h
        total += np.log(row.decode * t) ** 2
    best = int(total.argmin())
    deviation = math.sqrt(total[best] / max(1, len(rows) - len(GRID)))
    found = Constants(
        float(e[best]), float(s[best]), float(x[best]), float(h[best]), 0.5, deviation
    )
    prompts = [row for row in rows if row.prefill]
    if not prompts:
        return found

    def error(c: float) -> float:
        with_c = found._replace(compute=c)
        return sum(
            math.log(row.prefill * row.placed.prompt(row.batch, with_c) / row.batch) ** 2
            for row in prompts
            if row.prefill
        )

    return found._replace(compute=float(min(COMPUTE, key=error)))


@cache
def fitted_constants() -> Constants:
    """Return the constants fitted to all reports."""
    return fit(read_reports()[0])


def validate(text: str | None = None) -> dict[str, Any]:
    """Judge each report by constants that were fitted without any report of its source.

    `text` is another table in place of `reports.toml`. Returns the document of `plan --validate`.
    """
    rows, excluded = read_reports(text)
    out: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for row in rows:
        c = fit([other for other in rows if other.source != row.source])
        lo, hi = c.range(1 / row.placed.work().total(c))
        out.append(_judge(row, row.decode, lo, hi))
        if row.prefill:
            lo, hi = c._replace(deviation=1.0).range(row.batch / row.placed.prompt(row.batch, c))
            prompts.append({**_judge(row, row.prefill, lo, hi), "tokens": row.batch})
    c = fit(rows)
    return {
        "rows": out,
        "excluded": excluded,
        "inside": sum(r["inside"] for r in out),
        "total": len(out),
        "prefill": prompts,
        "constants": c._asdict(),
    }


def _judge(row: PublicReport, reported: float, lo: float, hi: float) -> dict[str, Any]:
    inside = lo <= reported <= hi
    judged = {"reported": reported, "lo": lo, "hi": hi, "inside": inside}
    return {"system": row.system, "source": row.source, **judged, "assumed": row.assumed or None}


def format_validation(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a validation's document to people."""
    out = []
    for what, rows in (("decode", document["rows"]), ("prefill", document["prefill"])):
        out.append(f"{what:<8}{'tok/s':>8}{'lo':>8}{'hi':>8}")
        for r in rows:
            figures = f"{r['reported']:>8.4g}{r['lo']:>8.3g}{r['hi']:>8.3g}"
            mark = "inside" if r["inside"] else "OUTSIDE"
            out.append(f"{mark:<8}{figures}  {r['system']}  [{r['source']}]")
        out.append("")
    out.append("excluded")
    for r in document["excluded"]:
        figure = "-" if r["reported"] is None else f"{r['reported']:g}"
        out.append(f"{figure:>16}  {r['system']}  [{r['source']}]: {r['reason']}")
    c = document["constants"]
    out += [
        "",
        f"{document['inside']} of {document['total']} decode figures inside, "
        "each by constants fitted without its source",
        f"all together: {c['efficiency']:.3f} of the bandwidth, two sockets {c['socket']:.1f}, "
        f"{1e6 * c['exchange']:.0f} µs an exchange, {1e6 * c['handover']:.0f} µs a hand-over, "
        f"{c['compute']:.2f} of the flops; deviation {c['deviation']:.0%}",
    ]
    return out
