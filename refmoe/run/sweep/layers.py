"""Take all prompts through one layer after another."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import (
    LayerWeights,
    add_mlp,
    attend,
    embed,
    mix,
    mlp_input,
)
from refmoe.model.experts import (
    Experts,
    ExpertsFrom,
    MlpWeights,
    MoeWeights,
    add_shared_expert,
)
from refmoe.model.mla import Segment
from refmoe.model.numerics import NonFinite, Numerics
from refmoe.model.router import Routing, route
from refmoe.run.sweep.files import Points, Rows, _empty, _replaced
from refmoe.run.sweep.work import BLOCK, TOGETHER, Piece, Work
from refmoe.weights.checkpoint import summary

# --- a run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """A sweep under way."""

    work: Work
    folder: Path
    state: dict[str, Any]  # facts, done (-1: not even the embedding), bytes_read, points
    points: Points
    x: tuple[Rows, Rows]
    h: Rows
    chosen: Rows
    weight: Rows
    bar: Any
    guessed: float  # bytes of a layer's experts that the bar counts on
    caches: dict[int, LatentCache] = field(default_factory=dict)

    def read(self, size: float, instead_of: float = 0.0) -> None:
        self.state["bytes_read"] += int(size)
        self.bar.total += size - instead_of
        self.bar.update(size)

    def finish(self, done: int) -> None:
        """So far it counts; what was before may be overwritten."""
        self.state["points"] |= self.points.finish()
        self.state["done"] = done
        _replaced(self.folder / "state.json", self.state)


def _begin(work: Work, folder: Path) -> Run:
    """From the beginning, or from what an earlier run left."""
    file = folder / "state.json"
    state: dict[str, Any] = {"facts": work.facts, "done": -1, "bytes_read": 0, "points": {}}
    if file.exists():
        try:
            old = json.loads(file.read_text("utf-8"))
            state = {key: old[key] for key in state}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file} is damaged; --restart begins anew") from None
        names = sorted(work.facts.keys() | state["facts"].keys())
        other = [n for n in names if state["facts"].get(n) != work.facts.get(n)]
        if other:
            raise InputError(
                f"{folder} holds {max(0, state['done'])} layers of another sweep: its "
                f"{', '.join(other)} differ; --restart forgets them and begins anew"
            )
    else:
        _empty(folder)
    for part in folder.glob("*.part"):  # of a write that was interrupted
        part.unlink()
    here = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free < work.needed - here:
        raise InputError(
            f"{folder}: {free / 1e9:.3f} GB are free there, this sweep of {work.T} rows takes "
            f"{(work.needed - here) / 1e9:.3f} GB more"
        )
    cfg, dtype = work.cfg, work.decoder.nx.dtype
    shape = work.T, cfg.hidden_size
    choice = work.T, cfg.num_experts_per_tok
    x = Rows(folder / "x0", shape, dtype), Rows(folder / "x1", shape, dtype)
    h = Rows(folder / "h", shape, dtype)
    chosen, weight = (
        Rows(folder / "chosen", choice, np.int32),
        Rows(folder / "weight", choice, dtype),
    )
    points = Points(folder / "points", work.wanted, cfg.n_routed_experts)
    once, guessed = _expected(work)
    bar = tqdm(
        total=once + guessed * sum(map(cfg.is_moe, range(cfg.num_hidden_layers))),
        initial=state["bytes_read"],
        unit="B",
        unit_scale=True,
        desc="sweep",
        disable=None,
    )
    return Run(work, folder, state, points, x, h, chosen, weight, bar, guessed)


def _expected(work: Work) -> tuple[float, float]:
    """Bytes of weights that every row needs, and of those experts of a layer that some row may
    choose, were each as likely as another."""
    cfg = work.cfg
    sizes = summary(work.model.checkpoint)["bytes"]
    once = sum(
        n for kind, n in sizes.items() if kind not in ("routed experts", "embedding", "other")
    )
    moe = sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** work.T if moe else 1.0
    return once, sizes.get("routed experts", 0) / max(1, moe) * (1 - missed)


def _size(w: Any) -> int:
    """Bytes of weights as they are stored."""
    if w is None:
        return 0
    own = getattr(w, "nbytes", None)
    return int(own) if own is not None else sum(map(_size, w))


@contextmanager
def _at(begin: int) -> Iterator[None]:
    try:
        yield
    except NonFinite as e:
        raise NonFinite(f"{e} of those from row {begin} of all prompts on") from None


def _embedding(run: Run) -> None:
    if run.state["done"] >= 0:
        return
    work, nx = run.work, run.work.decoder.nx.watching(run.points)
    for begin in range(0, work.T, work.chunk):
        with _at(begin):
            ids = work.ids[begin : begin + work.chunk]
            run.x[0][begin : begin + work.chunk] = embed(ids, work.decoder.embed_tokens, nx)
    run.x[0].flush()
    run.finish(0)


def _layer(run: Run, i: int) -> None:
    """Layer i of all rows."""
    work, decoder, cfg = run.work, run.work.decoder, run.work.cfg
    _unchanged(run)
    run.bar.set_description(f"sweep layer {i} of {cfg.num_hidden_layers}", refresh=False)
    nx = decoder.nx.within(f"model.layers.{i}.").watching(run.points)
    old, new = run.x[i % 2], run.x[(i + 1) % 2]
    w, experts = decoder.layers[i], decoder.experts[i]
    run.read(_size(w), _size(w))
    for pieces in work.chunks:
        with _at(pieces[0].begin):
            _first_half(run, i, pieces, old, w, nx)
    if isinstance(w.mlp, MoeWeights):
        with _at(0):
            _experts(run, new, w, experts, nx)
    for pieces in work.chunks:
        rows = slice(pieces[0].begin, pieces[-1].end)
        with _at(rows.start):
            x = _second_half(run.h[rows], new[rows], w, experts, cfg, nx)
            new[rows] = _in_memory(x, run)
    new.flush()
    run.finish(i + 1)


def _unchanged(run: Run) -> None:
    checkpoint = run.work.model.checkpoint
    if checkpoint.identity != run.work.facts["checkpoint"]:
        raise InputError(
            f"{checkpoint.path}: config.json or a shard has changed since the sweep began; "
            f"{run.state['done']} layers are kept for when it is as it was"
        )


def _first_half(
    run: Run, i: int, pieces: list[Piece], old: Rows, w: LayerWeights, nx: Numerics
) -> None:
    """x → h of a chunk; who chooses whom."""
    cfg, start = run.work.cfg, pieces[0].begin
    rows = slice(start, pieces[-1].end)
    for p in pieces:
        if p.first:
            run.caches[p.prompt] = LatentCache(cfg, nx.dtype, run.work.decoder.cache_options.bf16)
    segments = [
        Segment(slice(p.begin - start, p.end - start), run.caches[p.prompt]) for p in pieces
    ]
    h = attend(old[rows], w, segments, cfg, nx)
    run.h[rows] = _in_memory(h, run)
    for p in pieces:
        if p.last:
            del run.caches[p.prompt]
    if isinstance(w.mlp, MoeWeights):
        routing = route(mlp_input(h, w, cfg, nx), w.mlp.gate, cfg, nx.within("mlp."))
        run.chosen[rows], run.weight[rows] = routing.experts, routing.weights
        at = f"model.layers.{i}.mlp.gate"
        run.points.append(f"{at}#margin", routing.margin)
        if cfg.n_group != cfg.topk_group:
            run.points.append(f"{at}#group_margin", routing.group_margin)


def _second_half(
    h: np.ndarray, y: np.ndarray, w: LayerWeights, experts: Experts, cfg: Config, nx: Numerics
) -> np.ndarray:
    """h → x' of a chunk; y is its routed sum, where there is one."""
    if not isinstance(w.mlp, MoeWeights):
        return mix(h, w, experts, cfg, nx)
    x = mlp_input(h, w, cfg, nx.watching(None))  # shown already
    inside = nx.within("mlp.")
    return add_mlp(h, add_shared_expert(x, inside.point("experts", y), w.mlp, inside), nx)


