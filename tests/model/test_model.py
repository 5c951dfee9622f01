"""The parts of `model/`: formats, norm, rotation, router, experts, cache."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.engines import CONVENTIONS
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import policy
from refmoe.model.experts import ExpertsFrom, MlpWeights, routed_experts
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import bf16_bits, dequantize, round_bf16, widen_bf16
from refmoe.model.mla import absorbed, expanded, softmax
from refmoe.model.norm import rms_norm
from refmoe.model.rope import cos_sin, inv_freq, rotate, softmax_scale
from refmoe.model.router import GateWeights, Routing, route
from refmoe.weights.synthetic.random import pack_int4
from tests.networks import config, gamma, row_by_row

seeds = st.integers(0, 2**32 - 1)
nx64 = policy("float64")


# --- formats


def test_every_bf16_survives_a_round_trip():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen_bf16(bits)
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(bf16_bits(wide)[numbers], bits[numbers])
    np.testing.assert_array_equal(round_bf16(wide)[numbers], wide[numbers])
    assert np.isnan(round_bf16(wide[~numbers])).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_to_bf16_takes_the_nearest_ties_to_even(x):
    got = float(round_bf16(np.array([x], np.float32))[0])
    low = int(bf16_bits(np.array([x], np.float32))[0])
    near = widen_bf16(np.array([max(low & 0x7FFF, 1) - 1, low & 0x7FFF, (low & 0x7FFF) + 1], "u2"))
    distance = np.abs(near.astype(np.float64) - abs(x))
    if np.isfinite(got):
        assert abs(abs(got) - abs(x)) == distance.min()
        if (distance == distance.min()).sum() == 2:
            assert bf16_bits(np.array([got], np.float32))[0] % 2 == 0


def independent_unpack(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Element by element from the format's description, in Python numbers."""
    O, I = packed.shape[0], packed.shape[1] * 8
    out = np.empty((O, I))
    for o in range(O):
        for i in range(I):
            word = int(packed[o, i // 8]) & 0xFFFFFFFF
            nibble = (word >> (4 * (i % 8))) & 15
            s = math.ldexp(1, 0) * float(widen_bf16(scale[o, i // 32 : i // 32 + 1])[0])
            out[o, i] = (nibble - 8) * s
    return out


@given(seeds, st.integers(1, 5), st.integers(1, 3))
def test_int4_is_what_the_format_says(seed, O, G):
    rng = np.random.default_rng(seed)
    packed = rng.integers(-(2**31), 2**31, (O, 4 * G)).astype(np.int32)
    scale = bf16_bits(rng.standard_normal((O, G)))
    w = dequantize(Int4(packed, scale))
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w, independent_unpack(packed, scale))


@given(seeds, st.integers(1, 5), st.integers(1, 3))
def test_packing_a_packed_matrix_changes_no_value(seed, O, G):
    rng = np.random.default_rng(seed)
    packed, scale = pack_int4(rng.standard_normal((O, 32 * G)))
    w = dequantize(Int4(packed, scale))
    half_step = 0.5 * widen_bf16(scale).max() * (1 + 2.0**-7)
    again = dequantize(Int4(*pack_int4(w)))
    assert np.abs(w - again).max() <= half_step


def test_int4_product_as_compressed_tensors_rounds_it():
    packed, scale = pack_int4(np.random.default_rng(0).standard_normal((3, 64)))
    m = Int4(packed, scale)
    exact, rounded = dequantize(m), dequantize(m, rounded=("int4",))
    np.testing.assert_array_equal(rounded, round_bf16(exact))
    assert (rounded != exact).any()


@given(seeds, st.integers(1, 4), st.integers(1, 40), st.integers(1, 4))
def test_linear_is_within_its_rounding(seed, T, I, O):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, I)).astype(np.float32)
    m = BF16(bf16_bits(rng.standard_normal((O, I))))
    wide = dequantize(m, np.float64)
    bound = gamma(I + 1, np.float32) * (np.abs(x).astype(np.float64) @ np.abs(wide).T)
    assert (np.abs(matrix.linear(x, m) - x.astype(np.float64) @ wide.T) <= bound).all()


# --- norm, rotation, softmax


@given(seeds, st.integers(1, 30))
def test_rms_norm_makes_unit_rows_of_any_scale(seed, D):
    x = np.random.default_rng(seed).standard_normal((3, D)) * [[1e-3], [1.0], [1e6]]
    y = rms_norm(x, np.ones(D), 0.0)
    np.testing.assert_allclose((y * y).mean(axis=1), 1, rtol=gamma(2 * D + 8))


@given(seeds, st.integers(0, 100), st.integers(0, 100), st.integers(0, 1000))
def test_rotation_depends_only_on_the_distance(seed, p, q, shift):
    cfg, rng = config(qk_rope_head_dim=8), np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 1, 8))

    def product(i: int, j: int) -> float:
        cos_i, sin_i = cos_sin(np.array([i]), cfg, nx64)
        cos_j, sin_j = cos_sin(np.array([j]), cfg, nx64)
        return float((rotate(a, cos_i, sin_i) * rotate(b, cos_j, sin_j)).sum())

    angle = (max(p, q) + shift) * inv_freq(cfg).max()  # known to a relative unit, as is its cosine
    error = gamma(8 + 8) + 8 * np.finfo(np.float64).eps * (1 + angle)
    bound = error * np.linalg.norm(a) * np.linalg.norm(b)
    assert abs(product(p, q) - product(p + shift, q + shift)) <= bound


