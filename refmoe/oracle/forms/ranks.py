"""Put the tensors of a parallel engine's ranks together, or one rank's where they belong.

Tensor parallelism gives each rank a part of the heads, of an MLP's columns, or of the vocabulary;
what ends in a product over these is then a sum that each rank has a part of, until they are added
up (all-reduce). Expert parallelism gives each rank some of the experts.

    q_b_proj, kv_b_proj, #context, gate_proj, act, lm_head   a part of the columns: `columns`
    o_proj, down_proj, mlp, experts, shared_experts          a part of the sum: `SUMS`
    norms, q_a_proj, the router                              the same on every rank
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.points import parse
from refmoe.oracle.forms.shapes import split_axes
from refmoe.oracle.readers.base import Arrays, Dump

SPLIT = (  # ends of points whose columns ranks share out
    "q_b_proj",
    "q_proj",
    "kv_b_proj",
    "#q_pe",
    "#q_latent",
    "#context_latent",
    "#context",
    "#scores",
    "#probs",
    "gate_proj",
    "up_proj",
    "act",
    "lm_head",
)
SUMS = ("o_proj", "self_attn", "down_proj", "mlp", "experts", "shared_experts", "embed_tokens")
ALIKE = 0.9  # cosine of two ranks' tensors above which they are copies, rounded each on its own
PLACED = 0.5  # distance below which a part is that of a rank; that of unrelated numbers is 1


class Joined(NamedTuple):
    """A dump of all ranks as one, and what was done to make it."""

    dump: Dump
    label: str  # whose copies it has, where copies differ
    notes: tuple[str, ...]
    parts: int  # of how many ranks
    split: frozenset[str]  # tensors whose columns were put side by side


def is_sum(name: str) -> bool:
    """Tell whether a rank of a parallel engine may hold a part of the sum at this point."""
    return name.rpartition(".")[2] in SUMS and parse(name).expert is None


def join_ranks(dump: Dump, cfg: Config) -> list[Joined]:
    """Return the dump of all ranks as one; one more for each rank whose copies are not rank 0's.

    `dump.ranks` holds the arrays of each rank under the names of points.
    """
    if not dump.ranks:
        return [Joined(dump, "", (), 1, frozenset())]
    ranks = _global_experts(dump.ranks, cfg)
    names = dict.fromkeys(n for arrays in ranks for n in arrays)
    whole: Arrays = {}
    copies: list[Arrays] = [{} for _ in ranks]
    split, summed = [], []
    for name in names:
        held = {r: arrays[name] for r, arrays in enumerate(ranks) if name in arrays}
        parts = list(held.values())
        if all(_equal(parts[0], x) for x in parts[1:]):
            whole[name] = parts[0]
            continue
        joined = _columns(name, parts, cfg) if len(parts) == len(ranks) else None
        if joined is not None:
            whole[name] = joined
            split.append(name)
        elif is_sum(name) and len(parts) == len(ranks) and not _copies(parts):
            whole[name] = np.sum(np.stack([x.astype(np.float64) for x in parts]), axis=0)
            summed.append(name)
        else:
            for r, x in held.items():
                copies[r][name] = x
            whole[name] = parts[0]
    notes = [f"{len(ranks)} ranks are put together"]
    if split:
        notes.append(f"{len(split)} tensors of their columns, first {split[0]}")
    if summed:
        notes.append(
            f"{len(summed)} of their partial sums before the all-reduce, first {summed[0]}"
        )
    one = replace(dump, arrays=whole, ranks=())
    out = [Joined(one, "", ("; ".join(notes),), len(ranks), frozenset(split))]
    for r, own in enumerate(copies):
        other = {n: x for n, x in own.items() if not _equal(x, whole[n])}
        if other:
            said = f"rank {r}'s copies of {len(other)} tensors, first {next(iter(other))}"
            out.append(
                Joined(replace(one, arrays=whole | other), said, (), len(ranks), frozenset(split))
            )
    return out


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


def _copies(parts: Sequence[np.ndarray]) -> bool:
    """Tell whether these arrays are one tensor, computed on each rank."""
    return all(distance(parts[0], x) < 1 - ALIKE for x in parts[1:] if x.shape == parts[0].shape)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return 1 - cosine of two arrays of the same size; 1 where either is nothing."""
    a, b = (np.nan_to_num(z.astype(np.float64), posinf=0, neginf=0).ravel() for z in (x, y))
    length = float(np.sqrt((a @ a) * (b @ b)))
    return 1 - float(a @ b) / length if length > 0 else 1.0


def _columns(name: str, parts: Sequence[np.ndarray], cfg: Config) -> np.ndarray | None:
    """Return the ranks' columns side by side; None where these are not its parts."""
    rows = [split_axes(name, x, cfg) for x in parts]
    if any(r is None or r.parts != len(parts) for r in rows):
        return None
    arrays = [r.array for r in rows if r is not None]
    axis = 1 if rows[0] is None or rows[0].batch is None else 2
    if len({x.shape for x in arrays}) > 1:
        return None
    return np.concatenate(arrays, axis)


