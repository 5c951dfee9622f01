"""Each stored format by what it says of itself: shape, bytes, values, rows, arrays, steps."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from refmoe.config import Quantization
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.formats.registry import all_formats, announced_formats, gguf_formats
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, dequantize, format_of, linear, rows, tiles
from refmoe.weights.synthetic.random import FP8_CONFIG, INT4_CONFIG, write_random
from tests.test_contributing import copy_package, run

ROWS, COLUMNS = 256, 256


def quantize_q4(w: np.ndarray) -> Q4:
    """Quantise as ggml does: scale = max / -8, codes to the nearest, cut at 7."""
    groups = w.reshape(len(w), -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    d = largest / np.float32(-8)
    codes = np.minimum(15, (groups / d + np.float32(8.5)).astype(np.uint8))
    halves = codes[..., :16] | codes[..., 16:] << 4
    return Q4(np.concatenate((d.astype(np.float16).view(np.uint8), halves), axis=-1))


def draw(name: str, seed: int) -> tuple[np.ndarray, Matrix]:
    """A random matrix, and what a format makes of it."""
    w = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if name == "q4":
        return w, quantize_q4(w)
    return w, {"bf16": BF16, "int4": Int4, "fp8": Fp8Block, "q8": Q8}[name].quantize(w)


NAMES = ["bf16", "fp8", "int4", "q4", "q8"]


def test_every_format_of_the_folder_is_found():
    assert sorted(f.name for f in all_formats()) == NAMES
    assert {name: f.matrix for name, f in gguf_formats().items()} == {"Q8_0": Q8, "Q4_0": Q4}
    for raw, matrix in ((INT4_CONFIG, Int4), (FP8_CONFIG, Fp8Block)):
        (announced,) = announced_formats(Quantization.from_dict(raw))
        assert announced.format.matrix is matrix
    assert announced_formats(None) == ()


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_format_keeps_its_word(name, seed):
    w, m = draw(name, seed)
    assert format_of(m) == name
    assert m.shape == w.shape
    assert m.nbytes == sum(a.nbytes for a in m.arrays().values()) < w.nbytes
    wide = dequantize(m, np.float64)
    if name == "bf16":
        near = np.abs(wide - w) <= np.abs(wide) * 2.0**-8
    else:
        near = np.abs(wide - w) <= m.half_step(wide, w)
    if name == "int4":  # a scale that was rounded downwards: the largest code is cut
        near |= np.abs(wide) >= 7 * np.abs(m.steps())
    assert near.all()
    part = slice(128, 256)
    np.testing.assert_array_equal(dequantize(rows(m, part), np.float64), wide[part])
    whole = np.concatenate([dequantize(tile, np.float64) for _, tile in tiles(m, 1 << 10)])
    np.testing.assert_array_equal(whole, wide)
    again = m._replace(**{part: np.array(a) for part, a in m.arrays().items()})
    np.testing.assert_array_equal(dequantize(again, np.float64), wide)


@pytest.mark.parametrize("name", ["int4", "q4", "q8"])
def test_neighbouring_codes_are_a_step_apart(name):
    _, m = draw(name, 0)
    if name == "int4":
        other, first = m._replace(packed=m.packed ^ 1), np.arange(0, COLUMNS, 8)
    else:
        blocks = m.blocks.copy()
        blocks[..., 2] ^= 1
        other, first = m._replace(blocks=blocks), np.arange(0, COLUMNS, 32)
    a, b = (dequantize(each, np.float64)[:, first] for each in (m, other))
    np.testing.assert_array_equal(np.abs(a - b), np.abs(m.steps())[:, first])


def test_matrices_put_together_are_their_parts():
    w, m = draw("q8", 1)
    H, C, N, V = 2, 128, COLUMNS, 128
    values = BF16.quantize(w[:, :C])
    both = Heads(m, values, H)  # k_b [H·C, N], v_b [H·V, C]
    wide = dequantize(both)
    assert wide.shape == both.shape == (H * (N + V), C)
    keys, rest = dequantize(m).reshape(H, C, N), dequantize(values).reshape(H, V, C)
    for h, head in enumerate(wide.reshape(H, N + V, C)):
        np.testing.assert_array_equal(head[:N], keys[h].T)
        np.testing.assert_array_equal(head[N:], rest[h])
    cut = Tiled(w.shape, m.nbytes, lambda: iter(tiles(m, 1 << 12)))
    np.testing.assert_array_equal(dequantize(cut), dequantize(m))
    x = np.random.default_rng(2).standard_normal((3, COLUMNS)).astype(np.float32)
    np.testing.assert_array_equal(linear(x, cut), x @ dequantize(m).T)


# --- a safetensors format is one file

INT8_ROWS = '''
"""Int8Rows: 8-bit codes and a float32 scale for each row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refmoe.config import get_names
from refmoe.files import InputError
from refmoe.model.formats.base import StoredFormat, TensorSpec
from refmoe.model.formats.names import check_entries, matches


