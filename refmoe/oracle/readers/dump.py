"""Read another engine's dump: find the reader that knows the file, and let it read."""

import importlib
import pkgutil
from pathlib import Path

import refmoe.oracle.readers
from refmoe.files import InputError
from refmoe.oracle.readers.base import READERS, Dump, Reader


def read_dump(path: str | Path) -> Dump:
    """Read a dump; raise `InputError` that says what is wrong with the file.

    Supported are .safetensors, .npz, .pt and .pth files by module path, prints of llama.cpp's
    llama-eval-callback (.txt, .log), top-k log-probabilities (.json), and folders of SGLang's
    dumper. README's section on dumps says how each is made.
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: no such file")
    for reader in find_readers():
        if reader.recognise(path):
            return reader.read(path)
    known = sorted(reader.files for reader in find_readers())
    known.sort(key=lambda files: not files.startswith("."))  # folders last
    raise InputError(f"{path}: {path.suffix or 'no'} suffix; supported: {', '.join(known)}")


def find_readers() -> list[Reader]:
    """Return all readers of this folder, in the order of their names."""
    for module in pkgutil.iter_modules(refmoe.oracle.readers.__path__):
        importlib.import_module(f"{refmoe.oracle.readers.__name__}.{module.name}")
    return [READERS[name] for name in sorted(READERS)]
