"""Write a checkpoint of K2-Thinking's size that takes little disk: real headers, mostly holes.

    real     every header, the index and config.json: 208,215 tensors, their names, offsets, shapes
             routers and their biases, norms, every weight_shape
             the first 4,096 rows of embedding and head
             the first rows of every expert's scales, a disk's block of each matrix
    holes    packed words, the rest of the scales, attention, shared experts, the dense MLP: zeros
             that the file system does not store

The layout is that of K2.5's text model, which K2-Thinking shares: layer i in shard i + 1,
embedding, norm and head in the last of 62; inside a shard the order of safetensors' writer, so
that an expert's three packed matrices lie side by side. A code of 0 means -8: where its scale is
real, a weight is -8·scale, different in every expert; elsewhere it is 0. Scales are 1/(16·√I) for
I columns, within tens of per cents, so a row of an expert's matrix gives usually half the RMS of
what it is given and never more than √I times that (Cauchy-Schwarz): activations stay finite
through all layers.

What a run on it shows: addresses, residency, what is read when, the time of the arithmetic. What it
does not: numbers of the model, and the speed of a disk, as a hole is read from memory. It has no
vocabulary; prompts are ids, below 4,096 for an embedding that is not zero.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError, write_atomically
from refmoe.model.matrix import bf16_bits
from refmoe.progress import Progress
from refmoe.weights.checkpoint import INDEX, expected
from refmoe.weights.synthetic.k2_slice import SHAPE, YARN, Numbers, scale_numbers, weight_shape
from refmoe.weights.synthetic.random import FIXED, INT4_CONFIG
from refmoe.weights.writer import Spec, header

NAME = "k2-full"
ROWS = 4096  # of embedding and head that are real
HEAD = 300  # bytes of header and index to a tensor, at most
BLOCK = 4096  # bytes, of most file systems
GROUP = 32  # columns to a scale
FEW = 64  # one row in so many of an expert at most, so that a smaller shape stays finite too
PROBE = 1 << 26  # bytes; on a file system without holes they are written, so no more
SPARE = 1 << 30  # bytes that are left free
# moonshotai/Kimi-K2-Thinking config.json: beta_fast is 1.0, K2.5's is 32.0
CONFIG: dict[str, Any] = {
    **FIXED,
    **SHAPE,
    "num_hidden_layers": 61,
    "rope_scaling": {**YARN, "beta_fast": 1.0},
    "torch_dtype": "bfloat16",
    "quantization_config": INT4_CONFIG,
}
ORDER = {"F32": 0, "I32": 1, "BF16": 2}  # safetensors' writer: wide types first, then by name
SAID = f"""\
The weights are mostly zero. Real: headers and index, routers, norms, weight_shape, the first
{ROWS:,} rows of embedding and head, the first rows of every expert's scales. Holes, which read as
zeros: the rest of these, the experts' words, attention, shared experts, the dense MLP.
A run on it shows addressing, residency, overlap and the time of the arithmetic. It does not show
numerics, nor the speed of a disk: a hole is read from memory.
Prompts are ids, below {ROWS:,}; there is no vocabulary."""


class Full(NamedTuple):
    """The sizes of a checkpoint that was written."""

    apparent: int  # bytes of the shards
    disk: int  # bytes of the disk's blocks that they take
    shards: int


def k2_full(folder: Path, shape: Mapping[str, Any] | None = None, seed: int = 0) -> Full:
    """Write the checkpoint as `folder`, all or nothing; if it is there already, write nothing.

    `shape` replaces fields of config.json. Raises `InputError` if the folder holds anything else,
    the file system knows no holes or no files of this size, or the disk is too full.
    """
    raw = {**CONFIG, **(shape or {})}
    raw["num_key_value_heads"] = raw["num_attention_heads"]
    ids = {k: v for k, v in raw.items() if k.endswith("_token_id") and isinstance(v, int)}
    cfg = Config.from_dict(raw)
    raw |= {k: v % cfg.vocab_size for k, v in ids.items()}
    files = _layout(cfg)
    index = {
        "metadata": {
            "total_size": sum(spec.nbytes for specs in files.values() for spec in specs),
            "made_by": f"refmoe tiny --shape {NAME}, seed {seed}: sparse files, mostly zeros",
        },
        "weight_map": {spec.name: file for file, specs in files.items() for spec in specs},
    }
    texts = {"config.json": json.dumps(raw, indent=2), INDEX: json.dumps(index, indent=2)}
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not all(_holds(folder / name, text) for name, text in texts.items()):
            raise InputError(f"{folder} exists and is not empty; give a new folder")
        return _sizes(folder, files)
    if folder.is_mount():
        raise InputError(f"{folder} is where a disk is mounted; name a new folder inside it")
    with write_atomically(folder) as part:
        part.mkdir(parents=True)
        need = _check_disk(part, files)
        _write(part, files, seed)
        if (disk := _sizes(part, files).disk) > 2 * need:
            raise InputError(
                f"{folder}: takes {disk:,} bytes of disk, expected at most {need:,}: this file "
                "system fills holes; name a folder on another disk"
            )
        for name, text in texts.items():
            (part / name).write_text(text + "\n", "utf-8")
    return _sizes(folder, files)


def _layout(cfg: Config) -> dict[str, list[Spec]]:
    """Return for each file its tensors, in order."""
    count = cfg.num_hidden_layers + 1
    files: dict[str, list[Spec]] = {
        f"model-{i + 1:05d}-of-{count:06d}.safetensors": [] for i in range(count)
    }
    shards = list(files.values())
    for name, shape, dtypes in expected(cfg):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        dtype = "F32" if name.endswith("_bias") else dtypes[0]
        shards[int(layer[1]) if layer else -1].append(Spec(name, dtype, shape))
    for specs in shards:
        specs.sort(key=lambda spec: (ORDER.get(spec.dtype, len(ORDER)), spec.name))
    return files


def count_real(spec: Spec) -> int:
    """Return how many of a tensor's numbers are written; they are its first."""
    name, _, shape = spec
    whole = ("norm.weight", ".mlp.gate.weight", "e_score_correction_bias", "weight_shape")
    if name.endswith(whole):
        return prod(shape)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return min(ROWS, shape[0]) * shape[1]
    if name.endswith("weight_scale"):
        return max(1, min(shape[0] // FEW, BLOCK // (2 * shape[1]))) * shape[1]
    return 0


def _check_disk(part: Path, files: Mapping[str, list[Spec]]) -> int:
    """Return the bytes of disk that it will take at most.

    Raises `InputError` unless the file system has holes, takes the largest shard, and has room.
    """
    probe = part / "probe"
    with probe.open("wb") as out:
        out.truncate(PROBE)
        out.seek(PROBE // 2)
        out.write(b"1")
        out.flush()
        os.fsync(out.fileno())  # some file systems count blocks only then
        block = on_disk(probe)
        if block > PROBE // 4:
            raise InputError(
                f"{part.parent}: this file system knows no holes (a file of {PROBE:,} bytes, all "
                f"but one never written, takes {block:,}); {NAME} has "
                f"{sum(s.nbytes for specs in files.values() for s in specs) / 1e9:.0f} GB of them: "
                "name a folder on another disk (ext4, xfs, btrfs, zfs and apfs have holes)"
            )
        largest = max(sum(s.nbytes + HEAD for s in specs) for specs in files.values())
        try:
            out.truncate(largest)
        except OSError as e:
            raise InputError(
                f"{part.parent}: this file system takes no file of {largest:,} bytes "
                f"({e.strerror}); name a folder on another disk"
            ) from None
    probe.unlink()
    need, free = _need(files, max(block, BLOCK)), shutil.disk_usage(part).free
    if free < need + SPARE:
        raise InputError(
            f"{part.parent}: {NAME} takes {need / 1e9:.1f} GB of disk here and should leave "
            f"{SPARE / 1e9:.1f} GB; {free / 1e9:.1f} GB are free; name a folder on another disk"
        )
    return need


def _need(files: Mapping[str, list[Spec]], block: int) -> int:
    """Return the bytes that it takes at most of a disk of such blocks.

    Each run of real numbers then has blocks of its own.
    """
    blocks = 0
    for specs in files.values():
        blocks += HEAD * len(specs) // block + 2
        for spec in specs:
            nbytes = count_real(spec) * spec.nbytes // prod(spec.shape)
            blocks += nbytes // block + 2 if nbytes else 0
    return blocks * block


def _write(part: Path, files: Mapping[str, list[Spec]], seed: int) -> None:
    numbers, drawn = Numbers(seed), dict[tuple[str, tuple[int, ...]], np.ndarray]()
    total = sum(
        count_real(s) * s.nbytes // prod(s.shape) for specs in files.values() for s in specs
    )
    with Progress(total, name=NAME) as bar:
        for name, specs in files.items():
            head = header(specs, {"format": "pt"})
            at = len(head)
            packed = {spec.name: spec.shape for spec in specs if spec.dtype == "I32"}
            with (part / name).open("wb") as out:
                out.truncate(at + sum(spec.nbytes for spec in specs))
                out.write(head)
                for spec in specs:
                    out.seek(at)
                    for piece in _pieces(spec, packed, numbers, drawn) if count_real(spec) else ():
                        out.write(piece.data)
                        bar.advance(piece.nbytes)
                    at += spec.nbytes


def _pieces(
    spec: Spec,
    packed: Mapping[str, tuple[int, ...]],
    numbers: Numbers,
    drawn: dict[tuple[str, tuple[int, ...]], np.ndarray],
) -> Iterator[np.ndarray]:
    """Yield the real numbers of a tensor; `drawn` keeps those that other layers use as well."""
    name, dtype, shape = spec
    if name.endswith("weight_shape"):
        yield weight_shape(packed[name.replace("_shape", "_packed")])
        return
    key = re.sub(r"\d+", "", name), shape
    if key not in drawn:
        if name.endswith("weight_scale"):
            few = 1 + np.float32(0.1) * numbers.normal[: 2 * prod(shape)]
            plain = few / np.float32(16 * sqrt(GROUP * shape[1]))
        else:
            plain = scale_numbers(name, shape, numbers.normal)
        drawn[key] = bf16_bits(plain) if dtype == "BF16" else plain
    yield from numbers.repeat(drawn[key], count_real(spec))


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text("utf-8") == text + "\n"


def _sizes(folder: Path, files: Mapping[str, list[Spec]]) -> Full:
    paths = [folder / name for name in files]
    return Full(sum(f.stat().st_size for f in paths), sum(map(on_disk, paths)), len(paths))


def on_disk(file: Path) -> int:
    """Return the bytes of the disk's blocks that a file takes."""
    return file.stat().st_blocks * 512
