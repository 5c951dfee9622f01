"""The dictionary of all known faults, assembled from the families; docs/faults.md is its print.

python -m refmoe.oracle.faults.dictionary > docs/faults.md
"""

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.points import kind
from refmoe.oracle.faults.attention import ATTENTION
from refmoe.oracle.faults.base import Fault
from refmoe.oracle.faults.caches import CACHE
from refmoe.oracle.faults.experts import EXPERTS
from refmoe.oracle.faults.layers import ENDS, LAYERS
from refmoe.oracle.faults.norms import NORMS
from refmoe.oracle.faults.positions import POSITIONS
from refmoe.oracle.faults.router import ROUTER
from refmoe.oracle.faults.stored import STORED

FAMILIES = (ROUTER, EXPERTS, STORED, NORMS, POSITIONS, ATTENTION, CACHE, LAYERS, ENDS)
FAULTS: tuple[Fault, ...] = tuple(fault for family in FAMILIES for fault in family)
BY_ID = {f.id: f for f in FAULTS}

# sets that give the same numbers, or do unless the points between them are in the dump
equivalent: tuple[tuple[str, ...], ...] = (
    ("scaling-dropped", "normalised-after-scaling"),
    ("gate-up-swapped", "silu-on-up"),  # but for dense and shared MLPs
    ("norm-kv-skipped", "cache-latent-unnormed"),
    ("rope-missing-k", "cache-key-unrotated"),
)


def candidates(point: str, through: Iterable[str], cfg: Config | None = None) -> list[Fault]:
    """Return the faults that would show at this point, or at one that is judged with it.

    With a config, only those that a model of this config can have.
    """
    return [
        f
        for f in FAULTS
        if any(kind(p).endswith(f.points) for p in (point, *through))
        and (cfg is None or f.where(cfg))
    ]


def same_as(id: str) -> tuple[str, ...]:
    """Return the ids that give the same numbers as this one, itself among them."""
    return next((ids for ids in equivalent if id in ids), (id,))


def select(ids: Sequence[str]) -> list[Fault]:
    """Return the faults with these ids in the dictionary's order, or all where there are no ids.

    Raises `InputError` for an id that is no fault's, with the ids most like it.
    """
    known = [f.id for f in FAULTS]
    for id in ids:
        if id not in known:
            near = difflib.get_close_matches(id, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "docs/faults.md lists them"
            raise InputError(f"fault {id!r} is not in the dictionary; {hint}")
    return [f for f in FAULTS if not ids or f.id in ids]


# --- docs/faults.md

PAGE = """# The dictionary of faults

What goes wrong in engines that run Kimi K2: {count} faults, {seen} of them with the public issues
or commits in which they were reported. `check` tries them at the first wrong point of a dump: each
is computed in the place of that operation, on the engine's own inputs, and the one that leaves
nothing but rounding is named as the cause. `refmoe mutate` plants each of them and tests that it
is found. This page is written by `python -m refmoe.oracle.faults.dictionary docs/faults.md`; how
a fault is added is said at the head of [base.py](../refmoe/oracle/faults/base.py).

*Shows at* lists the ends of the names of the points ([points.md](points.md)) at which the fault
shows first. *How it is told* is what an engine with the fault computes: a constant factor, whose
value is fitted to the engine's numbers; a wrong result; a right result that the next operations
read wrongly; or right operations on other weights or another routing.

{families}

## Faults that cannot be told apart

These give the same numbers, or do unless the points between them are in the dump:

{equivalent}
"""


def page() -> str:
    """Return docs/faults.md."""
    families = []
    for family in FAMILIES:
        rows = [
            f"## {family.title[:1].upper()}{family.title[1:]}",
            "",
            "| id | what is wrong | shows at | how it is told | models | reported in |",
            "|---|---|---|---|---|---|",
        ]
        for f in family:
            shown = ", ".join(f"`{p}`" for p in f.points)
            cells = [f"`{f.id}`", f.text, shown, _told(f), f.where.text, ", ".join(f.references)]
            rows.append(f"| {' | '.join(cells)} |")
        families.append("\n".join(rows))
    return PAGE.format(
        count=len(FAULTS),
        seen=sum(bool(f.references) for f in FAULTS),
        families="\n\n".join(families),
        equivalent="\n".join(f"- {', '.join(f'`{i}`' for i in ids)}" for ids in equivalent),
    )


def _told(f: Fault) -> str:
    """Return by what an engine with this fault is recognised."""
    if not f.predicts:
        return "its numbers cannot be foretold"
    if f.fitted is not None:
        return f.fitted.name
    if f.free is not None:
        return f"{f.free.name}, solved for"
    return {"result": "wrong result", "reading": "wrongly read", "weights": "other weights"}[f.by]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