@dataclass(frozen=True)
class Int8Scheme:
    """Every linear module is stored so but those in `ignore`."""

    ignore: tuple[str, ...] = ()
    announced_as: ClassVar[str] = "mine"

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Int8Scheme | None":
        if raw.get("quant_method") != "mine":
            return None
        if raw.get("bits") != 8:
            raise InputError(f"quantization_config.bits = {raw.get('bits')!r}; supported: 8")
        ignore = get_names(raw, "ignore")
        check_entries(ignore)
        return cls(ignore)

    def covers(self, module: str) -> bool:
        return not any(matches(entry, module) for entry in self.ignore)


class Int8Rows(NamedTuple):
    codes: np.ndarray  # [O, I] int8
    scale: np.ndarray  # [O, 1] float32

    format = "int8_rows"
    unit = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        return (self.codes.astype(np.float32) * self.scale).astype(dtype, copy=False)

    def rows(self, index: Any) -> "Int8Rows":
        return Int8Rows(self.codes[index], self.scale[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "scale": self.scale}

    @staticmethod
    def tensors(O: int, I: int, scheme: Int8Scheme) -> dict[str, TensorSpec]:
        return {".weight": ((O, I), ("I8",)), ".weight_scale": ((O, 1), ("F32",))}

    @classmethod
    def open(cls, array: Callable[[str], np.ndarray], scheme: Int8Scheme) -> "Int8Rows":
        return cls(array(".weight"), array(".weight_scale"))


FORMAT = StoredFormat(
    "int8_rows",
    Int8Rows,
    scheme=Int8Scheme,
    mark=".weight_scale",
    parts={".weight": 8, ".weight_scale": 0},
)
'''
IGNORED = ["lm_head", "re:.*self_attn", "language_model.model.layers.0.mlp.up_proj"]
USE_BOTH = """
import refmoe
from refmoe.files import InputError

mine, same = refmoe.load("mine"), refmoe.load("same")
kinds = {w.format for w in mine.decoder.experts[1](0)}
assert kinds == {"int8_rows"}, kinds
assert not hasattr(mine.decoder.layers[0].mlp.up_proj, "format")
for options in {"reference": True}, {"numerics": "float64"}, {"ram": 1 << 30}, {"dense": "q8"}:
    a, b = (refmoe.load(name, **options).logits([1, 2, 3]) for name in ("mine", "same"))
    assert a.shape == b.shape and abs(a - b).max() <= 1e-5 * abs(b).max(), options
    if "reference" in options or "numerics" in options:
        assert (a == b).all(), options
try:
    refmoe.load("wrong")
except InputError as e:
    assert "config.json: quantization_config.bits = 4; supported: 8" in str(e), e
else:
    raise AssertionError("bits = 4 was read")
"""


def write_int8_rows(same: Path, mine: Path) -> None:
    """Write what `same` has into a folder with codes and scales, and their values into `same`."""
    raw = json.loads((same / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mine", "bits": 8, "ignore": IGNORED}
    ignored = re.compile(r"lm_head|.*self_attn|model\.layers\.0\.mlp\.up_proj")
    stored, values = {}, {}
    for name, w in safetensors.numpy.load_file(same / "model.safetensors").items():
        values[name] = stored[name] = w
        if name.endswith("_proj.weight") and not ignored.match(name):
            scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(np.float32)
            codes = np.rint(w / scale).astype(np.int8)
            stored[name], stored[f"{name}_scale"] = codes, scale
            values[name] = codes.astype(np.float32) * scale
    shutil.copytree(same, mine)
    (mine / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(stored, mine / "model.safetensors")
    safetensors.numpy.save_file(values, same / "model.safetensors")


def test_a_safetensors_format_is_one_file(tmp_path):
    """It says how a config announces it; what opens, runs, counts and examines it asks the file."""
    copy_package(tmp_path)
    (tmp_path / "refmoe" / "model" / "formats" / "int8_rows.py").write_text(INT8_ROWS)
    write_random(tmp_path / "same", "f32", seed=3)
    write_int8_rows(tmp_path / "same", tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "wrong")
    raw = json.loads((tmp_path / "wrong" / "config.json").read_text())
    raw["quantization_config"]["bits"] = 4
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "use.py").write_text(USE_BOTH)
    run("python use.py", tmp_path)
    mine, same = (
        json.loads(run(f"refmoe inspect --model {name} --json", tmp_path))
        for name in ("mine", "same")
    )
    assert mine["parameters"] == same["parameters"]
    assert sum(mine["bytes"].values()) < sum(same["bytes"].values())
    assert "no errors" in run("refmoe lint mine", tmp_path)
    assert "no errors" in run("refmoe lint mine --against same", tmp_path)
    assert "config.json: quantization_config.bits" in run("refmoe lint wrong || true", tmp_path)
    run("refmoe plan --config mine/config.json", tmp_path)
