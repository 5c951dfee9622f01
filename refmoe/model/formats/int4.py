"""Int4: compressed-tensors' pack-quantized INT4, a scale for 32 columns. K2-Thinking's experts.

    W[o, i] = (nibble[o, i] - 8) · scale[o, i // 32]            packed [O, I/8]  int32
                                                                scale  [O, I/32] bf16

Nibble i % 8 of word i // 8, lowest first, offset binary (vllm-project/compressed-tensors,
compressors/pack_quantized). A 4-bit integer times a bf16 scale has at most 11 significant bits, so
it is exact in float32. Safetensors: `weight_packed`, `weight_scale`, `weight_shape` of a module
that `quantization_config` targets and does not ignore.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.config import get_names, get_object
from refmoe.files import InputError
from refmoe.model.formats.base import StoredFormat, TensorSpec
from refmoe.model.formats.names import check_entries, matches, targets_linear
from refmoe.model.matrix import array_module, bf16_bits, round_bf16, widen_bf16

GROUP = 32  # columns to a scale


@dataclass(frozen=True)
class Int4Scheme:
    """The INT4 of compressed-tensors (`pack-quantized`), and which modules are stored in it.

    `targets` and `ignore` are matched against names of modules as `names.matches` does; the target
    `Linear` is all linear modules.
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    group_size: int = GROUP
    announced_as: ClassVar[str] = "compressed-tensors pack-quantized (INT4)"

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Int4Scheme | None":
        """Read the settings of compressed-tensors; None for another `quant_method` or `format`.

        Raises `InputError`, with the field's name, unless every group is INT4 in groups of 32,
        symmetric, with activations as they are.
        """
        if (raw.get("quant_method"), raw.get("format")) != ("compressed-tensors", "pack-quantized"):
            return None
        targets: list[str] = []
        groups = get_object(raw, "config_groups")
        for name in groups:
            where = f"quantization_config.config_groups.{name}"
            group = get_object(groups, name)
            weights = get_object(group, "weights")
            for key, value in _WEIGHTS.items():
                if weights.get(key) != value:
                    raise InputError(
                        f"{where}.weights.{key} = {weights.get(key)!r}; supported: {value!r}"
                    )
            if group.get("input_activations") is not None:
                raise InputError(
                    f"{where}.input_activations: quantised activations are not supported"
                )
            targets += get_names(group, "targets")
        if not targets:
            raise InputError("quantization_config.config_groups names no targets")
        ignore = get_names(raw, "ignore")
        check_entries((*targets, *ignore))
        return cls(tuple(targets), ignore)

    def covers(self, module: str) -> bool:
        """Tell whether this linear module is targeted and not ignored."""
        return any(targets_linear(entry, module) for entry in self.targets) and not any(
            matches(entry, module) for entry in self.ignore
        )


_WEIGHTS = {  # what `weights` of a config group must say
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP,
    "actorder": None,
}


class Int4(NamedTuple):
    """A matrix of 4-bit codes."""

    packed: np.ndarray  # [O, I/8] int32, `weight_packed`
    scale: np.ndarray  # [O, I/32] uint16: the bits of bf16, `weight_scale`

    @property
    def format(self) -> str:
        return "int4"

    @property
    def unit(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape[0], self.packed.shape[1] * 8

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @classmethod
    def quantize(cls, w: np.ndarray, divisor: float = 7.0) -> "Int4":
        """Round [O, I] to codes -8 … 7: scale = max|w| / divisor of each 32, in bf16."""
        groups = w.reshape(len(w), -1, GROUP)
        scale = bf16_bits(np.abs(groups).max(axis=-1) / divisor)
        wide = widen_bf16(scale).astype(np.float64)[..., None]
        q = np.clip(np.rint(groups / np.maximum(wide, 1e-30)), -8, 7).astype(np.int64) + 8
        words = q.reshape(len(w), -1, 8) << np.arange(0, 32, 4)
        return cls(words.sum(axis=-1).astype(np.uint32).view(np.int32), scale)

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Multiply codes by scales, exact in float32; rounded to bf16 where "int4" is `rounded`."""
        O, G = self.scale.shape
        xp = array_module(self.packed)
        two = xp.ascontiguousarray(self.packed).view(np.uint8)  # [O, I/2] two nibbles a byte
        q = xp.stack((two & 15, two >> 4), axis=-1).reshape(O, G, -1).astype(np.float32) - 8
        w = (q * widen_bf16(self.scale)[..., None]).reshape(O, -1)  # [O, I]
        return (round_bf16(w) if self.format in rounded else w).astype(dtype, copy=False)

    def rows(self, index: Any) -> "Int4":
        return Int4(self.packed[index], self.scale[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"packed": self.packed, "scale": self.scale}

    def steps(self) -> np.ndarray:
        """Return the scale that each code is multiplied by, with its sign, [O, I] float64."""
        return np.repeat(widen_bf16(self.scale).astype(np.float64), GROUP, axis=1)

    def half_step(self, w: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return how far a number may be from the value w that is stored for it.

        Half a code, and 8 codes times the rounding of the scale to bf16.
        """
        return np.abs(self.steps()) * (0.5 + 8 * 2.0**-8)

    @staticmethod
    def tensors(O: int, I: int, scheme: Int4Scheme) -> dict[str, TensorSpec]:
        """Return the tensors of a module: suffix → shape and dtypes."""
        if I % scheme.group_size:
            raise InputError(f"{I} columns are no whole groups of {scheme.group_size}")
        return {
            ".weight_packed": ((O, I // 8), ("I32",)),
            ".weight_scale": ((O, I // scheme.group_size), ("BF16",)),
            ".weight_shape": ((2,), ("I32", "I64")),
        }

    @classmethod
    def open(cls, array: Callable[[str], np.ndarray], scheme: Int4Scheme) -> "Int4":
        """Make the matrix of a module's tensors, by suffix; `InputError` if shapes disagree."""
        m = cls(array(".weight_packed"), array(".weight_scale"))
        if (told := array(".weight_shape").tolist()) != list(m.shape):
            raise InputError(f".weight_shape says {told}, .weight_packed holds {list(m.shape)}")
        return m


FORMAT = StoredFormat(
    "int4",
    Int4,
    scheme=Int4Scheme,
    mark=".weight_packed",
    parts={".weight_packed": 4, ".weight_scale": 0, ".weight_shape": 0},
    eight_bits=False,
)
