"""A folder with a dump of each rank of a parallel engine: `rank0.pt`, `rank1.pt`, …

The rank is the number behind rank, tp or ep in a file's name, or in that of a folder inside.
forms/ranks.py puts them together.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from refmoe.files import InputError
from refmoe.oracle.readers.base import Dump, Reader, narrowest_type, register
from refmoe.oracle.readers.npz_file import read as read_npz
from refmoe.oracle.readers.safetensors_file import read as read_safetensors
from refmoe.oracle.readers.torch_file import read as read_torch

RANK = re.compile(r"(?<![a-z])(?:rank|tp|ep)(?:[-_= ]?rank)?[-_= ]?(\d+)", re.IGNORECASE)
READ = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pt": read_torch,
    ".pth": read_torch,
}


def recognise(path: Path) -> bool:
    """Tell whether this is a folder with a file for each of several ranks."""
    return path.is_dir() and len({r for r, _ in _files(path)}) > 1


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield rank and path of each dump in a folder, or one folder further in."""
    for file in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        found = RANK.search(file.relative_to(folder).as_posix())
        if file.suffix in READ and found and "___name=" not in file.name and file.is_file():
            yield int(found[1]), file


def read(path: Path) -> Dump:
    """Read the dumps of all ranks, in the order of their numbers.

    Raises `InputError` where a rank has several files, or they name different tokens.
    """
    files = list(_files(path))
    ranks = sorted({rank for rank, _ in files})
    if len(files) > len(ranks) or ranks != list(range(len(ranks))):
        raise InputError(
            f"{path}: files of ranks {', '.join(str(rank) for rank, _ in files)}; expected one "
            "file for each, numbered from 0"
        )
    dumps = [READ[file.suffix](file) for _, file in sorted(files)]
    first = next((d for d in dumps if d.tokens is not None or d.prompts), dumps[0])
    for d, (_, file) in zip(dumps, sorted(files), strict=True):
        if d.tokens not in (None, first.tokens) or d.prompts not in ((), first.prompts):
            raise InputError(f"{file}: its tokens are others than those of {first.path.name}")
    return replace(
        first,
        path=path,
        arrays={},
        rounded=narrowest_type(x for d in dumps for x in d.arrays.values()),
        notes=tuple(dict.fromkeys(n for d in dumps for n in d.notes)),
        unread={n: why for d in dumps for n, why in d.unread.items()},
        ranks=tuple(d.arrays for d in dumps),
    )


register(Reader("ranks", "or a folder with a file for each rank", recognise, read))
