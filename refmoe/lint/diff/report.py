"""Compare two checkpoints of one model, tensor by tensor, and say how they differ.

`refmoe lint --against` shows the findings, `refmoe quant verify` a verdict for each tensor. Both
come from one comparison (diff/weights.py) and one search for causes (diff/mistakes.py), so that a
pair has one verdict, one cause and one exit code.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.lint.base import Finding, Findings, Place, show_progress
from refmoe.lint.base import as_json as findings_as_json
from refmoe.lint.diff.cause import UNKNOWN, find_cause
from refmoe.lint.diff.suspect import Cause
from refmoe.lint.diff.weights import Compared, compare
from refmoe.lint.facts.router import share_of_flips
from refmoe.lint.facts.settings import SHAPE, compare_configs
from refmoe.lint.facts.shards import gather
from refmoe.lint.matrices import keys_of, matrix_of, parts_of, values_of
from refmoe.lint.registry import select as select_rules
from refmoe.model.formats.registry import safetensors_formats
from refmoe.model.matrix import Matrix
from refmoe.weights.checkpoint import (
    Checkpoint,
    expected,
    known_extra,
    read_config,
    tensor_class,
)
from refmoe.weights.gguf import Gguf, is_gguf

CAUSES = 100  # wrong tensors whose cause is sought: each takes seconds at K2's sizes


@dataclass(frozen=True)
class Pair:
    """One weight in both checkpoints."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    key: str
    how: Compared
    cause: Cause | None  # of a wrong one
    kind: str  # class and formats, as they are summed up
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def text(self) -> str:
        """Why it is wrong."""
        assert self.cause is not None
        first, second = self.shapes
        if first != second:
            return f"shape {list(second)} for {list(first)}: {self.cause.text}"
        error = self.how.error
        return (f"relative error {error:.2g}: " if error is not None else "") + self.cause.text


@dataclass(frozen=True)
class Damaged:
    """A weight that cannot be compared, because a part of it is missing or misshapen."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    key: str
    problem: str


@dataclass(frozen=True)
class OneSided:
    """A weight that is in one of two checkpoints."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    key: str
    there: bool  # in the second; else in the first
    needed: bool  # by the network
    extra: bool  # published beside the text model
    other: str  # path of the second


@dataclass(frozen=True)
class EqualWeights:
    """All weights of one class with one verdict that is not wrong."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    verdict: str
    kind: str
    count: int
    error: float  # the largest


@dataclass(frozen=True)
class RoundedBias:
    """A router's bias that the second checkpoint holds rounded."""

    places: ClassVar[tuple[Place, ...]] = ("pair",)
    key: str
    dtype: str  # of the second
    values: int  # distinct ones
    rounded: int  # distinct ones in the second
    share: float  # of tokens that choose other experts


class Verdict(NamedTuple):
    """One line of `quant verify`."""

    name: str  # of the module
    verdict: str  # bit-equal, rounded, or wrong
    max_rel: float | None  # max|x - y| / max|x|; None where values cannot be compared
    likely: str | None  # the cause


class Verification(NamedTuple):
    """The answer of `quant verify`: a verdict for each weight, and the findings."""

    tensors: list[Verdict]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether the second file holds the same model: no finding is an error."""
        return all(f.level != "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the document of `quant verify --json`."""
        tensors = [v._asdict() for v in self.tensors]
        return {"tensors": tensors, **findings_as_json(self.findings)}


@np.errstate(over="ignore", invalid="ignore")
def verify(a: str | Path, b: str | Path) -> Verification:
    """Compare two files of one model; `a` is taken to be right.

    Raises `InputError` if one cannot be opened, or if their shapes differ.
    """
    findings = Findings(select_rules())
    first, second = open_pair(a, b, findings)
    tensors = [_verdict(each) for each in compare_checkpoints(first, second, findings)]
    return Verification(tensors, findings.listed())


SHORT = {"same bits": "bit-equal", "same values": "bit-equal", "within a step": "rounded"}


def _verdict(each: Pair | Damaged | OneSided) -> Verdict:
    """Return the line of `quant verify` for one weight."""
    name = each.key.removesuffix(".weight")
    match each:
        case Pair(_, how, cause):
            verdict = SHORT.get(how.verdict, how.verdict)
            return Verdict(name, verdict, how.largest, cause.text if cause else None)
        case Damaged(_, problem):
            return Verdict(name, "wrong", None, problem)
        case _:
            return Verdict(name, "wrong", None, "it is in one of the two only")