def _global_experts(ranks: Sequence[Arrays], cfg: Config) -> list[Arrays]:
    """Return the ranks' arrays with the experts' numbers in the model, not on their rank."""
    held = [{e for n in arrays if (e := parse(n).expert) is not None} for arrays in ranks]
    share = cfg.n_routed_experts // len(ranks)
    local = all(h and max(h) < share for h in held) and len(set.union(*held)) <= share
    tensors = [n for n in ranks[0] if parse(n).expert is not None]
    again = [n for n in tensors if all(n in a and _equal(a[n], ranks[0][n]) for a in ranks)]
    if not local or (again and len(again) == len(tensors)):
        return list(ranks)
    return [
        {numbered(n, r * share): x for n, x in arrays.items()} for r, arrays in enumerate(ranks)
    ]


def numbered(name: str, offset: int) -> str:
    """Return the name of a tensor of expert E as that of expert E + offset."""
    expert = parse(name).expert
    if expert is None:
        return name
    return name.replace(f".experts.{expert}", f".experts.{expert + offset}", 1)


def wrong_ranks(ours: np.ndarray, theirs: np.ndarray, parts: int) -> str:
    """Say which ranks' columns of a point are wrong, where not all are; else nothing."""
    if ours.ndim < 2 or ours.shape[1] % parts or ours.shape != theirs.shape:
        return ""
    a, b = (np.split(x, parts, axis=1) for x in (ours, theirs))
    error = np.array(
        [
            np.sqrt(((x - y) ** 2).mean() / max((x**2).mean(), 1e-300))
            for x, y in zip(a, b, strict=True)
        ]
    )
    wrong = np.flatnonzero(error > 8 * np.median(np.sort(error)[: max(1, parts - 1)]))
    wrong = wrong if len(wrong) else np.flatnonzero(~np.isfinite(error))
    if not 0 < len(wrong) < parts:
        return ""
    return f"the wrong columns are those of rank{'s' if len(wrong) > 1 else ''} " + ", ".join(
        map(str, wrong)
    )


# --- one rank


class Rank(NamedTuple):
    """Which rank of how many a dump is of."""

    number: int
    of: int


def find_rank(theirs: Arrays, ours: Arrays) -> tuple[Rank, dict[str, slice]] | str:
    """Return the rank that these tensors [T, columns of it, ...] are of, and their columns.

    Most of the tensors decide, so that one that is wrong is judged at its rank's place. In words
    why, where nothing tells.
    """
    votes: dict[Rank, int] = {}
    for name, x in theirs.items():
        of = ours[name].shape[1] // x.shape[1]
        found = [distance(x, part) for part in np.split(ours[name], of, axis=1)]
        best = int(np.argmin(found))
        if found[best] < PLACED and sorted(found)[1] > 2 * found[best]:
            votes[Rank(best, of)] = votes.get(Rank(best, of), 0) + 1
    if not votes:
        return "it is a part of the columns, and nothing tells which; dump every rank"
    rank = max(votes, key=lambda r: votes[r])
    columns = {}
    for name, x in theirs.items():
        width = x.shape[1]
        if ours[name].shape[1] == rank.of * width:
            columns[name] = slice(rank.number * width, (rank.number + 1) * width)
    return rank, columns


def with_part_of_sums(decoder: Decoder, rank: Rank, experts: bool) -> Decoder:
    """Return the decoder whose products over split columns are the rank's part of the sum.

    experts  the rank has whole experts, its share of them; else columns of each
    """

    def part(m: Matrix) -> Matrix:
        w = np.array(dequantize(m, np.float64))
        width = w.shape[1] // rank.of
        w[:, : rank.number * width] = 0
        w[:, (rank.number + 1) * width :] = 0
        return w

    def mlp(w: MlpWeights) -> MlpWeights:
        return w._replace(down_proj=part(w.down_proj))

    def expert(i: int, e: int) -> MlpWeights:
        w = decoder.experts[i](e)
        if not experts:
            return mlp(w)
        share = decoder.cfg.n_routed_experts // rank.of
        return w if e // share == rank.number else w._replace(down_proj=np.zeros(w.down_proj.shape))

    layers = []
    for w in decoder.layers:
        own = w.mlp
        if isinstance(own, MoeWeights):
            shared = None if own.shared_experts is None else mlp(own.shared_experts)
            own = own._replace(shared_experts=shared)
        else:
            own = mlp(own)
        attention = w.self_attn._replace(o_proj=part(w.self_attn.o_proj))
        layers.append(w._replace(self_attn=attention, mlp=own))
    return replace(decoder.with_experts(expert), layers=layers)


def partial_sums(
    theirs: Arrays, full: Arrays, parts: Sequence[Mapping[str, np.ndarray]]
) -> list[str]:
    """Return the points of these whose tensor is a rank's part of the sum, and not the sum.

    full   what the network computes
    parts  what it would on this rank alone: its columns of each expert, or its own experts
    """
    out = []
    for name, x in theirs.items():
        if not is_sum(name) or name not in full or x.size != full[name].size:
            continue
        nearest = min((distance(x, p[name]) for p in parts if name in p), default=1.0)
        if nearest < PLACED and nearest < distance(x, full[name]) / 2:
            out.append(name)
    return out
