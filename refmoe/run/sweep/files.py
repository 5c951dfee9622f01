"""Keep a sweep's state in files, so that a killed one goes on."""

import errno
import importlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError, write_atomically
from refmoe.run.sweep.work import COPIED, Work

# --- files --------------------------------------------------------------------------------------


class Rows:
    """A file of rows, mapped while some of them are read or written: its pages are given back."""

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
        """Let go of the pages; what is in them stays in the file."""
        pages: Any = self.map._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """To the disk."""
        self.map.flush()
        with self.file.open("rb+") as raw:
            os.fsync(raw.fileno())


def _allocate(fd: int, size: int) -> None:
    """Place for so many bytes, now: a mapped file that runs out of it later kills the process."""
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
    """A watcher that appends what is wanted to a file for each point, rows in order."""

    def __init__(self, folder: Path, wanted: frozenset[str], experts: int):
        self.folder, self.wanted = folder, wanted
        self.ids = np.int16 if experts <= 1 << 15 else np.int32
        self.kept: dict[str, list[Any]] = {}  # name → dtype, shape of a row
        self.rows: np.ndarray | None = None  # those of an expert's batch among all

    def wants(self, path: str) -> bool:
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
        mode = "ab" if name in self.kept else "wb"
        self.folder.mkdir(exist_ok=True)
        with (self.folder / name).open(mode) as file:  # they may be thousands: none stays open
            file.write(np.ascontiguousarray(x).data)
        self.kept[name] = [x.dtype.name, list(x.shape[1:])]

    def finish(self) -> dict[str, list[Any]]:
        """All to the disk → what they are."""
        for name in self.kept:
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())
        kept, self.kept = self.kept, {}
        return kept


@contextmanager
def _locked(folder: Path, restart: bool) -> Iterator[None]:
    """One process at a time; `restart` empties the folder."""
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
            _empty(folder)
        yield


def _empty(folder: Path) -> None:
    """The state first: without it the rest is nothing."""
    (folder / "state.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name != "lock":
            file.unlink()


def _clear(folder: Path) -> None:
    _empty(folder)
    (folder / "lock").unlink()
    folder.rmdir()


@contextmanager
def _explained(work: Work, folder: Path) -> Iterator[None]:
    """What a person can do about a full disk or a shard that is gone; nothing is lost by them."""
    try:
        yield
    except OSError as e:
        kept = "what is done is kept: the same command goes on from there"
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{folder}: no room left on the disk ({e.strerror}); this sweep takes "
                f"{work.needed / 1e9:.3f} GB there. Make room; {kept}"
            ) from None
        if not work.model.checkpoint.path.exists() or e.errno == errno.ENOENT:
            raise InputError(f"{e}; {kept}") from None
        raise


def _replaced(file: Path, document: Mapping[str, Any]) -> None:
    with write_atomically(file, to_disk=True) as part:
        part.write_text(json.dumps(document), "utf-8")