def open_pair(
    path: str | Path, other: str | Path, findings: Findings
) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints for a comparison; damaged shards become findings.

    A second folder without config.json is taken to be of the first's config. Raises `InputError`
    if one cannot be opened, or if fields that decide shapes differ.
    """
    a = _open(path, None, findings)
    b = _open(other, a.cfg, findings)
    configs = compare_configs(a, b)
    wrong = [f"{k} {x} and {y}" for k, x, y in configs.differ if k in SHAPE]
    if wrong:
        raise InputError(f"{path} and {other} are not two files of one model: {', '.join(wrong)}")
    findings.judge(configs)
    return a, b


def _open(path: str | Path, cfg: Config | None, findings: Findings) -> Checkpoint:
    """Open a GGUF, or a folder; cfg is taken for a folder that has no config.json."""
    if is_gguf(Path(path)):
        return Gguf.open(path)
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; lint takes a checkpoint's folder or a GGUF")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no *.safetensors file")
    if cfg is None or (folder / "config.json").exists():
        cfg = read_config(folder)
    return Checkpoint(folder, cfg, gather(folder, findings))


def compare_checkpoints(
    a: Checkpoint, b: Checkpoint, findings: Findings
) -> list[Pair | Damaged | OneSided]:
    """Compare every weight of a with b's, show each to the rules, and return them in a's order.

    Weights of the network come first, as the network has them, then those beside it. What only b
    has is a finding alone.
    """
    plain = expected(replace(a.cfg, quantization=None))
    network = {name: i for i, (name, _, _) in enumerate(plain)}
    ours = sorted(keys_of(a), key=lambda key: network.get(key, len(network)))
    theirs = set(keys_of(b))
    out: list[Pair | Damaged | OneSided] = []
    unnamed = set(b.unread) - b.tensors.keys() if isinstance(b, Gguf) else set()
    for key in sorted((theirs - set(ours)) | unnamed):
        extra = known_extra(key, b.cfg)
        findings.judge(OneSided(key, True, key in network, extra, str(b.path)))

    def size(key: str) -> int:
        return sum(c.tensors[n].nbytes for c in (a, b) for n in parts_of(c, key))

    equal: dict[tuple[str, str], list[float]] = {}
    wrong = 0
    for key in show_progress(ours, size):
        each: Pair | Damaged | OneSided
        if key not in theirs:
            each = OneSided(key, False, key in network, known_extra(key, a.cfg), str(b.path))
        else:
            each = _compare(key, a, b, seek=wrong < CAUSES)
        out.append(each)
        if not isinstance(each, Pair) or each.how.verdict == "wrong":
            wrong += isinstance(each, Pair)
            findings.judge(each)
            continue
        equal.setdefault((each.how.verdict, each.kind), []).append(each.how.error or 0.0)
        if each.how.verdict != "same bits" and (bias := _rounded_bias(a, b, key)):
            findings.judge(bias)
    for (verdict, kind), errors in sorted(equal.items()):
        findings.judge(EqualWeights(verdict, kind, len(errors), max(errors)))
    return out


def _compare(key: str, a: Checkpoint, b: Checkpoint, seek: bool) -> Pair | Damaged:
    """Compare the weights of one key; `seek` the cause if they differ."""
    try:
        x, y = matrix_of(a, key), matrix_of(b, key)
        how = compare(x, y)
    except (KeyError, ValueError, IndexError) as e:
        return Damaged(key, f"cannot be compared: {e}")
    cause = None
    if how.verdict == "wrong":
        cause = find_cause(key, x, y, a, how) if seek else Cause(UNKNOWN, UNKNOWN)
    formats = dict.fromkeys((_format(x, a, key), _format(y, b, key)))
    kind = f"{tensor_class(key, a.cfg)}, {' and '.join(formats)}"
    return Pair(key, how, cause, kind, (x.shape, y.shape))


def _format(m: Matrix, checkpoint: Checkpoint, key: str) -> str:
    """Return the name of the format of a weight as it is summed up."""
    name = getattr(m, "format", None)
    if name in safetensors_formats():
        return str(name).upper()
    parts = parts_of(checkpoint, key)
    return "/".join(dict.fromkeys(checkpoint.tensors[part].dtype for part in parts))


def _rounded_bias(a: Checkpoint, b: Checkpoint, key: str) -> RoundedBias | None:
    """Return what rounding the bias of a router does, if key is one and it was rounded."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias", key)
    if not layer or key.replace("e_score_correction_bias", "weight") not in a.tensors:
        return None
    bias, other = values_of(a, key), values_of(b, key)
    if (bias == other).all():
        return None
    share = share_of_flips(a, int(layer[1]), bias, other)
    distinct = len(np.unique(bias)), len(np.unique(other))
    return RoundedBias(key, b.tensors[key].dtype, *distinct, share)
