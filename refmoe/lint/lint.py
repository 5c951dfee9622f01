"""Examine checkpoints without running them.

    lint(path)                  one checkpoint, read once from end to end
    lint_against(path, other)   two checkpoints of one model, whatever each is stored in

A path is a folder in Hugging Face layout, a GGUF, or the first part of a split GGUF. The rules are
functions in lint/rules/, listed by `refmoe lint --rules` and in docs/lint.md; one list serves
folders, GGUFs and pairs. Each rule judges facts of one type (lint/facts/). A tensor is read once,
whatever rules ask, and only if a chosen rule asks.

Some rules have no meaning for a GGUF, which has no shards with an index (a split is held together
when it is opened), no dtype that a tensor must have, no generation_config.json, and ends a turn at
the token named <|im_end|>. Its Q4_0, Q8_0 and the scales of other blocks are examined in place of
INT4 and FP8.

A nibble order or a row order that is wrong in the only copy cannot be found here; `lint_against`
another copy, or `refmoe check` against what an engine computes, finds it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError, read_object
from refmoe.lint.base import Finding, Findings
from refmoe.lint.diff.report import compare_checkpoints, open_pair
from refmoe.lint.facts.names import compare_names, names_of_gguf
from refmoe.lint.facts.router import read_routers
from refmoe.lint.facts.settings import (
    ConfigFile,
    Metadata,
    Network,
    UnreadableGguf,
    compare_with_published,
    flatten,
    read_stops,
    settings_of,
    vocabulary_of,
)
from refmoe.lint.facts.shards import Shards, gather
from refmoe.lint.facts.tensors import read_tensors
from refmoe.lint.registry import select as select_rules
from refmoe.model.formats.registry import announced_formats, unknown_method
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import Gguf, is_gguf


@np.errstate(over="ignore", invalid="ignore")  # values that are not finite are looked for
def lint(path: str | Path, select: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Finding]:
    """Examine one checkpoint and return what the chosen rules find, errors first.

    select, ignore: ids of rules, or beginnings of ids; all rules without them. Raises
    `InputError` for an unknown id, and if there is no checkpoint at all.
    """
    findings = Findings(select_rules(select, ignore))
    if is_gguf(Path(path)):
        _lint_gguf(Path(path), findings)
    else:
        _lint_folder(Path(path), findings)
    return findings.listed()


@np.errstate(over="ignore", invalid="ignore")
def lint_against(
    path: str | Path,
    other: str | Path,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> list[Finding]:
    """Compare two checkpoints of one model, tensor by tensor; `path` is taken to be right.

    `other` may lack a config.json, as a dump of the weights that an engine loaded does. Raises
    `InputError` as `lint` does, and if the two are of different shapes.
    """
    findings = Findings(select_rules(select, ignore))
    a, b = open_pair(path, other, findings)
    compare_checkpoints(a, b, findings)
    return findings.listed()


def _lint_folder(folder: Path, findings: Findings) -> None:
    """Show the facts of a folder to the rules, as far as they can be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; lint takes a checkpoint's folder")
    cfg = _read_settings(folder, findings)
    if cfg is None:
        return
    findings.judge(Network(cfg))
    if unknown_method(cfg.quantization) is not None:
        return
    if not any(folder.glob("*.safetensors")):
        findings.judge(Shards(folder))
        return
    checkpoint = Checkpoint(folder, cfg, gather(folder, findings))
    names = compare_names(checkpoint)
    findings.judge(names)
    if names.impossible:
        return
    read_tensors(checkpoint, names.fit, findings)
    read_routers(checkpoint, names.fit, findings)


def _read_settings(folder: Path, findings: Findings) -> Config | None:
    """Show config.json and its companions to the rules; None if the graph cannot serve it."""
    raw = read_object(folder / "config.json")
    cfg, refused = None, None
    try:
        cfg = Config.from_dict(raw)
        announced_formats(cfg.quantization)
    except InputError as e:
        cfg, refused = None, str(e)
    text = raw.get("text_config") or raw
    findings.judge(ConfigFile(text if isinstance(text, dict) else {}, refused))
    if not isinstance(text, dict):
        return None
    findings.judge(compare_with_published(flatten(raw)))
    findings.judge(read_stops(folder, raw, findings))
    return cfg


def _lint_gguf(path: Path, findings: Findings) -> None:
    """Show the facts of a GGUF to the rules."""
    try:
        checkpoint = Gguf.open(path)
    except InputError as e:
        findings.judge(UnreadableGguf(str(e)))
        return
    findings.judge(Metadata(checkpoint.notes))
    findings.judge(compare_with_published(settings_of(checkpoint)))
    findings.judge(vocabulary_of(checkpoint))
    findings.judge(Network(checkpoint.cfg))
    names = names_of_gguf(checkpoint)
    findings.judge(names)
    read_tensors(checkpoint, names.fit, findings)
    read_routers(checkpoint, names.fit, findings)