@given(seeds, st.integers(0, 10_000))
def test_rotation_preserves_the_length_of_each_pair(seed, p):
    cfg = config(qk_rope_head_dim=8)
    x = np.random.default_rng(seed).standard_normal((1, 8))
    y = rotate(x, *cos_sin(np.array([p]), cfg, nx64))
    before, after = (np.hypot(v[:, 0::2], v[:, 1::2]) for v in (x, y))
    np.testing.assert_allclose(after, before, rtol=gamma(16))


@pytest.mark.parametrize(
    ("factor", "beta_fast", "known"),
    [  # published K2 constants; the numbers are worked out from the formula, to seven digits
        (32.0, 1.0, {9: 0.04768861, 14: 0.008794287, 19: 0.001621760, 20: 3.614047e-5}),
        (64.0, 1.0, {8: 0.06687403, 19: 0.001621760, 20: 1.807023e-5, 31: 4.382206e-7}),
        (64.0, 32.0, {8: 0.06687403, 9: 0.04377666, 14: 0.004465849, 19: 0.000158375}),
    ],
)
def test_yarn_frequencies_of_the_published_members(factor, beta_fast, known):
    yarn = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    cfg = config(rope_scaling=yarn, qk_rope_head_dim=64, qk_nope_head_dim=128)
    found = inv_freq(cfg)
    for i, value in known.items():
        assert found[i] == pytest.approx(value, rel=1e-6)
    scale = {32.0: 0.130860800, 64.0: 0.144679626}[factor]
    assert softmax_scale(cfg) == pytest.approx(scale, rel=1e-8)


@given(seeds, st.integers(1, 20))
def test_softmax_sums_to_one_and_ignores_a_shift(seed, S):
    s = np.random.default_rng(seed).standard_normal((2, S)) * 50
    p = softmax(s)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=gamma(S + 4))
    # the shift itself rounds each score by at most one unit of the larger number
    moved = np.finfo(np.float64).eps * (np.abs(s).max() + 700)
    np.testing.assert_allclose(softmax(s + 700), p, rtol=4 * moved + gamma(S + 8))


@given(seeds, st.integers(1, 6), st.integers(0, 20))
def test_absorbed_attention_equals_expanded_in_every_element(seed, T, before):
    """First-order error analysis of both sides, element by element."""
    cfg, rng = config(), np.random.default_rng(seed)
    H, N, R, V, C = 3, 7, 4, 5, 19
    S = before + T
    cache = LatentCache(cfg, np.float64)
    cache.append(rng.standard_normal((S, C)), rng.standard_normal((S, R)))
    q_nope, q_pe = rng.standard_normal((T, H, N)), rng.standard_normal((T, H, R))
    kv_b = rng.standard_normal((H * (N + V), C)) / np.sqrt(C)
    a = absorbed(q_nope, q_pe, kv_b, cache, cfg, nx64)
    b = expanded(q_nope, q_pe, kv_b, cache, cfg, nx64)

    w = np.abs(kv_b).reshape(H, N + V, C)
    latent, pe = np.abs(cache.c_kv), np.abs(cache.k_pe)
    size = np.einsum("thn,hnc,sc->ths", np.abs(q_nope), w[:, :N], latent)
    size += np.einsum("thr,sr->ths", np.abs(q_pe), pe)
    # a score: sums of N, C and R terms, one addition, one scaling
    score = gamma(N + C + R + 2) * softmax_scale(cfg) * size.max(axis=2, keepdims=True)
    # both softmaxes move by e^(2·score error); then sums of S and C terms
    relative = 2 * np.expm1(2 * score) + 2 * gamma(2 * S + C + 8)
    value = np.einsum("hvc,sc->shv", w[:, N:], latent).max(axis=0)
    assert (np.abs(a - b) <= relative * value).all()


