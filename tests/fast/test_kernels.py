"""Every kernel is its twin, in every form of it, on every size, and for any number of threads.

The bound: a sum of n products in float32, whatever the order, is within γ(n)·|W||x| of the exact
one (Higham, Accuracy and Stability, §3.1), n two more than the columns for scale and last sum.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmoe
from refmoe.config import Config
from refmoe.fast import kernels, threads
from refmoe.fast.attention import absorbed, expanded
from refmoe.fast.engine import engine
from refmoe.fast.linear import FEW, Inputs, experts, kernel_view, linear, multiply
from refmoe.model import matrix, mla
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import policy
from refmoe.model.experts import ExpertsFrom, MlpWeights, routed_experts
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, dequantize, round_bf16
from refmoe.model.numerics import NonFinite
from refmoe.model.rope import softmax_scale
from refmoe.model.router import Routing
from refmoe.run.load import golden_folder

FORMATS = ("bf16", "int4", "fp8", "q8", "q4", "f16", "f32")


def draw(kind: str, O: int, I: int, rng: np.random.Generator) -> Matrix:
    """A matrix with every code there is, and scales of both signs where they can have one."""
    w = rng.standard_normal((O, I)).astype(np.float32)
    match kind:
        case "bf16":
            return BF16((w.view(np.uint32) >> 16).astype(np.uint16))
        case "int4":
            packed = rng.integers(-(2**31), 2**31, (O, I // 8), dtype=np.int32)
            scale = rng.standard_normal((O, I // 32)).astype(np.float32).view(np.uint32) >> 16
            return Int4(packed, scale.astype(np.uint16))
        case "fp8":
            finite = np.flatnonzero(np.isfinite(E4M3)).astype(np.uint8)
            scale = rng.standard_normal((-(-O // 128), -(-I // 128))).astype(np.float32)
            return Fp8Block(rng.choice(finite, (O, I)), scale, (128, 128))
        case "q8":
            return Q8.quantize(w)
        case "q4":
            blocks = rng.integers(0, 256, (O, I // 32, 18), dtype=np.uint8)
            scale = rng.standard_normal((O, I // 32, 1)).astype(np.float16)
            blocks[..., :2] = scale.view(np.uint8)
            return Q4(blocks)
        case "f16":
            return w.astype(np.float16)
        case _:
            return w


def gamma(n: int) -> float:
    u = 2.0**-24
    return n * u / (1 - n * u)


def bound(x: np.ndarray, m: Matrix) -> np.ndarray:
    w = np.abs(dequantize(m, np.float64))
    return gamma(x.shape[1] + 2) * (np.abs(x).astype(np.float64) @ w.T)


def exact(x: np.ndarray, m: Matrix) -> np.ndarray:
    return matrix.linear(x.astype(np.float64), m)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_kernel_is_its_twin(kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    O = data.draw(st.integers(1, 300))
    I = 32 * data.draw(st.integers(1, 24))
    T = data.draw(st.integers(1, FEW + 6))
    m = draw(kind, O, I, rng)
    x = rng.standard_normal((T, I)).astype(np.float32)
    y = linear(x, m)
    assert (np.abs(y - exact(x, m)) <= bound(x, m)).all()


@pytest.mark.parametrize("kind", ["int4", "q4"])
@pytest.mark.parametrize("T", [1, 2, 3, FEW])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), O=st.integers(1, 70), steps=st.integers(1, 20))
def test_sixteen_bits_of_x_cost_no_more_than_they_must(kind, T, seed, O, steps):
    """Each x is off by half a unit, max/32767 of its group of 32."""
    rng = np.random.default_rng(seed)
    m = draw(kind, O, 128 * steps, rng)
    x = rng.standard_normal((T, 128 * steps)).astype(np.float32)
    y = linear(x, m, fast=True)
    most = np.abs(x).reshape(T, -1, 32).max(axis=-1, keepdims=True).astype(np.float64)
    half = np.broadcast_to(most / 32767 / 2 * (1 + 2.0**-20), (T, 4 * steps, 32)).reshape(x.shape)
    rounding = half @ np.abs(dequantize(m, np.float64)).T
    assert (np.abs(y - exact(x, m)) <= rounding + 2 * bound(x, m)).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    O=st.integers(1, 12),
    G=st.integers(1, 40),
    T=st.integers(FEW + 1, 40),
)
def test_many_tokens_of_sixteen_bits_are_within_their_half_units(seed, O, G, T):
    """8-bit weights in lanes of sixteen rows; each x is off by half a unit of its 32."""
    rng = np.random.default_rng(seed)
    m, x = draw("q8", 16 * O, 32 * G, rng), rng.standard_normal((T, 32 * G)).astype(np.float32)
    y = linear(x, m, fast=True)
    most = np.abs(x).reshape(T, G, 32).max(axis=-1, keepdims=True).astype(np.float64)
    half = np.broadcast_to(most / 32767 / 2 * (1 + 2.0**-20), (T, G, 32)).reshape(x.shape)
    rounding = half @ np.abs(dequantize(m, np.float64)).T
    assert (np.abs(y - exact(x, m)) <= rounding + 2 * bound(x, m)).all()


def test_lanes_of_rows_depend_on_neither_threads_nor_neighbours(monkeypatch):
    rng = np.random.default_rng(9)
    m, x = draw("q8", 1600, 320, rng), rng.standard_normal((29, 320)).astype(np.float32)
    x[3, 5], x[4, 6] = np.nan, np.inf
    monkeypatch.setattr("refmoe.fast.linear.PIECE", 1 << 14)
    y = linear(x, m, fast=True)
    assert not np.isfinite(y[3:5]).any()
    assert np.isfinite(np.delete(y, [3, 4], axis=0)).all()
    before = threads.pool().threads
    try:
        for count in (1, 3):
            threads.use(count)
            np.testing.assert_array_equal(linear(x, m, fast=True), y)
    finally:
        threads.use(before)
    np.testing.assert_array_equal(linear(x[10:], m, fast=True), y[10:])
    np.testing.assert_array_equal(linear(x, matrix.rows(m, slice(32, 48)), fast=True), y[:, 32:48])


@pytest.mark.parametrize("kind", FORMATS)
def test_sizes_of_the_real_model_are_exact_to_5e_7(kind):
    rng = np.random.default_rng(3)
    m, x = draw(kind, 64, 7168, rng), rng.standard_normal((2, 7168)).astype(np.float32)
    y, truth = linear(x, m), exact(x, m)
    assert np.sqrt(((y - truth) ** 2).mean() / (truth**2).mean()) <= 5e-7
    if kind in ("int4", "q4"):
        y = linear(x, m, fast=True)
        assert np.sqrt(((y - truth) ** 2).mean() / (truth**2).mean()) <= 5e-5


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
def test_neither_rows_nor_tokens_nor_threads_at_a_time_change_a_bit(kind, fast, monkeypatch):
    rng = np.random.default_rng(1)
    m = draw(kind, 1000, 2048, rng)
    x = rng.standard_normal((7, 2048)).astype(np.float32)
    monkeypatch.setattr("refmoe.fast.linear.PIECE", 1 << 14)
    before = linear(x, m, fast=fast)
    threads_before = threads.pool().threads
    try:
        for count in (1, 2, 5):
            threads.use(count)
            np.testing.assert_array_equal(linear(x, m, fast=fast), before)
    finally:
        threads.use(threads_before)
    for t in range(len(x)):
        np.testing.assert_array_equal(linear(x[t : t + 1], m, fast=fast)[0], before[t])
    for o in (0, 1, 5, 999):
        one = matrix.rows(m, slice(o, o + 1)) if kind != "fp8" or o == 0 else None
        if one is not None:
            np.testing.assert_array_equal(linear(x, one, fast=fast)[:, 0], before[:, o])


@pytest.mark.parametrize("kind", FORMATS)
def test_many_tokens_are_few_tokens(kind):
    """Decoded tiles and BLAS give what kernels give, within both their sums."""
    rng = np.random.default_rng(2)
    m, x = draw(kind, 300, 1024, rng), rng.standard_normal((40, 1024)).astype(np.float32)
    known = kernel_view(m)
    assert known is not None
    few = np.concatenate([multiply([(Inputs(row[None]), known)])[0] for row in x])
    assert (np.abs(linear(x, m) - few) <= 2 * bound(x, m)).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_mapped_file_holds_is_read_in_place(kind, tmp_path):
    """Read-only memory, at an odd address, rows apart."""
    rng = np.random.default_rng(4)
    m, x = draw(kind, 40, 256, rng), rng.standard_normal((3, 256)).astype(np.float32)

    def mapped(a: object) -> object:
        if not isinstance(a, np.ndarray):
            return a
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        wide = np.zeros((len(a), *a.shape[1:-1], a.shape[-1] + 2), a.dtype)
        wide[..., : a.shape[-1]] = a
        file.write_bytes(b"x" + (a if kind in ("q8", "q4") else wide).tobytes())
        flat = np.memmap(file, np.uint8, "r", 1)
        full = flat.view(a.dtype).reshape(a.shape if kind in ("q8", "q4") else wide.shape)
        return full[..., : a.shape[-1]]

    there = mapped(m) if isinstance(m, np.ndarray) else type(m)(*map(mapped, m))
    assert kernel_view(there) is not None
    np.testing.assert_array_equal(linear(x, there), linear(x, m))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_travels(kind, fast, bad):
    rng = np.random.default_rng(5)
    m, x = draw(kind, 40, 256, rng), rng.standard_normal((3, 256)).astype(np.float32)
    x[1, 77] = bad
    y = linear(x, m, fast=fast)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("T", [1, 3, FEW + 1])
def test_not_a_number_in_a_weight_travels(T):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((T, 256)).astype(np.float32)
    for kind in ("bf16", "fp8", "f16", "f32"):
        m = draw(kind, 40, 256, rng)
        nan = {"bf16": 0x7FC0, "fp8": 0xFF, "f16": np.nan, "f32": np.nan}[kind]
        (m if isinstance(m, np.ndarray) else m.bits)[3, 200] = nan
        y = linear(x, m)
        assert np.isnan(y[:, 3]).all()
        assert np.isfinite(np.delete(y, 3, axis=1)).all()


PLAIN = """
import numpy as np, sys
from refmoe.fast import kernels
from refmoe.fast.linear import linear
sys.path.insert(0, sys.argv[1])
from tests.fast.test_kernels import FORMATS, draw
assert not kernels.AVX512 and not kernels.VNNI
out = {}
for kind in FORMATS:
    for fast in (False, True):
        rng = np.random.default_rng(7)
        m, x = draw(kind, 64, 512, rng), rng.standard_normal((20, 512)).astype(np.float32)
        for T in (1, 2, 5, 20):
            out[f"{kind} {fast} {T}"] = linear(x[:T], m, fast=fast)
