"""Place a dump's rows and columns in the prompts that it is of.

What `check` judges is one prompt whose tensors have a row for every token. `place` makes that of
what engines hand out: it splits batches, finds the rows of cached prefixes, chunks and padding
(rows.py), and names the tokens where nobody else does (tokens.py). Everything that it does is said
in the notes of the result, and what it could not place is `unread`, which forbids a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from refmoe.files import InputError
from refmoe.model.decoder import Decoder
from refmoe.model.numerics import WatchSome
from refmoe.model.points import parse
from refmoe.oracle.forms.prefix import find_prefix
from refmoe.oracle.forms.ranks import (
    SPLIT,
    Rank,
    find_rank,
    is_sum,
    partial_sums,
    with_part_of_sums,
)
from refmoe.oracle.forms.rows import NONE, align, distances, ranges, visits
from refmoe.oracle.forms.shapes import Rows, cut_vocabulary, split_axes
from refmoe.oracle.forms.tokens import EMBEDDING, NORM, Named, name_rows, wrong_list
from refmoe.oracle.readers.base import Arrays, Dump
from refmoe.oracle.trace import sketch

SURVEYED = 8  # tensors that rows are placed by
HEAD = ("model.norm", "lm_head")  # engines compute them for the last row of a prompt alone


@dataclass(frozen=True)
class Placed:
    """One prompt of a dump, with its rows where they belong."""

    label: str  # which of several it is, in words; empty where it is the only one
    tokens: list[int]
    dump: Dump
    wrong_tokens: str | None = None  # how the list that was given differs from the rows' own tokens
    notes: tuple[str, ...] = ()
    before: int = 0  # tokens of a cached prefix, which nobody gives


@dataclass
class _Group:
    """Arrays with equally many rows, which are placed as one: name → [rows, ...]."""

    arrays: Arrays = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)  # those with all columns
    positions: np.ndarray | None = None  # in all prompts, one after the other; None: nowhere
    odd: np.ndarray = field(default_factory=lambda: np.empty(0, int))  # rows of no token
    why: str = ""  # its rows are not to be trusted, although they were placed


def place(
    dump: Dump, decoder: Decoder, tokens: Sequence[int] | Sequence[Sequence[int]] | None
) -> list[Placed]:
    """Return the prompts of a dump, whose arrays bear the names of points (readers/adapt.py).

    tokens  of the one prompt, or of each; None: those that the dump has, or that its rows name
    Raises `InputError` where nothing tells the tokens, or the batch has another number of prompts.
    """
    arrays, cut = cut_vocabulary(dump.arrays, decoder.cfg)
    dump = replace(dump, arrays=arrays)
    rows = {n: r for n, x in dump.arrays.items() if (r := split_axes(n, x, decoder.cfg))}
    rows = {n: r for n, r in rows.items() if parse(n).expert is None}
    batch = max((r.batch or 1 for r in rows.values()), default=1)
    prompts, notes = _prompts(dump, decoder, tokens, rows, batch)
    notes = cut + notes
    groups = _groups(rows, batch)
    wrong = None
    for _ in range(2):  # with the tokens given, then with those that the rows name
        regular = len(prompts) == 1 and all(count == len(prompts[0]) for count, _ in groups)
        if not regular:
            _find_positions(groups, decoder, prompts)
        if wrong is None and (named := _named_otherwise(groups, decoder, prompts)) is not None:
            if sorted(named[1][0]) == sorted(prompts[0]):  # only the rows are in another order
                regular = False
                _find_positions(groups, decoder, prompts)
                break
            wrong, prompts = named
            continue
        break
    dump, said = _place_rank(dump, groups, rows, decoder, prompts)
    notes += said
    if regular:
        before = find_prefix(dump.arrays, decoder, len(prompts[0]))
        if before:
            end = before + len(prompts[0])
            notes += (
                f"the rows are positions {before} to {end - 1}, by the rotation of their keys",
            )
            whole = [n for n in dump.arrays if n.endswith("kv_b_proj")]
            rows_of = dict.fromkeys(whole, np.arange(before, end))
            dump = replace(dump, rows={**dump.rows, **rows_of})
        return [Placed("", prompts[0], dump, wrong, notes, before)]
    return _split(dump, groups, prompts, wrong, notes)


# --- which tokens


def _prompts(
    dump: Dump,
    decoder: Decoder,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None,
    rows: dict[str, Rows],
    batch: int,
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Return the tokens of each prompt, and what is to be said of where they come from."""
    notes: tuple[str, ...] = ()
    prompts: list[list[int]]
    if tokens is not None and len(tokens) and not isinstance(tokens[0], int | np.integer):
        prompts = [list(t) for t in tokens]  # type: ignore[arg-type]
    elif tokens is not None:
        prompts = [list(tokens)]  # type: ignore[arg-type]
    elif dump.prompts:
        prompts = [list(t) for t in dump.prompts]
    elif dump.tokens is not None:
        prompts = [dump.tokens]
    else:
        prompts = _named_prompts(dump, decoder, rows, batch)
        notes = ("the tokens are those that the rows of the embedding name",)
    if batch > 1 and len(prompts) == 1:
        prompts = prompts * batch
    if batch > 1 and len(prompts) != batch:
        raise InputError(
            f"{dump.path}: tensors of {batch} prompts, and tokens of {len(prompts)}; give a list "
            "of token ids for each prompt (--tokens FILE)"
        )
    return prompts, notes


