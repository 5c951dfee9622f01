"""What a stored matrix is, and what a format file says about its format."""

from typing import Any, NamedTuple, Protocol

import numpy as np

TensorSpec = tuple[tuple[int, ...], tuple[str, ...]]  # shape, and the dtypes it may have


class StoredMatrix(Protocol):
    """A matrix [O, I], or a vector [I], as its bytes are stored."""

    @property
    def format(self) -> str:
        """The name that kernels and `Conventions.rounded_products` know it by."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def unit(self) -> int:
        """How many rows belong together; 0 if stored rows are no rows of the matrix."""
        ...

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Return the values that the bytes stand for, [O, I]; see the function `dequantize`."""
        ...

    def rows(self, index: Any) -> Any:
        """Return some of its rows as a matrix, still stored if that is possible."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the stored arrays by name: the weights, then their scales if they are apart."""
        ...


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