# --- router


def brute_force(x, gate, bias, cfg, fill=-np.inf):
    """Choice and weights, token by token, in plain Python."""
    chosen, weights = [], []
    for row in x:
        s = [1 / (1 + math.exp(-float(row @ g))) for g in gate]
        score = [a + float(b) for a, b in zip(s, bias, strict=True)]
        size = len(score) // cfg.n_group
        groups = [score[g * size : (g + 1) * size] for g in range(cfg.n_group)]
        value = [sum(sorted(g)[-2:]) for g in groups]
        kept = sorted(range(cfg.n_group), key=lambda g: -value[g])[: cfg.topk_group]
        open_ = [v if e // size in kept else fill for e, v in enumerate(score)]
        top = sorted(range(len(score)), key=lambda e: -open_[e])[: cfg.num_experts_per_tok]
        total = sum(s[e] for e in top) + 1e-20
        chosen.append(top)
        weights.append([s[e] / total * cfg.routed_scaling_factor for e in top])
    return np.array(chosen), np.array(weights)


@given(seeds, st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 5)]), st.sampled_from([-np.inf, 0.0]))
def test_the_router_chooses_as_brute_force_does(seed, groups, fill):
    cfg = config(n_group=groups[0], topk_group=groups[1], num_experts_per_tok=2)
    rng = np.random.default_rng(seed)
    x, gate = rng.standard_normal((5, 23)), rng.standard_normal((12, 23)) / 5
    bias = rng.standard_normal(12) - 0.5  # scores of both signs, so that the fill matters
    nx = policy("float64", "refmoe" if fill < 0 else "moonshot")
    got = route(x, GateWeights(gate, bias), cfg, nx)
    chosen, weights = brute_force(x, gate, bias, cfg, fill)
    np.testing.assert_array_equal(got.experts, chosen)
    np.testing.assert_allclose(got.weights, weights, rtol=gamma(23 + 20) * 23)
    np.testing.assert_allclose(got.weights.sum(axis=1), 2.827, rtol=gamma(8))
    assert np.isinf(got.group_margin).all() == (groups[0] == groups[1])
    assert (got.margin >= 0).all()


@given(seeds)
def test_the_margin_is_what_a_flip_needs(seed):
    cfg, rng = config(), np.random.default_rng(seed)
    x, gate, bias = (
        rng.standard_normal((1, 23)),
        rng.standard_normal((12, 23)),
        rng.standard_normal(12),
    )
    first = route(x, GateWeights(gate, bias), cfg, nx64)
    s = 1 / (1 + np.exp(-(x @ gate.T)[0]))
    refused = int(np.argsort(-(s + bias), kind="stable")[3])
    for nudge, flips in ((1 + 1e-9, True), (1 - 1e-9, False)):
        moved = bias.copy()
        moved[refused] += first.margin[0] * nudge
        now = route(x, GateWeights(gate, moved), cfg, nx64)
        assert (refused in now.experts[0]) == flips


def test_equal_scores_go_to_the_lower_index():
    x = np.ones((1, 23))
    got = route(x, GateWeights(np.zeros((12, 23)), np.zeros(12)), config(), nx64)
    assert got.experts.tolist() == [[0, 1, 2]]
    assert got.margin.tolist() == [0.0]


def test_no_expert_refused_is_an_infinite_margin():
    cfg = config(num_experts_per_tok=12)
    x = np.random.default_rng(0).standard_normal((2, 23))
    got = route(x, GateWeights(np.ones((12, 23)), np.zeros(12)), cfg, nx64)
    assert np.isposinf(got.margin).all()


