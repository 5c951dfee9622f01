"""An .npz file of NumPy: arrays by module path, no pickles."""

from pathlib import Path

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import Dump, Reader, register


def recognise(path: Path) -> bool:
    """Tell whether this is an .npz file."""
    return path.is_file() and path.suffix == ".npz"


def read(path: Path) -> Dump:
    """Read every array; raise `InputError` for objects and for anything that is no array."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            if others := [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]:
                raise ValueError(f"{others[0]} is no array")
    except Exception as e:  # a header of an array is a text that numpy parses
        raise InputError(f"{path}: not an .npz of plain arrays ({e})") from None
    return dump_of_arrays(path, arrays)


register(Reader("npz", ".npz", recognise, read))
