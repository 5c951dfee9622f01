"""Plan a sweep: check what is asked for, and say what is to be done, before anything is."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.decoder import (
    Decoder,
    check_tokens,
)
from refmoe.model.points import FORMS, numbers_per_row
from refmoe.model.points import points as points_of
from refmoe.run.load import Model

VERSION = 1  # of the folder's contents: another version's sweep is not gone on with
LOGITS = "lm_head"
WHOLE = ("#scores", "#probs", ".kv_b_proj")  # points that are of a prompt, not of single rows


class Piece(NamedTuple):
    """The rows of one prompt in a chunk."""

    prompt: int
    begin: int  # among the rows of all prompts
    end: int
    first: bool  # it begins its prompt
    last: bool  # it ends its prompt


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it was asked for; nothing of it changes while it runs."""

    model: Model
    ids: np.ndarray  # [T], of all prompts
    starts: list[int]  # row of each prompt's first token, and T
    chunks: list[list[Piece]]
    chunk: int  # rows at a time, at most
    logits: str  # all, none or top:K
    picked: np.ndarray | None  # rows whose logits are wanted; None: all
    counts: list[int]  # how many of them each prompt has
    wanted: frozenset[str]  # points that are kept
    needed: int  # bytes on the disk
    facts: dict[str, Any]  # what two runs of one sweep have in common
    tokens: str  # the prompts as JSON, for the result's metadata

    @property
    def cfg(self) -> Config:
        """The model's config."""
        return self.model.cfg

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self.model.decoder

    @property
    def T(self) -> int:
        """How many rows there are."""
        return len(self.ids)

    @property
    def top(self) -> int:
        """How many of the likeliest tokens are kept; 0: whole logits."""
        kind, _, k = self.logits.partition(":")
        return min(int(k), self.cfg.vocab_size) if kind == "top" else 0


def plan_sweep(
    model: Model,
    prompts: Sequence[Sequence[int]],
    out: Path,
    logits: str,
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None,
    points: Sequence[str],
    chunk: int,
    how: Mapping[str, Any],
) -> SweepPlan:
    """Return the plan of `sweep` with these arguments. Raises `InputError` for bad ones."""
    cfg, nx, options = model.cfg, model.nx, model.decoder.cache_options
    if not prompts:
        raise InputError("no prompt; give at least one")
    for n, prompt in enumerate(prompts):
        try:
            check_tokens(prompt, 0, cfg)
        except InputError as e:
            raise InputError(f"prompt {n}: {e}" if len(prompts) > 1 else str(e)) from None
    if chunk < 1:
        raise InputError(f"chunk = {chunk}, expected at least 1")
    kind, _, k = logits.partition(":")
    if logits not in ("all", "none") and (kind != "top" or not k.isdecimal() or int(k) < 1):
        raise InputError(f"logits {logits!r}; expected all, none or top:K")
    lengths = [len(tokens) for tokens in prompts]
    if options.room is not None and max(lengths) > options.room:
        raise InputError(
            f"a prompt of {max(lengths)} tokens, and the card's caches have room for {options.room}"
        )
    chunk = min(chunk, options.rows or chunk)
    starts = [0, *np.cumsum(lengths).tolist()]
    picked = None if logits == "none" else _picked(positions, lengths)
    counts = lengths if picked is None else [len(rows) for rows in picked]
    wanted = _wanted(cfg, points, max(lengths), chunk)
    tokens = json.dumps([[int(t) for t in p] for p in prompts])
    facts = {
        "version": VERSION,
        "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
        "model": str(model.checkpoint.path.resolve()),
        "checkpoint": model.checkpoint.identity,
        "numerics": nx.name,
        "conventions": asdict(nx.conventions),
        "attention": [nx.attention, "bf16" if options.bf16 else None],
        "reference": model.reference,
        "logits": logits,
        "positions": None if picked is None else [p.tolist() for p in picked],
        "points": sorted(points),
        "chunk": chunk,
        **how,
    }
    rows = None
    if picked is not None:
        rows = np.concatenate([p + s for p, s in zip(picked, starts, strict=False)]).astype(int)
    plan = SweepPlan(
        model,
        np.concatenate([np.asarray(t, np.intp) for t in prompts]),
        starts,
        list(_chunks(starts, chunk)),
        chunk,
        logits,
        rows,
        counts,
        wanted,
        0,
        json.loads(json.dumps(facts)),
        tokens if len(prompts) > 1 else tokens[1:-1],
    )
    return replace(plan, needed=_needed_bytes(plan))