np.savez(sys.argv[2], **out)
"""


@pytest.mark.parametrize("processor", ["", "haswell"])
def test_machines_without_avx512_get_the_same_bits(processor, tmp_path):
    """The plain form, here and as compiled for a processor with AVX2 alone."""
    env = {**os.environ, "REFMOE_SIMD": "plain"}
    if processor:
        env |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    here = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", PLAIN, here, str(tmp_path / "out.npz")]
    subprocess.run(command, env=env, check=True)
    theirs = np.load(tmp_path / "out.npz")
    for kind in FORMATS:
        for fast in (False, True):
            rng = np.random.default_rng(7)
            m, x = draw(kind, 64, 512, rng), rng.standard_normal((20, 512)).astype(np.float32)
            for T in (1, 2, 5):
                name = f"{kind} {fast} {T}"
                np.testing.assert_array_equal(theirs[name], linear(x[:T], m, fast=fast), name)
            off = np.abs(theirs[f"{kind} {fast} 20"] - linear(x, m, fast=fast))
            assert (off <= 2 * bound(x, m)).all()  # BLAS sums in an order of its own


def test_a_second_process_compiles_nothing():
    script = (
        "import numpy as np\nfrom refmoe.fast import kernels\n"
        "from refmoe.fast.linear import linear\nfrom refmoe.model.formats.bf16 import BF16\n"
        "linear(np.ones((1, 64), np.float32), BF16(np.ones((8, 64), np.uint16)))\n"
        "print(sum(kernels.bf16.stats.cache_hits.values()))\n"
    )
    done = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert done[1].stdout.strip() == "1"


def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch):
    def nowhere(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return args[0]

    monkeypatch.setattr("refmoe.fast.kernels.numba.njit", nowhere)
    assert kernels.kernel(len) is len


def mixture(kind: str, E: int, D: int, F: int, rng: np.random.Generator) -> list[MlpWeights]:
    shapes = ((F, D), (F, D), (D, F))
    return [MlpWeights(*(draw(kind, O, I, rng) for O, I in shapes)) for _ in range(E)]


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(1, 40), K=st.integers(1, 4))
def test_the_fused_experts_are_their_twin(kind, seed, T, K):
    """In the definition's own words, with float64 matrices: what remains is float32's rounding."""
    rng = np.random.default_rng(seed)
    D, F, E = 128, 256, 6
    w = mixture(kind, E, D, F, rng)
    x = rng.standard_normal((T, D)).astype(np.float32)
    weights = rng.uniform(0.1, 1, (T, K)).astype(np.float32)
    routing = Routing(rng.integers(0, E, (T, K)), weights, *[np.full(T, np.inf)] * 2)
    nx = replace(policy("float32"), stop_at_nonfinite=False)
    y = experts(x, routing, ExpertsFrom(w.__getitem__), nx)
    wide = replace(policy("float64"), stop_at_nonfinite=False)
    truth = routed_experts(x.astype(np.float64), routing, ExpertsFrom(w.__getitem__), wide)
    # each of three products in turn is within γ of its terms' sizes, and silu's slope is below 1.1
    plain = [MlpWeights(*(np.abs(dequantize(m, np.float64)) for m in each)) for each in w]
    size = np.zeros_like(truth)
    for t in range(T):
        for e, g in zip(routing.experts[t], weights[t], strict=True):
            gate, up = (np.abs(x[t].astype(np.float64)) @ m.T for m in plain[e][:2])
            size[t] += g * ((gate * up) @ plain[e].down_proj.T)
    assert (np.abs(y - truth) <= 3 * gamma(2 * D + F + 16) * size).all()


def test_a_watched_expert_is_computed_by_the_definition():
    model = refmoe.load()
    tokens = [5, 17, 2, 44]
    seen = refmoe.trace(model, tokens, ["model.layers.1.mlp.experts.*.act"])
    assert seen
    assert all(x.dtype == np.float32 for x in seen.values())


def test_what_is_not_finite_is_named_inside_the_expert():
    rng = np.random.default_rng(8)
    w = mixture("f32", 2, 32, 32, rng)
    w[1].up_proj[3, 4] = np.nan
    routing = Routing(np.array([[0, 1]]), np.ones((1, 2), np.float32), *[np.array([np.inf])] * 2)
    x = rng.standard_normal((1, 32)).astype(np.float32)
    with pytest.raises(NonFinite, match=r"experts\.1\.up_proj"):
        experts(x, routing, ExpertsFrom(w.__getitem__), engine("float32"))


def test_an_error_in_one_thread_is_raised_and_the_pool_goes_on():
    pool = threads.Pool(3)
    done: list[int] = []

    def fail() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        pool.run([fail, *(lambda i=i: done.append(i) for i in range(50))])
    done.clear()
    pool.run([lambda i=i: done.append(i) for i in range(50)])
    assert sorted(done) == list(range(50))


ATTENTION = Config.from_dict(
    {
        **json.loads((golden_folder() / "tiny-k2/config.json").read_text()),
        "num_attention_heads": 5,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 32,
    }
)


def attention_bound(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    w: Matrix,
    cache: LatentCache,
    cfg: Config,
    u: float,
) -> np.ndarray:
    """Of a context [H, V], for arithmetic of unit roundoff u.

    A score is off by γ(N + C + R)·|s|, |s| of the absolute values; exp turns that into a relative
    error of a probability, twice with its sum; the context is a mean of values, off by γ(S + C).
    """
    H, N, V = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.v_head_dim
    size = np.abs(dequantize(w, np.float64)).reshape(H, N + V, -1)
    c_kv, k_pe = np.abs(cache.c_kv), np.abs(cache.k_pe)
    latent = np.einsum("thn,hnc->thc", np.abs(q_nope), size[:, :N])
    s = (np.einsum("thc,sc->ths", latent, c_kv) + np.abs(q_pe) @ k_pe.T) * softmax_scale(cfg)
    terms = N + cfg.kv_lora_rank + cfg.qk_rope_head_dim, cache.length + cfg.kv_lora_rank + 64
    off = (2 * terms[0] * s.max() + terms[1]) * u * 1.01
    return off * np.einsum("c,hvc->hv", c_kv.max(axis=0), size[:, N:])


@pytest.mark.parametrize("kind", ["bf16", "fp8", "q8", "f16", "f32"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("H", "T", "S"),
    [(5, 1, 1), (5, 1, 700), (5, 2, 2), (5, 2, 513), (5, 1, 1024), (16, 1, 700), (16, 2, 1025)],
)
def test_attention_over_the_latent_is_its_twin(kind, bf16, H, T, S):
    """Against the definition in float64; a block's edge before, at and behind the last tokens."""
    cfg, rng = replace(ATTENTION, num_attention_heads=H), np.random.default_rng(S + T)
    N, V, C = 128, 128, 256
    w = draw(kind, H * (N + V), C, rng)
    cache = LatentCache(cfg, np.float32, bf16)
    cache.append(
        rng.standard_normal((S, C)).astype(np.float32),
        rng.standard_normal((S, 32)).astype(np.float32),
    )
    q_nope = rng.standard_normal((T, H, N)).astype(np.float32) / 30
    q_pe = rng.standard_normal((T, H, 32)).astype(np.float32)
    y = absorbed(q_nope, q_pe, w, cache, cfg, engine("float32"))
    wide = [a.astype(np.float64) for a in (q_nope, q_pe)]
    truth = mla.absorbed(*wide, w, cache, cfg, policy("float64"))
    assert (np.abs(y - truth) <= attention_bound(*wide, w, cache, cfg, 2.0**-24)).all()
    for count in (1, 3):
        before = threads.pool().threads
        threads.use(count)
        again = absorbed(q_nope, q_pe, w, cache, cfg, engine("float32"))
        threads.use(before)
        np.testing.assert_array_equal(again, y)