def _named_prompts(
    dump: Dump, decoder: Decoder, rows: dict[str, Rows], batch: int
) -> list[list[int]]:
    """Return the tokens that the rows of the embedding name; raise `InputError` where none are."""
    for point in (EMBEDDING, NORM):
        if point not in rows or rows[point].parts > 1:
            continue
        r = rows[point]
        named = name_rows(r.array.reshape(-1, decoder.cfg.hidden_size), decoder, point)
        found = [_certain(part) for part in _each(named, batch if r.batch else 1)]
        if all(found):
            return found
    raise InputError(
        f"{dump.path}: it does not say its tokens, and no rows of the embedding name them; give "
        "them (--tokens FILE)"
    )


def _each(named: Named, prompts: int) -> list[Named]:
    """Split named rows into those of each prompt of a batch."""
    parts = zip(np.split(named.ids, prompts), np.split(named.sure, prompts), strict=True)
    return [Named(ids, sure) for ids, sure in parts]


def _certain(named: Named) -> list[int]:
    """Return the named ids without padding at either end; nothing where some between are unsure."""
    sure = np.flatnonzero(named.sure)
    if not len(sure) or len(sure) < sure[-1] + 1 - sure[0]:
        return []
    ids: list[int] = named.ids[sure].tolist()
    return ids


def _named_otherwise(
    groups: dict[tuple[int, int], _Group], decoder: Decoder, prompts: list[list[int]]
) -> tuple[str, list[list[int]]] | None:
    """Say how the list of tokens differs from what the rows name, and return the list they name.

    None where it is right, or where nothing tells. Marks the rows that are padding, and those that
    are of no token and no padding, in every group.
    """
    listed = np.concatenate([np.asarray(p) for p in prompts])
    telling: dict[tuple[int, int], Named] = {}
    for key, group in groups.items():
        point = next((p for p in (EMBEDDING, NORM) if p in group.whole), None)
        if point is not None:
            telling[key] = name_rows(group.arrays[point], decoder, point)
    lengths = np.array([len(p) for p in prompts])
    for key, group in groups.items():
        if group.positions is not None:
            group.odd = _odd_rows(group, telling.get(key), decoder, lengths)
    for key, named in telling.items():
        positions, odd = groups[key].positions, groups[key].odd
        odd = odd[named.sure[odd]]  # of other tokens
        regular = len(prompts) == 1 and key[0] == len(listed)
        if len(prompts) > 1 or (positions is None and not regular):
            continue
        at = np.arange(key[0]) if regular else positions
        assert at is not None
        inside = at >= 0
        given = np.where(inside, listed[np.where(inside, at, 0)], NONE)
        said = wrong_list(given[inside].tolist(), Named(named.ids[inside], named.sure[inside]))
        if said is None and not len(odd):
            continue
        padding = np.setdiff1d(np.flatnonzero(~inside), odd)
        sure = named.sure.copy()
        sure[padding] = False
        found = _certain(Named(named.ids, sure))
        if not found:
            continue
        said = said or f"the dump has {len(found)} tokens, the list {len(listed)}"
        text = f"{said}: its rows are those of {_shown(found)}, the list has {_shown(prompts[0])}"
        return text, [found]
    return None


