"""Hold predictions against public reports."""

import math
import tomllib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refmoe.run.plan.hardware import SPLITS, Hardware, _data, _machine, _Table
from refmoe.run.plan.time import Case, Constants, model_config
from refmoe.weights.placement import (
    Parts,
)

# --- reports, and what is fitted to them


class Report(NamedTuple):
    system: str
    source: str
    assumed: str
    decode: float
    prefill: float | None
    batch: int
    case: Case


def reports(text: str | None = None) -> tuple[list[Report], list[dict[str, Any]]]:
    """The table: rows that are judged, and those excluded with the reason."""
    where = "reports.toml"
    table = tomllib.loads(_data(where) if text is None else text)
    exact = Parts.of(model_config())
    rows = []
    for i, raw in enumerate(table["report"]):
        t = _Table(raw, f"{where}: report {i + 1}")
        parts = exact.with_bits(*t.pair("bits"))
        machines = tuple(_machine(m) for m in t.tables("machine"))
        hardware = Hardware("", machines, t.text("split", "pipeline", SPLITS))
        share = t.number("experts_on_cards", -1.0) if "experts_on_cards" in raw else None
        cards = None if share is None else round(share * parts.all_experts)
        case = Case.of(parts, hardware, 4096, 2, None, cards)
        prefill = t.number("prefill", 0.0) or None
        decode, batch = t.number("decode", 0.0), t.whole("batch", 512)
        names = t.text("system"), t.text("source"), t.text("assumed", "")
        rows.append(Report(*names, decode, prefill, batch, case))
        t.done("see the head of the file")
    excluded = [{"reported": None, **row} for row in table.get("excluded", [])]
    return rows, excluded


GRID = (
    np.arange(0.30, 1.001, 0.025),  # efficiency
    np.arange(0.5, 1.01, 0.1),  # socket
    np.arange(0, 301, 20) * 1e-6,  # exchange
    np.arange(0, 501, 25) * 1e-6,  # handover
)
COMPUTE = np.arange(0.2, 1.001, 0.025)


def fit(rows: Sequence[Report]) -> Constants:
    """The constants with the least squares of log(reported / predicted) over these rows."""
    e, s, x, h = (a.reshape(-1) for a in np.meshgrid(*GRID, indexing="ij"))
    total = np.zeros(len(e))
    for row in rows:
        w = row.case.work()
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
            math.log(row.prefill * row.case.prompt(row.batch, with_c) / row.batch) ** 2
            for row in prompts
            if row.prefill
        )

    return found._replace(compute=float(min(COMPUTE, key=error)))


@cache
def fitted() -> Constants:
    """To all reports."""
    return fit(reports()[0])


def validate(text: str | None = None) -> dict[str, Any]:
    """Each report against constants fitted without any report of its source."""
    rows, excluded = reports(text)
    out: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for row in rows:
        c = fit([other for other in rows if other.source != row.source])
        lo, hi = c.range(1 / row.case.work().total(c))
        out.append(_judged(row, row.decode, lo, hi))
        if row.prefill:
            lo, hi = c._replace(deviation=1.0).range(row.batch / row.case.prompt(row.batch, c))
            prompts.append({**_judged(row, row.prefill, lo, hi), "tokens": row.batch})
    c = fit(rows)
    return {
        "rows": out,
        "excluded": excluded,
        "inside": sum(r["inside"] for r in out),
        "total": len(out),
        "prefill": prompts,
        "constants": c._asdict(),
    }


def _judged(row: Report, reported: float, lo: float, hi: float) -> dict[str, Any]:
    inside = lo <= reported <= hi
    judged = {"reported": reported, "lo": lo, "hi": hi, "inside": inside}
    return {"system": row.system, "source": row.source, **judged, "assumed": row.assumed or None}


def table(document: dict[str, Any]) -> list[str]:
    """The validation, for people."""
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
