"""Open a checkpoint, whatever it is stored as."""

from pathlib import Path

from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import Gguf, is_gguf


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors files, or a GGUF file (or one part of a split GGUF).

    Raises `InputError` for whatever is neither, and for one that is damaged.
    """
    return Gguf.open(path) if is_gguf(Path(path)) else Checkpoint.open(path)
