"""Render docs/lint.md from the rules."""

import re
from pathlib import Path

from refmoe.lint.base import Place, Rule
from refmoe.lint.registry import rules

PAGE = Path("docs/lint.md")
PLACES: dict[Place, str] = {"folder": "folders", "gguf": "GGUFs", "pair": "pairs"}
FAMILIES = {
    "config": "config.json and its companions",
    "diff": "A copy against the original (`--against`)",
    "fp8": "FP8 matrices",
    "gguf": "GGUF files",
    "int4": "INT4 matrices",
    "norm": "Norms",
    "router": "Routers",
    "shard": "Shards and their index",
    "stop": "Ids that end a turn",
    "tensor": "Tensors",
    "vocab": "Vocabulary",
    "yarn": "YaRN as engines read it",
}
HEAD = """\
# Rules of `refmoe lint`

This page is generated: `python -m refmoe.lint` writes it from the functions in refmoe/lint/rules/.

`refmoe lint PATH` examines a checkpoint's folder or a GGUF without running it; `refmoe lint PATH
--against COPY` compares two copies of one model. Each finding has a level and the id of its rule:

| level | meaning |
|---|---|
| error | the weights or constants cannot be right; the exit code is 1 |
| warning | probably wrong, or right and known to break an engine |
| note | facts |

`--select ID,ID` judges by some rules alone, `--ignore ID,ID` leaves some out. An id stands for all
that begin with it, so `--select int4` takes a family. Only what a chosen rule needs is read:
`--select config,yarn` reads no weights. Of many findings of one rule the worst five are listed and
the others counted.

"""


def render() -> str:
    """Return docs/lint.md: an index by family, then each rule with why, example and source."""
    families: dict[str, list[Rule]] = {}
    for rule in rules():
        families.setdefault(rule.id.partition("-")[0], []).append(rule)
    parts = [HEAD]
    for family, members in families.items():
        parts.append(f"## {FAMILIES.get(family, family)}\n\n| rule | level | |\n|---|---|---|\n")
        parts += [f"| [`{r.id}`](#{r.id}) | {r.level} | {_cell(r.summary)} |\n" for r in members]
        parts.append("\n")
        parts += [_section(r) for r in members]
    return "".join(parts).rstrip() + "\n"


def _section(rule: Rule) -> str:
    """Return the section of one rule."""
    where = ", ".join(PLACES[place] for place in rule.places)
    lines = [
        f"### {rule.id}",
        f"{rule.summary} ({rule.level}; {where})",
        rule.why,
        f"```text\n{rule.example}\n```",
    ]
    if rule.reference:
        lines.append(f"Met in: {_linked(rule.reference)}.")
    return "\n\n".join(line for line in lines if line) + "\n\n"


def _linked(reference: str) -> str:
    """Return a reference in which issues and commits of GitHub repositories are links."""
    issue = r"([\w.-]+/[\w.-]+)#(\d+)"
    text = re.sub(issue, r"[\1#\2](https://github.com/\1/issues/\2)", reference)
    commit = r"([\w.-]+/[\w.-]+) ([0-9a-f]{7,40})\b"
    return re.sub(commit, r"[\1 \2](https://github.com/\1/commit/\2)", text)


def _cell(text: str) -> str:
    """Return text that may stand in a cell of a table."""
    return text.replace("|", r"\|")
