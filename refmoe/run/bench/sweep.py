"""Measure how near a sweep comes to what the disk gives.

    ratio = bytes of weights read / seconds of the sweep / the disk's own rate

1 where the disk is never idle; less where computing binds, as with many tokens, so few are swept.
The disk's own rate is that of large reads one after another from the same files, which are not in
the system's cache, with nothing computed meanwhile: the quicker way of two, before and after, in
the mean.
"""

import tempfile
from pathlib import Path
from typing import Any

from refmoe.files import InputError
from refmoe.run.bench.model import random_tokens
from refmoe.run.load import Model, load
from refmoe.run.sweep.sweep import sweep
from refmoe.weights.streaming.reader import PAGE, WAYS, forget, high_water, measure_rate

SAMPLE = 1 << 30  # bytes of one reading


def measure_sweep(
    path: str | Path | None,
    ram: int | None = None,
    count: int = 8,
    dense: str = "exact",
    reads: str | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure a sweep of `count` random tokens that keeps the logits of the last.

    `folder` is where the result may lie until it is done; None: the system's.
    """
    load().logits([1] * count)  # kernels are compiled, or read from their cache
    model = load(path, dense=dense, ram=ram, reads=reads)
    files = sorted({t.file for t in model.checkpoint.tensors.values()})
    rates = [_read_rate(files, 0.0)]
    for file in files:
        forget(file)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "sweep.safetensors"
        done = sweep(model, [random_tokens(model, count)], out, logits="all", positions="last")
    read = _bytes_read(model, done.bytes_read)
    if model.store:
        model.store.close()
        rates.append(_read_rate(files, 0.5))  # what is mapped cannot be dropped from the cache
    disk = sum(rates) / len(rates)
    return {
        "bytes_read": read,
        "checkpoint_bytes": sum(t.nbytes for t in model.checkpoint.tensors.values()),
        "seconds": done.seconds,
        "disk_gbs": disk / 1e9,
        "ratio": read / done.seconds / disk,
        "max_rss": high_water(),
    }


def _bytes_read(model: Model, asked: int) -> int:
    """Return the bytes that a store read, or what was asked for, from the cache or the disk."""
    return model.store.counters.bytes_read if model.store else asked


def _read_rate(files: list[Path], share: float) -> float:
    """Measure bytes a second of plain reading, from this share of the largest file on."""
    file = max(files, key=lambda f: f.stat().st_size)
    size = file.stat().st_size // PAGE * PAGE
    start = int(share * max(0, size - SAMPLE)) // PAGE * PAGE
    found = []
    for way in WAYS:
        try:
            found.append(measure_rate(file, way, start, min(SAMPLE, size - start)))
        except (OSError, InputError):  # direct reads are refused by some file systems
            continue
    return max(found)


def format_sweep(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_sweep` to people."""
    d = document
    return [
        f"{d['bytes_read'] / 1e9:.3f} GB of a checkpoint of {d['checkpoint_bytes'] / 1e9:.3f} GB "
        f"in {d['seconds']:.2f} s, {d['bytes_read'] / d['seconds'] / 1e9:.2f} GB/s",
        f"{d['ratio']:.2f} of what the disk gives alone, {d['disk_gbs']:.2f} GB/s",
        f"most memory ever resident {d['max_rss'] / 1e9:.2f} GB",
    ]
