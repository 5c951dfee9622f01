"""`--dense q8`: what every token uses (attention, shared experts, dense MLP, head) in 8 bits.

Half the bytes of bf16, so nearly twice the tokens; a weight is off by up to half a step of its
group of 32, max|w|/254. The checkpoint stays as it is: the blocks are made when a model is opened,
and those of a large model are kept in a file that is mapped the next time,

    $XDG_CACHE_HOME/refmoe/dense/KEY.safetensors     KEY: of config.json, names, sizes and times

which has its name only once it is whole, and is checked by its SHA-256 when it is opened. Left
alone: matrices without whole groups of 32 columns, and those that are INT4 already.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from refmoe.files import InputError, cache_folder
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MlpWeights, MoeWeights
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.formats.registry import all_formats, formats_by_part
from refmoe.model.matrix import Matrix, dequantize, format_of, tiles
from refmoe.model.numerics import Numerics
from refmoe.weights.checkpoint import Checkpoint, read_header, tensor_class
from refmoe.weights.writer import Spec, write_stream

CLASSES = ("attention", "shared experts", "dense mlp", "head")
LARGE = 1 << 28  # bytes of blocks from which on they are kept in a file
TILE = 1 << 20  # elements that are made wide at once


def dense_q8(checkpoint: Checkpoint, decoder: Decoder, keep: bool | None = None) -> Decoder:
    """Return the decoder with 8-bit dense weights; `keep` in a file: by default, large ones."""
    matrices: dict[str, Matrix] = {}

    def note(name: str, m: Matrix) -> Matrix:
        matrices[name] = m
        return m

    replaced(decoder, note)
    size = sum(size_of(m) for m in matrices.values())
    made = _kept(checkpoint, matrices, size) if keep or (keep is None and size > LARGE) else None
    if made is None:
        made = {name: quantized(m) for name, m in matrices.items()}
    return replaced(decoder, lambda name, _: made[name])


def checkpoint_q8(checkpoint: Checkpoint, nx: Numerics) -> Checkpoint:
    """Return the checkpoint with these matrices in the kept file, for reading without mapping.

    Raises `InputError` where there is no place for the file.
    """
    matrices: dict[str, Matrix] = {}

    def note(name: str, m: Matrix) -> Matrix:
        matrices[name] = m
        return m

    replaced(checkpoint.decoder(nx), note)
    if not matrices:
        return checkpoint
    size = sum(size_of(m) for m in matrices.values())
    file = _file(checkpoint, matrices, size)
    if file is None:
        raise InputError(
            f"{folder()}: no place for {size / 1e9:.1f} GB of 8-bit weights (twice that must be "
            "free); set XDG_CACHE_HOME to another disk, or leave --dense q8 away"
        )
    out = checkpoint.reading(checkpoint.source)
    out.tensors = dict(checkpoint.tensors)
    for name, t in read_header(file).items():
        for part in formats_by_part(checkpoint.cfg.quantization):
            if part != ".weight":
                out.tensors.pop(name + part, None)
        shape = tuple(matrices[name].shape)
        out.tensors[f"{name}.weight"] = t._replace(dtype="Q8_0", shape=shape)
    return out


def sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the bytes of these matrices as they are stored, and in 8 bits."""
    exact = q8 = 0
    for name, t in checkpoint.tensors.items():
        if tensor_class(name, checkpoint.cfg) in CLASSES and "layernorm" not in name:
            exact += t.nbytes
            alone = t.dtype == "I32" or not name.endswith(".weight") or t.shape[-1] % 32
            q8 += t.nbytes if alone and not name.endswith("_inv") else 0
            q8 += 0 if alone else prod(t.shape) // 32 * 34
    return exact, q8