def _in_memory(x: np.ndarray, run: Run) -> np.ndarray:
    """Return x in the processor's memory."""
    card = run.work.model.card
    return x if card is None else card.bring(x, None)


def _experts(run: Run, y: Rows, w: LayerWeights, experts: Experts, nx: Numerics) -> None:
    """y = the routed sum: expert by expert, the seam `nx.experts` being asked for one of each."""
    cfg, silent, inside = run.work.cfg, nx.watching(None), nx.within("mlp.")
    seen = np.zeros(cfg.n_routed_experts, bool)
    for begin in range(0, len(y), run.work.chunk):
        y[begin : begin + run.work.chunk] = 0
    for begin in range(0, len(y), BLOCK):
        seen[run.chosen[begin : begin + BLOCK]] = True
    guessed = run.guessed
    nothing = np.zeros((0, cfg.hidden_size), nx.dtype)  # no guess: it may read what nobody chooses
    for batch in _batches(experts, np.flatnonzero(seen).tolist(), nothing):
        here = ExpertsFrom(batch.__getitem__, experts.streamed)
        size = _size(tuple(batch.values()))
        run.read(size, min(size, guessed))
        guessed -= min(size, guessed)
        for which, rows, slots in _pairs(run.chosen, list(batch), run.work.chunk):
            run.points.rows = rows
            weight = run.weight[rows, slots][:, None]
            far = np.full(len(rows), np.inf)
            x = mlp_input(run.h[rows], w, cfg, silent)
            part = nx.experts(x, Routing(which[:, None], weight, far, far), here, inside)
            for e in np.unique(which):
                own = which == e
                y[rows[own]] = y[rows[own]] + part[own]
    run.bar.total -= guessed


def _batches(experts: Experts, chosen: list[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
    step = len(chosen) if experts.streamed else TOGETHER
    for begin in range(0, len(chosen), step or 1):
        yield from experts.batches(chosen[begin : begin + step], x)


def _pairs(
    chosen: Rows, experts: Sequence[int], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Experts, rows and slots [n], n ≤ `most`: in order of the experts, then of the rows.

    Where the rows of an expert are cut does not depend on what experts are together, and so no bit.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for e in experts:
        for rows, slots in _of_expert(chosen, e, most):
            if parts and count + len(rows) > most:
                yield _joined(parts)
                parts, count = [], 0
            parts.append((np.full(len(rows), e), rows, slots))
            count += len(rows)
    if parts:
        yield _joined(parts)


def _of_expert(chosen: Rows, e: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Its rows and slots, `most` at a time until the last."""
    rows, slots = np.zeros(0, np.intp), np.zeros(0, np.intp)
    for begin in range(0, len(chosen), BLOCK):
        more, where = np.nonzero(chosen[begin : begin + BLOCK] == e)
        rows, slots = np.concatenate((rows, more + begin)), np.concatenate((slots, where))
        while len(rows) >= most:
            yield rows[:most], slots[:most]
            rows, slots = rows[most:], slots[most:]
    if len(rows):
        yield rows, slots


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    which, rows, slots = (np.concatenate(part) for part in zip(*parts, strict=True))
    return which, rows, slots
