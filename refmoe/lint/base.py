"""Define what lint is made of: facts about a checkpoint, rules that judge them, findings.

facts     what was read of a checkpoint: counts, ids, names; collected once (lint/facts/)
rule      one function that takes facts of one type and yields what is wrong (lint/rules/)
finding   what a user sees: level, rule, tensor, text

error     the weights or constants cannot be right: `ok` is false
warning   probably wrong, or right and known to break an engine
note      facts
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from refmoe.progress import Progress

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
Place = Literal["folder", "gguf", "pair"]
LISTED = 5  # findings of one rule that are listed; the rest is counted (K2 has 208,550 tensors)
TILE = 1 << 22  # elements in memory at a time


@dataclass(frozen=True)
class Finding:
    """One line of lint's output."""

    level: Level
    tensor: str | None  # under the name that the file has; None: about the whole checkpoint
    text: str
    rule: str  # id

    def __str__(self) -> str:
        tensor = f"{self.tensor}: " if self.tensor else ""
        return f"{self.level:<8} {self.rule:<22} {tensor}{self.text}"


class Found(NamedTuple):
    """One thing that a rule noticed: the text of a finding, and where it belongs."""

    text: str
    tensor: str | None = None
    weight: float = 0.0  # how bad, among findings of the same rule and group; the worst are listed
    level: Level | None = None  # None: the rule's own
    group: str = ""  # findings of one rule are cut to `LISTED` in each group


class Facts(Protocol):
    """Facts about a checkpoint, of any type: those that rules of that type judge."""

    places: ClassVar[tuple[Place, ...]]  # where these facts exist


@dataclass(frozen=True)
class Rule:
    """A registered function with its documentation."""

    id: str
    level: Level  # of most findings; one may be milder
    summary: str  # one sentence
    why: str
    example: str  # a finding, as lint prints it
    reference: str  # repository#issue or repository and file; empty where none is known
    facts: type[Facts]
    check: Callable[[Any], Iterable[Found]]
    listed: int | None  # findings of a group that are listed; None: all

    @property
    def places(self) -> tuple[Place, ...]:
        """The places where the rule applies, which are those where its facts exist."""
        return self.facts.places


class Findings:
    """Collect findings by level, rule and group while facts come in."""

    def __init__(self, chosen: Sequence[Rule]):
        self._rules: dict[type, list[Rule]] = {}
        for rule in chosen:
            self._rules.setdefault(rule.facts, []).append(rule)
        self._limits = {rule.id: rule.listed for rule in chosen}
        self._groups: dict[tuple[Level, str, str], list[tuple[float, Finding]]] = {}

    def needs(self, *facts: type) -> bool:
        """Return whether a chosen rule judges one of these types, so that it must be collected."""
        return any(each in self._rules for each in facts)

    def judge(self, facts: Facts) -> None:
        """Show facts to the chosen rules of their type and keep what these find."""
        for rule in self._rules.get(type(facts), ()):
            for found in rule.check(facts):
                level = found.level or rule.level
                finding = Finding(level, found.tensor, found.text, rule.id)
                group = self._groups.setdefault((level, rule.id, found.group), [])
                group.append((found.weight, finding))

    def listed(self) -> list[Finding]:
        """Return errors first; of each group the worst, then how many more there are."""
        out: list[Finding] = []
        for wanted in LEVELS:
            for (level, rule, _), found in self._groups.items():
                if level != wanted:
                    continue
                limit = self._limits[rule]
                worst = sorted(found, key=lambda each: -each[0])[:limit]
                out += [finding for _, finding in worst]
                if len(worst) < len(found):
                    text = f"{rule}: {len(found) - len(worst):,} more such findings"
                    out.append(Finding(level, None, text, rule))
        return out


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the document of `lint --json`: the findings, and `ok` if none is an error."""
    ok = all(f.level != "error" for f in findings)
    return {"findings": [asdict(f) for f in findings], "ok": ok}


def show_progress(names: Iterable[str], size: Callable[[str], int]) -> Iterator[str]:
    """Yield the names while progress counts their bytes on stderr."""
    names = list(names)
    with Progress(sum(map(size, names))) as bar:
        for name in names:
            yield name
            bar.advance(size(name))


def percent(part: float, whole: float) -> str:
    """Return part of whole as "12 %", or "none"."""
    return f"{100 * part / whole:.2g} %" if part else "none"


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two contiguous arrays hold the same bytes; reads a piece at a time."""
    if a.nbytes != b.nbytes:
        return False
    x, y = (m.reshape(-1).view(np.uint8) for m in (a, b))
    pieces = range(0, len(x), 4 * TILE)
    return all(np.array_equal(x[i : i + 4 * TILE], y[i : i + 4 * TILE]) for i in pieces)