def replaced(decoder: Decoder, change: Callable[[str, Matrix], Matrix]) -> Decoder:
    """Return the decoder with `change(name, matrix)` for each matrix that 8 bits are for."""

    def one(name: str, m: Matrix) -> Matrix:
        exact = any(f.name == format_of(m) and not f.eight_bits for f in all_formats())
        return m if exact or m.shape[1] % 32 else change(name, m)

    def mlp(at: str, w: MlpWeights) -> MlpWeights:
        return MlpWeights(*(one(at + name, m) for name, m in w._asdict().items()))

    def layer(i: int, w: LayerWeights) -> LayerWeights:
        at = f"model.layers.{i}."
        projections = {
            name: one(f"{at}self_attn.{name}", m)
            for name, m in w.self_attn._asdict().items()
            if m is not None and len(m.shape) == 2
        }
        inside: MlpWeights | MoeWeights
        if not isinstance(w.mlp, MoeWeights):
            inside = mlp(f"{at}mlp.", w.mlp)
        elif w.mlp.shared_experts is not None:
            inside = w.mlp._replace(
                shared_experts=mlp(f"{at}mlp.shared_experts.", w.mlp.shared_experts)
            )
        else:
            inside = w.mlp
        return w._replace(self_attn=w.self_attn._replace(**projections), mlp=inside)

    layers = [layer(i, w) for i, w in enumerate(decoder.layers)]
    return replace(decoder, layers=layers, lm_head=one("lm_head", decoder.lm_head))


def size_of(m: Matrix) -> int:
    """Return the bytes of a matrix in blocks of Q8_0."""
    return m.shape[0] * m.shape[1] // 32 * 34


def quantized(m: Matrix) -> Q8:
    """Return a matrix in 8 bits, made a tile at a time."""
    out = Q8(np.empty((m.shape[0], m.shape[1] // 32, 34), np.uint8))
    for rows, tile in tiles(m, TILE):
        out.blocks[rows] = Q8.quantize(dequantize(tile, np.float32)).blocks
    return out


def folder() -> Path:
    """Return the folder in which the blocks of large models are kept."""
    return cache_folder("dense")


def _kept(checkpoint: Checkpoint, matrices: dict[str, Matrix], size: int) -> dict[str, Q8] | None:
    """Return the blocks from the kept file; None if it cannot be made."""
    file = _file(checkpoint, matrices, size)
    if file is None:
        return None
    return {
        name: Q8(np.asarray(np.memmap(file, np.uint8, "r", t.start, t.shape)))
        for name, t in read_header(file).items()
    }


def _file(checkpoint: Checkpoint, matrices: dict[str, Matrix], size: int) -> Path | None:
    """Return the kept file, made if it is not there or not whole; None if it cannot be."""
    key = hashlib.sha256(f"{checkpoint.identity} {sorted(matrices)}".encode()).hexdigest()
    file = folder() / f"{key}.safetensors"
    try:
        if not file.is_file() or not _whole(file):
            folder().mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder()).free < 2 * size:
                return None  # not worth the last of somebody's disk
            _write(file, matrices, checkpoint)
        there = read_header(file)
        sizes_there = {name: t.nbytes for name, t in there.items()}
        if sizes_there != {name: size_of(m) for name, m in matrices.items()}:
            return None
        return file
    except (OSError, InputError):  # no place for it, or a header that is damaged
        return None


def _write(file: Path, matrices: dict[str, Matrix], checkpoint: Checkpoint) -> None:
    """Write the kept file with one tile in memory at a time, and its hash beside it."""
    digest = hashlib.sha256()

    def blocks() -> Iterator[np.ndarray]:
        for m in matrices.values():
            for n, (_, tile) in enumerate(tiles(m, TILE)):
                q8 = Q8.quantize(dequantize(tile, np.float32)).blocks
                digest.update(q8.data)
                yield q8
                if n % 32 == 31:
                    checkpoint.let_go()
            checkpoint.let_go()

    specs = [Spec(n, "U8", (m.shape[0], m.shape[1] // 32, 34)) for n, m in matrices.items()]
    write_stream(file, specs, blocks(), "dense weights in 8 bits")
    file.with_suffix(".sha256").write_text(digest.hexdigest() + "\n")


def _whole(file: Path) -> bool:
    """Tell whether the data of the file is what was written."""
    try:
        told = file.with_suffix(".sha256").read_text().strip()
        with file.open("rb") as raw:
            raw.seek(int.from_bytes(raw.read(8), "little"), os.SEEK_CUR)
            return hashlib.file_digest(raw, "sha256").hexdigest() == told
    except (OSError, OverflowError):
        return False