def test_a_watched_softmax_is_the_definitions():
    model = refmoe.load()
    seen: list[str] = []

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        seen.append(path)
        return x

    nx = replace(model.nx.watching(watch), attention="absorbed")
    model.using(nx).logits([5])
    assert "model.layers.0.self_attn#probs" in seen
    assert "model.layers.0.self_attn#context_latent" in seen


def test_a_cache_in_bf16_is_a_rounded_cache():
    """Half the bytes; what is read back is what was written, rounded."""
    cache = LatentCache(ATTENTION, np.float32, bf16=True)
    rng = np.random.default_rng(0)
    c_kv = rng.standard_normal((70, 256)).astype(np.float32)
    k_pe = rng.standard_normal((70, 32)).astype(np.float32)
    for i in range(0, 70, 7):
        cache.append(c_kv[i : i + 7], k_pe[i : i + 7])
    np.testing.assert_array_equal(cache.c_kv, round_bf16(c_kv))
    np.testing.assert_array_equal(cache.k_pe, round_bf16(k_pe))
    assert cache.stored[0].nbytes == c_kv.nbytes // 2


@pytest.mark.parametrize("kind", ["bf16", "fp8", "q8", "f32"])
@pytest.mark.parametrize(("T", "S"), [(3, 3), (40, 100), (300, 300), (257, 700)])
def test_expanded_attention_by_heads_is_its_twin(kind, T, S):
    """In float64, where the two differ by the order of their sums alone."""
    cfg, rng = ATTENTION, np.random.default_rng(S + T)
    H, N, V, C = 5, 128, 128, 256
    w = draw(kind, H * (N + V), C, rng)
    cache = LatentCache(cfg, np.float64)
    cache.append(rng.standard_normal((S, C)), rng.standard_normal((S, 32)))
    q_nope, q_pe = rng.standard_normal((T, H, N)) / 30, rng.standard_normal((T, H, 32))
    truth = mla.expanded(q_nope, q_pe, w, cache, cfg, policy("float64"))
    y = expanded(q_nope, q_pe, w, cache, cfg, engine("float64"))
    assert (np.abs(y - truth) <= attention_bound(q_nope, q_pe, w, cache, cfg, 2.0**-53)).all()
    for count in (1, 3):
        before = threads.pool().threads
        threads.use(count)
        again = expanded(q_nope, q_pe, w, cache, cfg, engine("float64"))
        threads.use(before)
        np.testing.assert_array_equal(again, y)


def test_after_ctrl_c_no_thread_is_still_at_work():
    """The pieces write into arrays by address; who is interrupted frees them next."""
    pool, at_work = threads.Pool(2), threading.Event()
    finished: list[float] = []

    def slow() -> None:
        at_work.set()
        time.sleep(0.3)
        finished.append(time.perf_counter())

    def interrupted() -> None:
        at_work.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run([interrupted, slow])
    assert len(finished) == 1
    pool.close()


def test_a_pool_inside_a_piece_is_no_deadlock():
    pool = threads.Pool(2)
    done: list[int] = []
    inner = [lambda i=i: done.append(i) for i in range(4)]
    pool.run([lambda: pool.run(inner)] * 6)
    assert len(done) == 24
