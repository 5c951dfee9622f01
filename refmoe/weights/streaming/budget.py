"""Divide a budget of bytes between weights that stay and weights that are read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from refmoe.files import InputError
from refmoe.weights.checkpoint import Checkpoint, TensorEntry
from refmoe.weights.streaming.reader import PAGE, Extent

GAP = 2 * PAGE  # bytes between two tensors that are read along with them
TILE = 64 << 20  # bytes of a tile of the head
ROWS = 1 << 21  # elements that `fast/linear.py` decodes at once: a tile is whole ones of these
FEW = 4  # tokens; with more, most experts of the next layer are chosen anyway


class Layout(NamedTuple):
    """Tensors in one place: what is read where, and where each then lies."""

    extents: tuple[tuple[Extent, int], ...]  # and its offset
    at: dict[tuple[Path, int], int]  # file and start of a tensor → offset
    nbytes: int


def layout(tensors: Iterable[TensorEntry]) -> Layout:
    """Whole pages of the files; tensors near each other are one read."""
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


class Budget(NamedTuple):
    """How the bytes are divided."""

    resident: frozenset[int]  # of the items
    buffer: int  # bytes of each of two
    slots: int  # experts


def least(items: Sequence[int], expert: int, chosen: int) -> int:
    """The smallest budget that works: bytes for a layer's choice of experts, and either for all
    items or, beside those that stay, for two of the largest of the others."""
    return min(_dense(items, n) for n in range(len(items) + 1)) + chosen * expert


def divide(items: Sequence[int], expert: int, experts: int, chosen: int, ram: int) -> Budget:
    """items: bytes of each layer's always-active weights and of each tile of the head; expert: of
    the largest routed one; chosen: how many a token takes in a layer."""
    if not experts:
        expert = chosen = 0
    smallest = least(items, expert, chosen)
    if ram < smallest:
        raise InputError(
            f"a budget of {ram / 1e9:.2f} GB is too small: {smallest / 1e9:.2f} GB are needed, "
            f"{chosen * expert / 1e9:.2f} GB of them for the {chosen} experts that one token "
            "chooses in a layer"
        )
    fits = [n for n in range(len(items) + 1) if _dense(items, n) + chosen * expert <= ram]
    roomy = [n for n in fits if _dense(items, n) + 2 * chosen * expert <= ram]
    stay = max(roomy or fits)
    largest_first = sorted(range(len(items)), key=lambda i: -items[i])
    rest = [items[i] for i in largest_first[stay:]]
    slots = (ram - _dense(items, stay)) // expert if expert else 0
    return Budget(frozenset(largest_first[:stay]), max(rest, default=0), min(slots, experts))


def _dense(items: Sequence[int], stay: int) -> int:
    """Bytes with the largest `stay` items resident."""
    sizes = sorted(items, reverse=True)
    return sum(sizes[:stay]) + (2 * sizes[stay] if stay < len(sizes) else 0)


def expert_tensors(checkpoint: Checkpoint, layer: int, e: int) -> list[TensorEntry]:
    """The tensors of a routed expert."""
    at = f"model.layers.{layer}.mlp.experts.{e}."
    ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_scale_inv")
    names = (f"{at}{part}_proj.{end}" for part in ("gate", "up", "down") for end in ends)
    tensors = checkpoint.tensors
    return [tensors[name] for name in names if name in tensors]


def _slot(tensors: Sequence[TensorEntry]) -> int:
    """Bytes that are enough wherever in its file an expert of this size lies."""
    return sum(-(-(t.nbytes + 2 * PAGE + GAP) // PAGE) * PAGE for t in tensors)


def _by_layer(checkpoint: Checkpoint) -> list[list[TensorEntry]]:
    """What every token uses of each layer."""
    out: list[list[TensorEntry]] = [[] for _ in range(checkpoint.cfg.num_hidden_layers)]
    for name, stored in checkpoint.tensors.items():
        if name.startswith("model.layers.") and ".mlp.experts." not in name:
            i = int(name.split(".", 3)[2])
            if i < len(out) and "rotary_emb" not in name:
                out[i].append(stored)
    return out


def _head_tiles(checkpoint: Checkpoint) -> list[list[TensorEntry]]:
    """lm_head in tiles of whole rows; one tile where it has scales beside it."""
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


def _size(file: Path) -> int:
    return file.stat().st_size
