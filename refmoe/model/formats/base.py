"""What a format file says about its format, for whoever handles all of them."""

from typing import Any, NamedTuple

import numpy as np

TensorSpec = tuple[tuple[int, ...], tuple[str, ...]]  # shape, and the dtypes it may have


class GgufType(NamedTuple):
    """How GGUF files know a format."""

    number: int
    name: str
    elements: int  # of a block
    nbytes: int  # of a block


class StoredFormat(NamedTuple):
    """One format: every file of this folder that has one ends with `FORMAT = StoredFormat(…)`.

    Of a safetensors format `scheme` is the class of `quantization_config` (config.py) that chooses
    it; the class then has `tensors(O, I, scheme)`, the tensors of a module by suffix, each with
    shape and dtypes, and `open(array, scheme)`, the matrix that they are; `mark` is the suffix by
    which such a module is known.
    """

    name: str  # `StoredMatrix.format`: what kernels and `Conventions.rounded_products` call it
    matrix: Any  # the class
    gguf: GgufType | None = None
    scheme: type | None = None
    mark: str = ""
    eight_bits: bool = True  # `--dense q8` replaces a matrix of this format

    def from_bytes(self, raw: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Make a matrix [O, I] of GGUF's bytes, uint8."""
        assert self.gguf is not None
        return self.matrix(raw.reshape(shape[0], -1, self.gguf.nbytes))
