"""Lay tensors out for reading: which extents of files go where in a piece of memory."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.model.formats.registry import formats_by_part
from refmoe.weights.checkpoint import Checkpoint, TensorEntry
from refmoe.weights.streaming.reader import PAGE, Extent

GAP = 2 * PAGE  # bytes between two tensors of one read: less is read along with them
TILE = 64 << 20  # bytes of a tile of the head: small beside a budget, large for a disk
ROWS = 1 << 21  # elements that `fast/linear.py` decodes at once: a tile is whole ones of these


class Layout(NamedTuple):
    """Tensors in one piece of memory: what is read where, and where each tensor then lies."""

    extents: tuple[tuple[Extent, int], ...]  # and its offset in the memory
    at: dict[tuple[Path, int], int]  # file and start of a tensor → offset in the memory
    nbytes: int

    @property
    def needed(self) -> int:
        """Bytes that are read from files, without what lies beyond their ends."""
        return sum(extent.needed for extent, _ in self.extents)

    def places(self, memory: np.ndarray) -> list[tuple[Extent, np.ndarray]]:
        """Return each extent with its place in the memory, uint8 [nbytes]."""
        return [(extent, memory[at : at + extent.nbytes]) for extent, at in self.extents]

    def source(self, memory: np.ndarray) -> Callable[[TensorEntry], np.ndarray]:
        """Return a function that finds a tensor's bytes there; read-only, as mapped ones are."""
        fixed = memory.view()
        fixed.flags.writeable = False

        def source(t: TensorEntry) -> np.ndarray:
            at = self.at[t.file, t.start]
            return fixed[at : at + t.nbytes]

        return source


def lay_out(tensors: Iterable[TensorEntry]) -> Layout:
    """Lay tensors out in whole pages of their files; those near each other are one read."""
    runs: list[list[TensorEntry]] = []
    for t in sorted(tensors, key=lambda t: (t.file.as_posix(), t.start)):
        last = runs[-1][-1] if runs else None
        if last and last.file == t.file and t.start - (last.start + last.nbytes) <= GAP:
            runs[-1].append(t)
        else:
            runs.append([t])
    extents: list[tuple[Extent, int]] = []
    at: dict[tuple[Path, int], int] = {}
    offset = 0
    for run in runs:
        start = run[0].start // PAGE * PAGE
        needed = max(t.start + t.nbytes for t in run) - start
        nbytes = -(-needed // PAGE) * PAGE
        extents.append((Extent(run[0].file, start, nbytes, needed), offset))
        for t in run:
            at[t.file, t.start] = offset + t.start - start
        offset += nbytes
    return Layout(tuple(extents), at, offset)


def expert_tensors(checkpoint: Checkpoint, layer: int, e: int) -> list[TensorEntry]:
    """Return the tensors of a routed expert."""
    at = f"model.layers.{layer}.mlp.experts.{e}."
    ends = dict.fromkeys((".weight", *formats_by_part(checkpoint.cfg.quantization)))
    names = (f"{at}{part}_proj{end}" for part in ("gate", "up", "down") for end in ends)
    tensors = checkpoint.tensors
    return [tensors[name] for name in names if name in tensors]


def largest_expert(checkpoint: Checkpoint) -> int:
    """Return the bytes that a place for a routed expert must have: enough for every layer's.

    That is enough wherever in its file the expert lies, pages and gaps included. 0 if there is no
    layer with routed experts.
    """
    cfg = checkpoint.cfg
    layers = [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]
    return max((_widest(expert_tensors(checkpoint, i, 0)) for i in layers), default=0)


def _widest(tensors: Sequence[TensorEntry]) -> int:
    return sum(-(-(t.nbytes + 2 * PAGE + GAP) // PAGE) * PAGE for t in tensors)


def tensors_by_layer(checkpoint: Checkpoint) -> list[list[TensorEntry]]:
    """Return for each layer the tensors that every token uses."""
    out: list[list[TensorEntry]] = [[] for _ in range(checkpoint.cfg.num_hidden_layers)]
    for name, t in checkpoint.tensors.items():
        if name.startswith("model.layers.") and ".mlp.experts." not in name:
            i = int(name.split(".", 3)[2])
            if i < len(out) and "rotary_emb" not in name:
                out[i].append(t)
    return out


def head_tiles(checkpoint: Checkpoint) -> list[list[TensorEntry]]:
    """Return lm_head in tiles of whole rows; one tile if it has scales beside it."""
    own = [t for name, t in checkpoint.tensors.items() if name.startswith("lm_head.")]
    if [name for name in checkpoint.tensors if name.startswith("lm_head.")] != ["lm_head.weight"]:
        return [own] if own else []
    (t,) = own
    Z, D = t.shape
    row = t.nbytes // Z
    unit = max(8, ROWS // D & ~7)
    step = max(1, TILE // (row * unit)) * unit
    return [
        [t._replace(shape=(min(step, Z - n), D), start=t.start + n * row, nbytes=size)]
        for n in range(0, Z, step)
        for size in (min(step, Z - n) * row,)
    ]
