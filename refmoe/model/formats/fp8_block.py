"""Fp8Block: DeepSeek's FP8, e4m3 with a scale for a block of rows and columns. K2-Instruct.

    W[o, i] = e4m3[o, i] · scale[o // rows, i // columns]   bits  [O, I] uint8
                                                            scale [⌈O/rows⌉, ⌈I/columns⌉] float32

e4m3 "fn": no infinity, NaN at ±0x7f (deepseek-ai/DeepSeek-V3, inference/kernel.py). The scale is
called `weight_scale_inv`, and multiplies; last blocks may be partial. The product has up to 28
significant bits: exact in float64, rounded once in float32. Blocks are 128 by 128 in every
published checkpoint. Safetensors: `weight`, `weight_scale_inv` of every linear module but those in
`modules_to_not_convert` and lm_head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.config import check_count, get_names
from refmoe.files import InputError
from refmoe.model.formats.base import StoredFormat, TensorSpec
from refmoe.model.matrix import array_module, round_bf16


def _e4m3() -> np.ndarray:
    """Return the 256 values of e4m3fn: sign, 4 bits of exponent (bias 7), 3 of fraction."""
    code = np.arange(128)
    exponent, fraction = code >> 3, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    positive = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    positive[127] = np.nan
    return np.concatenate((positive, -positive)).astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True)
class Fp8Scheme:
    """The FP8 of DeepSeek: codes in e4m3 and one float32 scale a block.

    Every linear module is stored in it but those in `ignore`: `lm_head`, and the
    `modules_to_not_convert` of the config.
    """

    block: tuple[int, int] = (128, 128)  # rows, columns; last blocks may be partial
    ignore: tuple[str, ...] = ("lm_head",)
    announced_as: ClassVar[str] = "fp8"

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Fp8Scheme | None":
        """Read the settings of FP8; None for another `quant_method`.

        Raises `InputError`, with the field's name, unless it is e4m3 in blocks.
        """
        if raw.get("quant_method") != "fp8":
            return None
        if raw.get("fmt", "e4m3") != "e4m3":
            raise InputError(f"quantization_config.fmt = {raw['fmt']!r}; supported: 'e4m3'")
        block = raw.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2:
            raise InputError(
                f"quantization_config.weight_block_size = {block!r}; supported: [rows, columns]"
            )
        rows, columns = (check_count("quantization_config.weight_block_size", n) for n in block)
        return cls((rows, columns), ("lm_head", *get_names(raw, "modules_to_not_convert")))

    def covers(self, module: str) -> bool:
        """Tell whether this linear module is converted."""
        return module not in self.ignore


class Fp8Block(NamedTuple):
    """A matrix of e4m3 codes."""

    bits: np.ndarray  # [O, I] uint8: e4m3fn
    scale: np.ndarray  # [⌈O/rows⌉, ⌈I/columns⌉] float32, `weight_scale_inv`
    block: tuple[int, int]  # rows, columns

    @property
    def format(self) -> str:
        return "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.scale.nbytes

    @property
    def unit(self) -> int:
        return self.block[0]

    @classmethod
    def quantize(cls, w: np.ndarray, block: tuple[int, int] = (128, 128)) -> "Fp8Block":
        """Round [O, I] to the nearest codes: scale = max|w| / 448 of each block."""
        (O, I), (rows, columns) = w.shape, block
        shape = -(-O // rows), -(-I // columns)
        padded = np.zeros((shape[0] * rows, shape[1] * columns))
        padded[:O, :I] = np.abs(w)
        largest = padded.reshape(shape[0], rows, shape[1], columns).max(axis=(1, 3))
        m = cls(np.zeros((O, I), np.uint8), (largest / 448).astype(np.float32), block)
        x = w / np.maximum(m.scales().astype(np.float64), 1e-30)
        positive = E4M3[:127].astype(np.float64)  # 0 to 448, increasing
        code = np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(x)).astype(np.uint8)
        return m._replace(bits=np.where(x < 0, code | 0x80, code).astype(np.uint8))

    def scales(self) -> np.ndarray:
        """Return the scale of each element, [O, I] float32."""
        (O, I), (rows, columns) = self.bits.shape, self.block
        xp = array_module(self.bits)
        return xp.repeat(xp.repeat(self.scale, rows, axis=0)[:O], columns, axis=1)[:, :I]

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Multiply codes by scales in `dtype`; rounded to bf16 where "fp8" is `rounded`."""
        xp, s = array_module(self.bits), self.scales()
        if self.format in rounded:
            return round_bf16(xp.asarray(E4M3)[self.bits] * s).astype(dtype, copy=False)
        return xp.asarray(E4M3.astype(dtype))[self.bits] * s.astype(dtype)

    def rows(self, index: Any) -> "Fp8Block":
        """Return a slice of rows that begins at a block."""
        size = self.block[0]
        if not isinstance(index, slice) or index.start % size:
            raise ValueError(f"rows {index} of an Fp8Block do not begin at a block")
        blocks = slice(index.start // size, -(-index.stop // size))
        return Fp8Block(self.bits[index], self.scale[blocks], self.block)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"bits": self.bits, "scale": self.scale}

    def steps(self) -> np.ndarray:
        """Return the scale that each code is multiplied by, with its sign, [O, I] float64."""
        return self.scales().astype(np.float64)

    def half_step(self, w: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return how far a number may be from the value w that is stored for it.

        Half a unit of e4m3, and the rounding of the scale to float32.
        """
        exponent = np.maximum((np.arange(256) & 0x7F) >> 3, 1)
        half = np.ldexp(1.0, exponent - 11)  # 3 bits of fraction, bias 7
        return half[self.bits] * np.abs(self.steps()) * (1 + 1e-6)

    @staticmethod
    def tensors(O: int, I: int, scheme: Fp8Scheme) -> dict[str, TensorSpec]:
        """Return the tensors of a module: suffix → shape and dtypes."""
        rows, columns = scheme.block
        return {
            ".weight": ((O, I), ("F8_E4M3",)),
            ".weight_scale_inv": ((-(-O // rows), -(-I // columns)), ("F32",)),
        }

    @classmethod
    def open(cls, array: Callable[[str], np.ndarray], scheme: Fp8Scheme) -> "Fp8Block":
        """Make the matrix of a module's tensors, by suffix."""
        return cls(array(".weight"), array(".weight_scale_inv"), scheme.block)


FORMAT = StoredFormat(
    "fp8",
    Fp8Block,
    scheme=Fp8Scheme,
    mark=".weight_scale_inv",
    parts={".weight": 8, ".weight_scale_inv": 0},
)