def _odd_rows(
    group: _Group, named: Named | None, decoder: Decoder, lengths: np.ndarray
) -> np.ndarray:
    """Return the rows that belong nowhere although they are no padding.

    Padding is zeros in every tensor. Other rows are padding only before a prompt's first row or
    after its last, so that a row that is wrong in all tensors is never taken for it, and there only
    if they are no word's row of the embedding, or one word's again and again (an engine's own
    padding token). Without an embedding nothing tells.
    """
    assert group.positions is not None
    at = group.positions
    empty = [~x.reshape(len(x), -1).any(axis=1) for x in group.arrays.values()]
    rows = np.flatnonzero((at == NONE) & ~np.all(empty, axis=0))
    if named is None:
        return rows
    lasts = np.cumsum(lengths) - 1
    placed = np.flatnonzero(at != NONE)
    before = np.array([at[placed[placed < r][-1:]].sum() if r > placed[0] else -1 for r in rows])
    after = np.array([at[placed[placed > r][:1]].sum() if r < placed[-1] else -1 for r in rows])
    outside = (np.isin(before, lasts) | (before < 0)) & (
        np.isin(after, lasts - lengths + 1) | (after < 0)
    )
    sure = named.sure[rows]
    words = np.unique(named.ids[rows[sure]])
    if len(words) == 1 and (sure.sum() > 1 or words[0] in decoder.cfg.eos_token_id):
        sure = np.zeros(len(rows), bool)
    return rows[sure | ~outside]


def _shown(ids: Sequence[int]) -> str:
    """Return the first of some ids."""
    return f"{', '.join(map(str, ids[:6]))}{', …' if len(ids) > 6 else ''}"


# --- which rows


def _groups(rows: dict[str, Rows], batch: int) -> dict[tuple[int, int], _Group]:
    """Return the arrays by their numbers of rows and of prompts, batch and rows as one axis."""
    groups: dict[tuple[int, int], _Group] = {}
    for name, r in rows.items():
        x = r.array.reshape(-1, *r.array.shape[2:]) if r.batch else r.array
        prompts = r.batch or (batch if r.height == batch else 1)
        group = groups.setdefault((len(x), prompts), _Group())
        group.arrays[name] = x
        if r.parts == 1:
            group.whole.append(name)
    return groups


