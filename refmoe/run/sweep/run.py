"""Hold a sweep under way: its files, how far it has come, and its progress bar."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError, write_atomically
from refmoe.model.numerics import NonFinite
from refmoe.progress import Progress
from refmoe.run.sweep.files import Points, Rows, empty_folder
from refmoe.run.sweep.plan import SweepPlan
from refmoe.weights.checkpoint import summary


@dataclass
class Run:
    """A sweep under way."""

    plan: SweepPlan
    folder: Path
    state: dict[str, Any]  # facts, done (-1: not even the embedding), bytes_read, points
    points: Points
    x: tuple[Rows, Rows]  # hidden states [T, D] after even layers, and after odd ones
    h: Rows  # [T, D] after the first half of the layer at work
    chosen: Rows  # experts [T, K] of the layer at work
    weight: Rows  # and their weights [T, K]
    bar: Progress
    expected: float  # bytes of a layer's experts that the bar counts on

    def count_read(self, size: float, instead_of: float = 0.0) -> None:
        """Count bytes of weights that were asked for, `instead_of` of which the bar expected."""
        self.state["bytes_read"] += int(size)
        self.bar.total += size - instead_of
        self.bar.advance(size)

    def finish(self, done: int) -> None:
        """Write down that so many layers are done; what they were made of may be overwritten."""
        self.state["points"] |= self.points.finish()
        self.state["done"] = done
        with write_atomically(self.folder / "state.json", to_disk=True) as part:
            part.write_text(json.dumps(self.state), "utf-8")

    def check_checkpoint(self) -> None:
        """Raise `InputError` if the checkpoint's files are no longer those it began with."""
        checkpoint = self.plan.model.checkpoint
        if checkpoint.identity != self.plan.facts["checkpoint"]:
            raise InputError(
                f"{checkpoint.path}: config.json or a shard has changed since the sweep began; "
                f"{self.state['done']} layers are kept for when it is as it was"
            )


def begin_run(plan: SweepPlan, folder: Path) -> Run:
    """Begin a sweep, or go on from what an earlier run left in the folder.

    Raises `InputError` if that was another sweep or is damaged, or if the disk is too full.
    """
    state = _read_state(plan, folder)
    for part in folder.glob("*.part"):  # of a write that was interrupted
        part.unlink()
    here = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free < plan.needed - here:
        raise InputError(
            f"{folder}: {free / 1e9:.3f} GB are free there, this sweep of {plan.T} rows takes "
            f"{(plan.needed - here) / 1e9:.3f} GB more"
        )
    cfg, dtype = plan.cfg, plan.decoder.nx.dtype
    hidden, choice = (plan.T, cfg.hidden_size), (plan.T, cfg.num_experts_per_tok)
    once, expected = _expected_bytes(plan)
    total = once + expected * sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    bar = Progress(total, name="sweep", done=state["bytes_read"])
    return Run(
        plan,
        folder,
        state,
        Points(folder / "points", plan.wanted, cfg.n_routed_experts),
        x=(Rows(folder / "x0", hidden, dtype), Rows(folder / "x1", hidden, dtype)),
        h=Rows(folder / "h", hidden, dtype),
        chosen=Rows(folder / "chosen", choice, np.int32),
        weight=Rows(folder / "weight", choice, dtype),
        bar=bar,
        expected=expected,
    )


def _read_state(plan: SweepPlan, folder: Path) -> dict[str, Any]:
    """Return the state that an earlier run left, or that of a sweep that has not begun."""
    file = folder / "state.json"
    state: dict[str, Any] = {"facts": plan.facts, "done": -1, "bytes_read": 0, "points": {}}
    if not file.exists():
        empty_folder(folder)
        return state
    try:
        old = json.loads(file.read_text("utf-8"))
        state = {key: old[key] for key in state}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged; --restart begins anew") from None
    names = sorted(plan.facts.keys() | state["facts"].keys())
    other = [n for n in names if state["facts"].get(n) != plan.facts.get(n)]
    if other:
        raise InputError(
            f"{folder} holds {max(0, state['done'])} layers of another sweep: its "
            f"{', '.join(other)} differ; --restart forgets them and begins anew"
        )
    return state


def _expected_bytes(plan: SweepPlan) -> tuple[float, float]:
    """Return the bytes of the weights that every row needs, and of a layer's chosen experts.

    Each expert is taken to be as likely to be chosen as another.
    """
    cfg = plan.cfg
    sizes = summary(plan.model.checkpoint)["bytes"]
    once = sum(
        n for kind, n in sizes.items() if kind not in ("routed experts", "embedding", "other")
    )
    moe = sum(map(cfg.is_moe, range(cfg.num_hidden_layers)))
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** plan.T if moe else 1.0
    return once, sizes.get("routed experts", 0) / max(1, moe) * (1 - missed)


def size_of(w: Any) -> int:
    """Return the bytes of a matrix, or of a tuple of matrices, as they are stored."""
    if w is None:
        return 0
    own = getattr(w, "nbytes", None)
    return int(own) if own is not None else sum(map(size_of, w))


@contextmanager
def count_rows_from(begin: int) -> Iterator[None]:
    """Let a `NonFinite` inside say from which row on it counts its own."""
    try:
        yield
    except NonFinite as e:
        raise NonFinite(f"{e} of those from row {begin} of all prompts on") from None