def test_weights_follow_the_experts_that_the_watcher_returns():
    x = np.random.default_rng(0).standard_normal((2, 23))
    gate = GateWeights(np.random.default_rng(1).standard_normal((12, 23)), np.zeros(12))
    forced = np.array([[7, 2, 9], [0, 1, 11]])

    def watch(path, value):
        return forced if path.endswith("gate#experts") else value

    got = route(x, gate, config(), nx64.within("mlp.").watching(watch))
    s = 1 / (1 + np.exp(-(x @ gate.weight.T)))
    s = np.take_along_axis(s, forced, axis=1)
    np.testing.assert_array_equal(got.experts, forced)
    expected = 2.827 * s / s.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got.weights, expected, rtol=gamma(23 + 20) * 23)


@pytest.mark.parametrize(("name", "total"), [("mlx", np.nan), ("refmoe", 0.0), ("llama.cpp", 0.0)])
def test_a_normaliser_of_nothing(name, total):
    """All chosen sigmoids underflow: 0/0 where nothing guards the sum (engines differ)."""
    gate = GateWeights(np.full((12, 23), -40.0), np.zeros(12))
    nx = policy("float32", name)
    with np.errstate(invalid="ignore"):
        got = route(np.ones((1, 23), np.float32), gate, config(), nx)
    np.testing.assert_array_equal(got.weights.sum(), total)


# --- experts and cache


def experts_of(seed: int) -> dict[int, MlpWeights]:
    rng = np.random.default_rng(seed)
    return {
        e: MlpWeights(*(rng.standard_normal(s) for s in ((13, 23), (13, 23), (23, 13))))
        for e in range(12)
    }


@given(seeds, st.permutations(range(6)))
def test_experts_commute_with_permuting_tokens(seed, order):
    rng, experts = np.random.default_rng(seed), experts_of(seed)
    x = rng.standard_normal((6, 23))
    routing = Routing(rng.integers(0, 12, (6, 3)), rng.random((6, 3)), np.ones(6), np.ones(6))
    moved = Routing(*(part[order] for part in routing))
    nx = row_by_row(nx64)
    straight = routed_experts(x, routing, ExpertsFrom(experts.__getitem__), nx)
    permuted = routed_experts(x[order], moved, ExpertsFrom(experts.__getitem__), nx)
    np.testing.assert_array_equal(permuted, straight[order])


def test_a_row_that_names_an_expert_twice_gets_it_twice():
    x, experts = np.random.default_rng(0).standard_normal((1, 23)), experts_of(0)
    ones = np.ones(1)
    twice = Routing(np.array([[4, 4]]), np.array([[0.5, 0.25]]), ones, ones)
    once = Routing(np.array([[4]]), np.array([[0.75]]), ones, ones)
    nx = row_by_row(nx64)
    a, b = (routed_experts(x, r, ExpertsFrom(experts.__getitem__), nx) for r in (twice, once))
    np.testing.assert_allclose(a, b, rtol=gamma(4))


@given(st.lists(st.integers(1, 9), max_size=8))
def test_a_cache_keeps_every_row_in_order(sizes):
    cfg = config()
    cache, rows = LatentCache(cfg, np.float64), np.random.default_rng(0).standard_normal((99, 23))
    for size in sizes:
        part = rows[cache.length : cache.length + size]
        cache.append(part[:, :19], part[:, 19:])
    np.testing.assert_array_equal(cache.c_kv, rows[: sum(sizes), :19])
    np.testing.assert_array_equal(cache.k_pe, rows[: sum(sizes), 19:])
    cache.truncate(cache.length // 2)
    np.testing.assert_array_equal(cache.c_kv, rows[: sum(sizes) // 2, :19])
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(cache.length + 1)


# --- policies


def test_unknown_numerics_and_conventions_are_refused():
    with pytest.raises(InputError, match="float64, float32, bfloat16, float16"):
        policy("float8")
    with pytest.raises(InputError, match="moonshot"):
        policy("float32", "tensorrt")
    assert set(CONVENTIONS) == {
        "refmoe",
        "moonshot",
        "transformers",
        "vllm",
        "sglang",
        "llama.cpp",
        "mlx",
    }
