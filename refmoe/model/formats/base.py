"""What a stored matrix is, and what a format file says about its format."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, Self

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


class Scheme(Protocol):
    """How a `quantization_config` announces a safetensors format, with the settings it states.

    Made without arguments it has the settings that are usual: a dump of weights may lack a config.
    """

    announced_as: ClassVar[str]  # `quant_method` and more, for the list of what is supported

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self | None:
        """Read a `quantization_config`; None if it announces other formats.

        Raises `InputError`, with the field's name, if it announces this one with settings that
        cannot be read; it reaches the user unless another format reads the config.
        """
        ...

    def covers(self, module: str) -> bool:
        """Tell whether this linear module, by its canonical name, is stored in the format."""
        ...


class StoredFormat(NamedTuple):
    """One format: every file of this folder that has one ends with `FORMAT = StoredFormat(…)`.

    A safetensors format has a `scheme`, the class of its announcement. Its matrix class then has
    `tensors(O, I, scheme)`, which returns the tensors of a module by suffix, each with shape and
    dtypes, and `open(array, scheme)`, which makes the matrix of them. `parts` has the same suffixes
    with the bits that a number of the matrix takes there, 0 for scales and the like; by the part
    `mark` one sees that a module is stored so.
    """

    name: str  # `StoredMatrix.format`: what kernels and `Conventions.rounded_products` call it
    matrix: Any  # the class
    gguf: GgufType | None = None
    scheme: type[Scheme] | None = None
    mark: str = ""
    parts: Mapping[str, int] = MappingProxyType({})
    eight_bits: bool = True  # `--dense q8` replaces a matrix of this format

    def from_bytes(self, raw: np.ndarray, shape: tuple[int, ...]) -> Any:
        """Make a matrix [O, I] of GGUF's bytes, uint8."""
        assert self.gguf is not None
        return self.matrix(raw.reshape(shape[0], -1, self.gguf.nbytes))
