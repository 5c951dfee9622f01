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
from refmoe.run.export import q4_of

ROWS, COLUMNS = 256, 256


def draw(name: str, seed: int) -> tuple[np.ndarray, Matrix]:
    """A random matrix, and what a format makes of it."""
    w = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if name == "q4":
        return w, q4_of(Int4.quantize(w, 8.0))
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
    near = np.abs(wide - w) <= m.half_step()
    if name in ("int4", "q4"):  # codes end at 7: the largest of a group may be cut by a step
        near |= np.abs(wide - w) <= 1.01 * np.abs(m.steps())
    assert near.all()
    part = slice(128, 256)
    np.testing.assert_array_equal(dequantize(rows(m, part), np.float64), wide[part])
    whole = np.concatenate([dequantize(tile, np.float64) for _, tile in tiles(m, 1 << 10)])
    np.testing.assert_array_equal(whole, wide)
    again = m._replace(**{part: np.array(a) for part, a in m.arrays().items()})
    np.testing.assert_array_equal(dequantize(again, np.float64), wide)


@pytest.mark.parametrize("name", NAMES)
def test_neighbouring_codes_are_a_step_apart(name):
    _, m = draw(name, 0)
    if name == "bf16":
        other = m._replace(bits=m.bits + np.uint16(1))
        step = 2 * m.half_step()
    else:
        step = np.abs(m.steps())
        first = next(iter(m.arrays()))
        codes = np.array(m.arrays()[first])
        if name == "int4":
            other, place = m._replace(packed=codes ^ 1), (slice(None), slice(0, None, 8))
        elif name == "fp8":
            other, place = m._replace(bits=codes ^ 1), (slice(None), slice(None))
        else:
            at = 2
            codes[..., at] ^= 1
            other, place = m._replace(blocks=codes), (slice(None), slice(0, None, 32))
        a, b = dequantize(m, np.float64)[place], dequantize(other, np.float64)[place]
        finite = np.isfinite(a) & np.isfinite(b)
        np.testing.assert_allclose(np.abs(a - b)[finite], step[place][finite], rtol=1e-6)
        return
    a, b = dequantize(m, np.float64), dequantize(other, np.float64)
    np.testing.assert_allclose(np.abs(a - b), step, rtol=1e-6)


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
