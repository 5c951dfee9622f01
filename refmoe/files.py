"""Read and write files: text, JSON, sizes; the atomic write and the cache folder of the package.

Every file that refmoe makes under a name somebody else may open goes through `write_atomically`,
and every file that it keeps for its own next run lies in `cache_folder(kind)`.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input from outside: the message says what was found, what was expected, where, and what
    to do. The command line prints it without a traceback and ends with exit code 2."""


FILE_LIMIT = 200_000_000  # bytes; the index of K2's 208,550 tensors has some 20 million
SIZE_LIMIT = 1e24  # bytes: beyond every memory and disk there is


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises `InputError` if the file is missing, longer than `FILE_LIMIT`, or not UTF-8.
    """
    try:
        if file.stat().st_size > FILE_LIMIT:
            raise InputError(f"{file}: more than {FILE_LIMIT:,} bytes; is it the right file?")
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: cannot be read as UTF-8 ({e})") from None


def read_json(file: Path) -> Any:
    """Return the value that a JSON file holds. Raises `InputError` if it is no JSON file."""
    try:
        return json.loads(read_text(file))
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # also an integer of more than 4,300 digits
        raise InputError(f"{file}: not JSON ({e})") from None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `InputError` if it holds anything else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file}: a JSON {type(value).__name__}, expected an object")
    return value


def parse_size(text: str, what: str = "a size") -> int:
    """Return the bytes that a text means: 64GB is 64·10⁹, 64GiB 64·2³⁰, 1.5e9 is itself.

    Raises `InputError`, which names `what`, for a text of another form, for less than one byte and
    for more than `SIZE_LIMIT`.
    """
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if m is not None and (m[2] or not m[3]):
        power = "kmgt".index(m[2]) + 1 if m[2] else 0
        size = float(m[1]) * (1024 if m[3] else 1000) ** power
        if 1 <= size <= SIZE_LIMIT:
            return int(size)
    raise InputError(f"{what} = {text!r}, expected bytes like 64GB (10⁹) or 64GiB (2³⁰)")


@contextmanager
def write_atomically(
    target: Path, *, part: Path | None = None, to_disk: bool = False
) -> Iterator[Path]:
    """Yield a path to write to, and give what was written there the name `target` at the end.

    Under its name `target` is therefore either whole or what it was before. The path yielded does
    not exist yet; a file or a folder may be made there. It is `part`, which must lie on the same
    disk, or a sibling NAME.PID.part. Where the block raises, it is removed again. `to_disk` waits
    until the file's bytes and its new name are on the disk, so that a power cut undoes neither.
    """
    if part is None:
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield part
        if to_disk:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, target)  # an empty folder of that name gives way to a folder
    except BaseException:
        _remove(part)
        raise
    if to_disk:
        sync_folder(target.parent)


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there; failing to do so is no error of its own."""
    if path.is_dir():
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names that were added to or changed in a folder are on the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_home() -> Path:
    """Return the folder of all programs' caches: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_folder(kind: str) -> Path:
    """Return $XDG_CACHE_HOME/refmoe/KIND, where refmoe keeps files that later runs save time by.

    `kind` is one of `dense` (8-bit copies of weights), `envelopes` (sampled noise) and `usage`
    (how often experts were used). The folder may not exist yet, and may be deleted at any time.
    """
    return cache_home() / "refmoe" / kind