def _picked(
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None, lengths: list[int]
) -> list[np.ndarray] | None:
    """Return for each prompt the positions whose logits are wanted, in order; None: all."""
    if positions is None or positions == "all":
        return None
    if isinstance(positions, str):
        if positions != "last":
            raise InputError(f"positions {positions!r}; expected all, last, or a list of integers")
        positions = [-1]
    each: Any = list(positions)
    if not (each and all(isinstance(p, list | tuple) for p in each)):
        each = [each] * len(lengths)
    if len(each) != len(lengths):
        raise InputError(f"positions for {len(each)} prompts, there are {len(lengths)}")
    out = []
    for n, (own, length) in enumerate(zip(each, lengths, strict=True)):
        if not all(type(p) is int for p in own):
            raise InputError("positions are no list of integers, nor a list of such lists")
        if bad := [p for p in own if not -length <= p < length]:
            raise InputError(f"position {bad[0]} of prompt {n}, which has {length} tokens")
        out.append(np.unique(np.array([p % length for p in own], np.int64)))
    if not any(map(len, out)):
        raise InputError("no position is wanted; for none, logits = none")
    return out


def _chunks(starts: Sequence[int], chunk: int) -> Iterator[list[Piece]]:
    """Yield chunks of rows in order; a prompt is split only if it is longer than a chunk."""
    pieces: list[Piece] = []
    room = chunk
    for n, (begin, end) in enumerate(pairwise(starts)):
        if pieces and end - begin > room:
            yield pieces
            pieces, room = [], chunk
        for at in range(begin, end, chunk):
            stop = min(at + chunk, end)
            pieces.append(Piece(n, at, stop, at == begin, stop == end))
            room -= stop - at
            if not room:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


def _wanted(cfg: Config, patterns: Sequence[str], longest: int, chunk: int) -> frozenset[str]:
    """Return the points that the patterns name, and those that are always written."""
    last = f"model.layers.{cfg.num_hidden_layers - 1}"
    names = [name for name in points_of(cfg, FORMS) if name != LOGITS] if patterns else []
    out: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            hint = "; logits are asked for by themselves" if fnmatchcase(LOGITS, pattern) else ""
            raise InputError(
                f"no point matches {pattern!r}{hint}; points are named like model.norm, "
                "model.layers.0, model.layers.0.self_attn.q_a_proj, model.layers.1.mlp.gate"
            )
        out |= found
    whole = sorted(name for name in out if name.endswith(WHOLE))
    if whole and longest > chunk:
        raise InputError(
            f"{whole[0]} is not of single rows, and the longest prompt has {longest} tokens, a "
            f"chunk {chunk}; make chunks as long, or ask for fewer points"
        )
    out |= {f"{expert_of(name)}#rows" for name in out if ".mlp.experts." in name}
    for i in range(cfg.num_hidden_layers):
        if cfg.is_moe(i):
            out |= {f"model.layers.{i}.mlp.gate#{part}" for part in ("experts", "weights")}
    return frozenset(out - {last})


def expert_of(name: str) -> str:
    """Return the expert, model.layers.L.mlp.experts.E, that a point is of."""
    return name.removesuffix("#rows") if name.endswith("#rows") else name.rpartition(".")[0]


def _needed_bytes(plan: SweepPlan) -> int:
    """Return the bytes that a sweep takes on the disk: its files, and the result beside them."""
    cfg, T = plan.cfg, plan.T
    b, K = np.dtype(plan.decoder.nx.dtype).itemsize, cfg.num_experts_per_tok
    scratch = T * (3 * cfg.hidden_size * b + K * (4 + b))
    n = sum(plan.counts) if plan.logits != "none" else 0
    head = n * (plan.top * (b + 4) + 16 if plan.top else b * cfg.vocab_size)
    moe = sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    kept = moe * T * (K * (2 + b) + 16) + head
    lengths = np.diff(plan.starts)
    for name in sorted(plan.wanted):
        if name.endswith(("gate#experts", "gate#weights")):
            continue
        pairs = name.endswith(("#scores", "#probs"))
        kept += int(b * numbers_per_row(name, cfg) * ((lengths**2).sum() if pairs else T))
    return scratch + 2 * kept + T * b * cfg.hidden_size
