"""Keep the rows and points of a sweep in files, and hold the folder that they lie in."""

import errno
import importlib
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError
from refmoe.run.sweep.plan import SweepPlan

COPIED = 1 << 24  # bytes that are copied at once


class Rows:
    """A file of rows, mapped while some are read or written; its pages are then given back.

    A file of another size is laid out anew. Raises OSError where the disk has no room for it.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any):
        size = prod(shape) * np.dtype(dtype).itemsize
        with file.open("a+b") as raw:
            if os.fstat(raw.fileno()).st_size != size:
                raw.truncate(0)
                _allocate(raw.fileno(), size)
        self.file = file
        self.map = np.memmap(file, dtype, "r+", shape=shape)

    def __len__(self) -> int:
        return len(self.map)

    def __getitem__(self, rows: Any) -> np.ndarray:
        out = np.array(self.map[rows])
        self.release()
        return out

    def __setitem__(self, rows: Any, values: Any) -> None:
        self.map[rows] = values
        self.release()

    def release(self) -> None:
        """Give the pages back to the system; what is in them stays in the file."""
        pages: Any = self.map._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Wait until all rows are on the disk."""
        self.map.flush()
        with self.file.open("rb+") as raw:
            os.fsync(raw.fileno())


def _allocate(fd: int, size: int) -> None:
    """Make room for so many bytes now: a mapped file that has none later kills the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    zeros = bytes(COPIED)
    for at in range(0, size, COPIED):
        left = memoryview(zeros)[: size - at]
        while left:
            left = left[os.write(fd, left) :]


class Points:
    """A watcher that appends the points wanted to a file each, rows in order."""

    def __init__(self, folder: Path, wanted: frozenset[str], experts: int):
        self.folder, self.wanted = folder, wanted
        self.ids = np.int16 if experts <= 1 << 15 else np.int32
        self.kept: dict[str, list[Any]] = {}  # name → dtype, shape of a row; in this layer
        self.rows: np.ndarray | None = None  # of all rows, those that an expert is computing

    def wants(self, path: str) -> bool:
        """Return whether a point is one of those wanted, whatever the prompt."""
        return path.partition("@")[0] in self.wanted

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.wants(path):
            name = path.partition("@")[0]
            kept = x
            if name.endswith("gate#experts"):
                kept = x.astype(self.ids)
            elif name.endswith("#rows") and self.rows is not None:
                kept = self.rows[x]
            self.append(name, kept)
        return x

    def append(self, name: str, x: np.ndarray) -> None:
        """Append rows to a point's file, which a new layer begins anew."""
        mode = "ab" if name in self.kept else "wb"
        self.folder.mkdir(exist_ok=True)
        with (self.folder / name).open(mode) as file:  # they may be thousands: none stays open
            file.write(np.ascontiguousarray(x).data)
        self.kept[name] = [x.dtype.name, list(x.shape[1:])]

    def finish(self) -> dict[str, list[Any]]:
        """Wait until all files are on the disk → name, and dtype and shape of a row."""
        for name in self.kept:
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())
        kept, self.kept = self.kept, {}
        return kept


@contextmanager
def lock_folder(folder: Path, restart: bool) -> Iterator[None]:
    """Hold a folder, made if it is not there, for this process alone; `restart` empties it.

    Raises `InputError` if another process holds it, or if it is no sweep's.
    """
    there = folder.is_dir() and any(folder.iterdir())
    if there and not (folder / "lock").is_file():
        raise InputError(f"{folder} is there and no sweep's; move it away, or choose another --out")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a+b") as lock:
        try:
            flock: Any = importlib.import_module("fcntl")
            flock.flock(lock, flock.LOCK_EX | flock.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise InputError(
                f"{folder}: another process is at work there; wait for it, or choose another --out"
            ) from None
        if restart:
            empty_folder(folder)
        yield


def empty_folder(folder: Path) -> None:
    """Remove all files but the lock; the state first, for without it the rest is nothing."""
    (folder / "state.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name != "lock":
            file.unlink()


def remove_folder(folder: Path) -> None:
    """Remove the folder of a sweep that is done."""
    empty_folder(folder)
    (folder / "lock").unlink()
    folder.rmdir()


@contextmanager
def explain_errors(plan: SweepPlan, folder: Path) -> Iterator[None]:
    """Turn a full disk or a lost shard into an `InputError` that says what to do about it."""
    try:
        yield
    except OSError as e:
        kept = "what is done is kept: the same command goes on from there"
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{folder}: no room left on the disk ({e.strerror}); this sweep takes "
                f"{plan.needed / 1e9:.3f} GB there. Make room; {kept}"
            ) from None
        if not plan.model.checkpoint.path.exists() or e.errno == errno.ENOENT:
            raise InputError(f"{e}; {kept}") from None
        raise