def _find_positions(
    groups: dict[tuple[int, int], _Group], decoder: Decoder, prompts: list[list[int]]
) -> None:
    """Set the positions of each group by what the network computes of these prompts."""
    wanted = {n for g in groups.values() for n in _telling(g)}
    ours = _survey(decoder, prompts, wanted)
    lengths = np.array([len(p) for p in prompts])
    starts = np.cumsum(lengths) - lengths
    for (count, parts), group in groups.items():
        names = [n for n in _telling(group) if n in ours]
        group.positions = None
        if names and parts == len(prompts) > 1:  # a batch: each prompt's rows among its own
            found = []
            for i, start in enumerate(starts):
                own = slice(i * count // parts, (i + 1) * count // parts)
                span = slice(start, start + lengths[i])
                d = distances([group.arrays[n][own] for n in names], [ours[n][span] for n in names])
                at = align(d)
                found.append(None if at is None else np.where(at == NONE, NONE, at + start))
            if all(x is not None for x in found):
                group.positions = np.concatenate([x for x in found if x is not None])
        elif names:
            d = distances([group.arrays[n] for n in names], [ours[n] for n in names])
            group.positions = align(d, starts.tolist())
        if group.positions is None and count == len(prompts) and set(group.arrays) <= set(HEAD):
            group.positions = starts + lengths - 1
    _doubt_strange_rows(groups, starts, lengths)


def _doubt_strange_rows(
    groups: dict[tuple[int, int], _Group], starts: np.ndarray, lengths: np.ndarray
) -> None:
    """Say of rows at other positions than engines dump that no pass rests on them.

    Where its embedding is beside it, or it is most of the dump, a tensor has the rows that it has.
    Others have the first or last rows of a prompt, or those that such tensors have: anything else
    may be an engine's own confusion of rows, which placing them by what they hold would undo.
    """
    sure = [g for g in groups.values() if EMBEDDING in g.arrays or NORM in g.arrays]
    sure = sure or [max(groups.values(), key=lambda g: len(g.arrays))]
    usual = [g.positions[g.positions >= 0] for g in sure if g.positions is not None]
    for group in groups.values():
        at = group.positions
        if at is None or any(group is g for g in sure):
            continue
        placed = at[at >= 0]
        own = [
            placed[(placed >= a) & (placed < a + n)] - a
            for a, n in zip(starts, lengths, strict=True)
        ]
        head = set(group.arrays) <= set(HEAD)
        ends = all(
            np.array_equal(p, np.arange(n - len(p), n))
            or (not head and np.array_equal(p, np.arange(len(p))))
            for p, n in zip(own, lengths, strict=True)
        )
        if not ends and not any(np.array_equal(placed, u) for u in usual):
            group.why = (
                f"its rows are those of positions {ranges(placed.tolist())} in this order, where "
                f"{'the last' if head else 'the first or last'} were expected"
            )


def _telling(group: _Group) -> list[str]:
    """Return the tensors of a group that its rows are placed by."""
    telling = [n for n in group.whole if not n.endswith(("#experts", "#scores", "#probs"))]
    narrow = [n for n in telling if n != "lm_head"] or telling
    if len(narrow) <= SURVEYED:
        return narrow
    return [narrow[i] for i in np.linspace(0, len(narrow) - 1, SURVEYED).astype(int)]


def _survey(decoder: Decoder, prompts: list[list[int]], names: set[str]) -> Arrays:
    """Return what the network computes at these points for all prompts, one after the other."""
    seen: dict[str, list[np.ndarray]] = {n: [] for n in names}

    def record(path: str, x: np.ndarray) -> np.ndarray:
        if path in seen:
            seen[path].append(x)
        if path + "#sketch" in seen:
            seen[path + "#sketch"].append(sketch(path, x))
        return x

    some = WatchSome(record, lambda path: path in seen or path + "#sketch" in seen)
    nx = replace(decoder.nx.watching(some), stop_at_nonfinite=False)
    for prompt in prompts:
        decoder.using(nx).logits(prompt)
    return {n: np.concatenate(parts) for n, parts in seen.items() if parts}


# --- one rank of a parallel engine


def _place_rank(
    dump: Dump,
    groups: dict[tuple[int, int], _Group],
    rows: dict[str, Rows],
    decoder: Decoder,
    prompts: list[list[int]],
) -> tuple[Dump, tuple[str, ...]]:
    """Return the dump with the columns of a rank's tensors, without its partial sums, and notes."""
    narrow = {n for n, r in rows.items() if r.parts > 1 and not n.endswith("#sketch")}
    if not narrow:
        return dump, ()
    layers = range(decoder.cfg.num_hidden_layers)
    ends = {f"model.layers.{i}.{end}" for i in layers for end in ("self_attn", "mlp")}
    full = _survey(decoder, prompts, narrow | ends | {n for n in rows if is_sum(n)})
    theirs: Arrays = {}
    ours: Arrays = {}
    for group in groups.values():
        for name in group.arrays.keys() & full.keys():
            at = group.positions
            placed = np.arange(len(full[name])) if at is None else np.flatnonzero(at >= 0)
            if len(group.arrays[name]) <= placed.max(initial=0):
                continue
            theirs[name] = group.arrays[name][placed]
            ours[name] = full[name][placed if at is None else at[placed]]
    known = {n: theirs[n] for n in narrow if n in theirs}
    found = find_rank({n: x for n, x in known.items() if n.endswith(SPLIT)}, ours)
    unread = dict(dump.unread)
    columns: dict[str, slice] = {}
    notes: tuple[str, ...] = ()
    if isinstance(found, str):
        unread |= dict.fromkeys(narrow, found)
    else:
        rank, columns = found
        notes = (f"{len(columns)} tensors are rank {rank.number}'s columns of {rank.of} ranks",)
        for name in narrow - columns.keys():
            unread[name] = f"it has {rows[name].parts} times too few columns"
        columns |= _of_experts(dump.arrays, rank, decoder.cfg.moe_intermediate_size, unread)
        where = {n: _at(groups, n) for n in theirs}
        alone = []
        for experts in (False, True):
            seen = _survey_sums(decoder, prompts, rank, experts, full)
            alone.append({n: x if (p := where.get(n)) is None else x[p] for n, x in seen.items()})
        for name in partial_sums(theirs, ours, alone):
            unread[name] = (
                f"it is rank {rank.number}'s part of the sum, before the all-reduce; dump every "
                "rank, or what comes after it"
            )
    arrays = {n: x for n, x in dump.arrays.items() if n not in unread}
    for group in groups.values():
        for name in group.arrays.keys() & unread.keys():
            del group.arrays[name]
        if group.positions is None:
            arrays |= {n: x for n, x in group.arrays.items() if n in columns}
    return replace(dump, arrays=arrays, unread=unread, columns=columns), notes


def _of_experts(arrays: Arrays, rank: Rank, width: int, unread: dict[str, str]) -> dict[str, slice]:
    """Return the columns of routed experts' tensors on this rank; their sums go to `unread`."""
    columns = {}
    split = slice(rank.number * width // rank.of, (rank.number + 1) * width // rank.of)
    own = [n for n in arrays if parse(n).expert is not None]
    for name in own:
        split_here = name.endswith(("gate_proj", "up_proj", "act"))
        if split_here and arrays[name].shape[-1] * rank.of == width:
            columns[name] = split
    for name in own:
        if name.endswith("down_proj") and name.replace("down_proj", "act") in columns:
            unread[name] = f"it is rank {rank.number}'s part of the sum over its columns"
    return columns


def _at(groups: dict[tuple[int, int], _Group], name: str) -> np.ndarray | None:
    """Return the positions of the rows of a tensor that are placed; None: all in order."""
    group = next(g for g in groups.values() if name in g.arrays)
    return None if group.positions is None else group.positions[group.positions >= 0]


def _survey_sums(
    decoder: Decoder, prompts: list[list[int]], rank: Rank, experts: bool, full: Arrays
) -> Arrays:
    """Return the rank's part of each sum of `full`, from inputs that are whole."""
    seen: dict[str, list[np.ndarray]] = {}
    other = with_part_of_sums(decoder, rank, experts)
    for i, prompt in enumerate(prompts):
        start = sum(map(len, prompts[:i]))

        def record(path: str, x: np.ndarray, start: int = start) -> np.ndarray:
            if is_sum(path):
                seen.setdefault(path, []).append(x)
            whole = path.endswith((".self_attn", ".mlp"))  # what comes after has the whole sum
            return full[path][start : start + len(x)] if whole else x

        some = WatchSome(record, lambda path: is_sum(path) or path.endswith((".self_attn", ".mlp")))
        nx = replace(other.nx.watching(some), stop_at_nonfinite=False)
        other.using(nx).logits(prompt)
    return {n: np.concatenate(parts) for n, parts in seen.items()}


# --- the prompts


def _split(
    dump: Dump,
    groups: dict[tuple[int, int], _Group],
    prompts: list[list[int]],
    wrong: str | None,
    notes: tuple[str, ...],
) -> list[Placed]:
    """Return each prompt, and each time that a part of it was computed again, with its rows."""
    out: list[Placed] = []
    start = 0
    unread = dict(dump.unread)
    for (count, _), group in groups.items():
        if group.positions is None:
            why = f"its {count} rows fit nowhere among the {sum(map(len, prompts))} tokens"
            unread |= dict.fromkeys(group.arrays, why)
        elif group.why:
            unread |= dict.fromkeys(group.arrays, group.why)
        elif len(group.odd):
            unread |= dict.fromkeys(
                group.arrays,
                f"its rows {ranges(group.odd.tolist())} of {count} are of none of the "
                f"{sum(map(len, prompts))} tokens",
            )
    grouped = {n for g in groups.values() for n in g.arrays}
    others = {n: x for n, x in dump.arrays.items() if n not in grouped}
    for i, prompt in enumerate(prompts):
        sets: dict[int, list[tuple[_Group, np.ndarray, np.ndarray]]] = {}
        for group in groups.values():
            if group.positions is None:
                continue
            at = np.where(
                (group.positions >= start) & (group.positions < start + len(prompt)),
                group.positions - start,
                NONE,
            )
            for v, chosen in enumerate(visits(at)):
                sets.setdefault(v, []).append((group, chosen, at[chosen]))
        for v, parts in sorted(sets.items()):
            label = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else ""
            if v:
                label = f"{label or 'the prompt'}, rows that were computed again"
            own, missing = _taken(dump, parts, others, len(prompt))
            first = unread | missing if not out else missing
            out.append(Placed(label, prompt, replace(own, unread=first), wrong, notes))
            notes = ()
        start += len(prompt)
    if not out:
        arrays = {n: x for n, x in others.items() if n not in unread}
        out.append(
            Placed("", prompts[0], replace(dump, arrays=arrays, unread=unread), wrong, notes)
        )
    said = tuple(_told(groups, prompts))
    return [replace(p, notes=p.notes + said) if not i else p for i, p in enumerate(out)]


def _taken(
    dump: Dump,
    parts: list[tuple[_Group, np.ndarray, np.ndarray]],
    others: Arrays,
    length: int,
) -> tuple[Dump, dict[str, str]]:
    """Return a dump of these rows, and which experts' tensors cannot be split, and why."""
    arrays: Arrays = {}
    rows: dict[str, np.ndarray] = {}
    unread: dict[str, str] = {}
    for group, chosen, at in parts:
        whole = np.array_equal(at, np.arange(length))
        for name, x in group.arrays.items():
            if name in dump.partial and np.isnan(x[chosen]).all():
                continue  # nothing of it is of this prompt
            arrays[name] = x[chosen]
            if not whole:
                rows[name] = at
    for name, x in others.items():
        layer, expert = parse(name).layer, parse(name).expert
        if expert is None or parse(name).point is None or name.endswith("#rows"):
            if parse(name).point is None:
                arrays[name] = x
            else:
                unread[name] = f"it is {list(x.shape)}, no shape of this point"
            continue
        gate = f"model.layers.{layer}.mlp.gate#experts"
        found = next(((g, c, at) for g, c, at in parts if gate in g.arrays), None)
        called = None if found is None else (found[0].arrays[gate] == expert).any(axis=1)
        if found is None or called is None or called.sum() != len(x):
            unread[name] = "which tokens its rows are of is not known: the choices are not dumped"
            continue
        numbered = np.cumsum(called) - 1  # row of the dump → row of the expert
        arrays[name] = x[numbered[found[1]][called[found[1]]]]
        rows[name] = found[2]
    return replace(dump, arrays=arrays, rows=rows), unread


def _told(groups: dict[tuple[int, int], _Group], prompts: list[list[int]]) -> list[str]:
    """Say which rows the arrays have, and what was cut."""
    said = []
    total = sum(map(len, prompts))
    for group in groups.values():
        at = group.positions
        names = list(group.arrays)
        if at is None or not names:
            continue
        count = f"{len(names)} tensors have" if len(names) > 1 else f"{names[0]} has"
        cut = int((at == NONE).sum()) - len(group.odd)
        if cut:
            said.append(f"{count} {cut} rows of padding, which are not compared")
        inside = np.unique(at[at >= 0])
        if (np.diff(at[at >= 0]) < 0).any() and len(prompts) == 1:
            said.append(f"{count} rows in the order {ranges(at[at >= 0].tolist())}")
        elif len(inside) < total and len(prompts) == 1:
            rows = "rows" if len(inside) > 1 else "row"
            said.append(f"{count} {rows} {ranges(inside.tolist())} of {total}")
        elif len(inside) < len(prompts) * 2 <= total:
            said.append(f"{count} one row for each of {len(prompts)} prompts")
    return said
