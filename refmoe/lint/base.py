"""Collect findings about a checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refmoe.files import InputError, read_object
from refmoe.progress import Progress

Level = Literal["error", "warning", "note"]
SHOWN = 5  # findings of one kind that are listed
TILE = 1 << 22  # elements in memory at a time


@dataclass(frozen=True)
class Finding:
    level: Level
    tensor: str | None  # as the file has it; None: of the whole checkpoint
    text: str


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    ok = all(f.level != "error" for f in findings)
    return {"findings": [asdict(f) for f in findings], "ok": ok}


@dataclass
class _Findings:
    """Collected by level and kind, so that a kind with very many can be cut."""

    groups: dict[tuple[Level, str], list[tuple[float, Finding]]] = field(default_factory=dict)

    def add(
        self, level: Level, kind: str, tensor: str | None, text: str, weight: float = 0.0
    ) -> None:
        """`weight`: how bad, among those of its kind."""
        self.groups.setdefault((level, kind), []).append((weight, Finding(level, tensor, text)))

    def listed(self) -> list[Finding]:
        """Errors first; of each kind the worst, then how many more there are."""
        out: list[Finding] = []
        for level in ("error", "warning", "note"):
            for (own, kind), found in self.groups.items():
                if own != level:
                    continue
                worst = sorted(found, key=lambda f: -f[0])
                limit = len(worst) if kind == "yarn" else SHOWN
                out += [f for _, f in worst[:limit]]
                if len(worst) > limit:
                    more = f"{kind}: {len(worst) - limit:,} more such findings"
                    out.append(Finding(own, None, more))
        return out


def _watched(names: Iterable[str], size: Callable[[str], int]) -> Iterator[str]:
    """The names, with a bar of bytes on a terminal."""
    names = list(names)
    with Progress(sum(map(size, names))) as bar:
        for name in names:
            yield name
            bar.advance(size(name))


def _read(file: Path, out: _Findings) -> dict[str, Any]:
    """A JSON object beside the weights; nothing if it is not there, and an error if it is none."""
    try:
        return read_object(file) if file.exists() else {}
    except InputError as e:
        out.add("error", "files", None, str(e))
        return {}


def _of(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if part else "none"


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays hold the same bytes, a piece at a time."""
    if a.nbytes != b.nbytes:
        return False
    x, y = (m.reshape(-1).view(np.uint8) for m in (a, b))
    pieces = range(0, len(x), 4 * TILE)
    return all(np.array_equal(x[i : i + 4 * TILE], y[i : i + 4 * TILE]) for i in pieces)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
