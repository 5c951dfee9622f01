"""Each stored format by what it says of itself: shape, bytes, values, rows, arrays, steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.config import Fp8Scheme, Int4Scheme
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.formats.registry import all_formats, format_for, gguf_formats
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, dequantize, format_of, linear, rows, tiles

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
    int4, fp8 = format_for(Int4Scheme(("Linear",), (), 32)), format_for(Fp8Scheme((128, 128), ()))
    assert int4 is not None
    assert fp8 is not None
    assert (int4.matrix, fp8.matrix) == (Int4, Fp8Block)
    assert format_for(None) is None


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
