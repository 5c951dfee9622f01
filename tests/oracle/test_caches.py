"""Attention over a narrow cache: recomputed, suggested, declared; and caches that are wrong.

The dumps are the first layer of a healthy run of vLLM, its attention computed anew by the few lines
below, with latents and rotated keys as such a cache gives them back. The quantisers are not
refmoe's.
"""

from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.model.matrix import dequantize, round_bf16
from refmoe.model.rope import softmax_scale
from refmoe.oracle.caches import CACHES
from refmoe.oracle.check import check
from refmoe.oracle.faults.base import altered
from refmoe.oracle.faults.dictionary import BY_ID
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.selftest.power import rounded_run
from refmoe.run.load import golden_folder

AT = "model.layers.0.self_attn"
CONTEXT = f"{AT}.mla_attn.mla_attn"


def e4m3(x):
    x = np.clip(x, -448, 448)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-30))), -6) - 3)
    return np.round(x / step) * step


def e5m2(x):
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-30))), -14) - 2)
    return np.round(x / step) * step


def by_token(x):
    return np.abs(x).max(axis=-1, keepdims=True)


def int8(x):
    return np.round(x / by_token(x) * 127) * by_token(x) / 127


def blocks(levels):
    def write(x):
        y = x.reshape(*x.shape[:-1], -1, 32)
        s = np.abs(y).max(axis=-1, keepdims=True) / levels
        return (np.round(y / s) * s).reshape(x.shape)

    return write


def tiles(x):
    y = x.reshape(*x.shape[:-1], -1, 128)
    s = np.abs(y).max(axis=-1, keepdims=True) / 448
    return (e4m3(y / s) * s).reshape(x.shape)


def as_is(x):
    return x


class Layer:
    """The first layer of vLLM's run, and its attention as plain NumPy."""

    def __init__(self):
        self.model = refmoe.load(golden_folder() / "tiny-k2", "float64", reference=True)
        dump = read_dump(golden_folder() / "vllm" / "bfloat16-healthy.safetensors")
        own = ("model.embed_tokens", "model.layers.0.input_layernorm")
        kept = {n: x for n, x in dump.arrays.items() if n.startswith(AT) or n in own}
        self.dump = replace(dump, arrays=kept)
        cfg, w = self.model.cfg, self.model.decoder.layers[0].self_attn
        self.cfg, self.o_proj = cfg, dequantize(w.o_proj, np.float64)
        self.kv_b = dequantize(w.kv_b_proj, np.float64).reshape(
            cfg.num_attention_heads, -1, cfg.kv_lora_rank
        )
        self.latent = kept[f"{AT}.kv_a_layernorm"].astype(float)
        self.key = kept[f"{CONTEXT}#k_pe"].astype(float).reshape(len(self.latent), -1)

    def attend(self, latent, key):
        H, N = self.cfg.num_attention_heads, self.cfg.qk_nope_head_dim
        q = self.dump.arrays[f"{AT}.q_b_proj"].astype(float).reshape(len(latent), H, -1)
        q_pe = self.dump.arrays[f"{CONTEXT}#q"].astype(float).reshape(len(latent), H, -1)[..., N:]
        k = np.einsum("hnc,tc->htn", self.kv_b[:, :N], latent)
        v = np.einsum("hvc,tc->htv", self.kv_b[:, N:], latent)
        s = np.einsum("thn,hsn->hts", q[..., :N], k) + np.einsum("thr,sr->hts", q_pe, key)
        s = np.where(np.tri(len(latent), dtype=bool), s * softmax_scale(self.cfg), -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return np.einsum("hts,hsv->thv", p, v).reshape(len(latent), -1)

    def with_context(self, x):
        """Return the dump with another result of attention, and what o_proj makes of it."""
        context = round_bf16(x.astype(np.float32))
        out = round_bf16((context.astype(float) @ self.o_proj.T).astype(np.float32))
        new = {CONTEXT: context, f"{AT}.o_proj": out, AT: out}
        return replace(self.dump, arrays=self.dump.arrays | new)

    def over(self, write, key=None):
        return self.with_context(self.attend(write(self.latent), (key or write)(self.key)))

    def check(self, dump, **declared):
        return check(self.model, dump, engine="vllm", **declared)


@pytest.fixture(scope="module")
def layer():
    return Layer()


WIDE = {  # what bf16 does not hide
    "e4m3": (e4m3, e4m3, "e4m3"),
    "e4m3, the key as it is": (e4m3, as_is, "e4m3"),
    "e4m3 by 128 channels": (tiles, as_is, "e4m3"),
    "e5m2": (e5m2, e5m2, "e5m2"),
    "int4": (blocks(7), blocks(7), "int4"),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_cache_that_explains_a_dump_is_suggested_and_passes_where_declared(name, layer):
    latent, key, type = WIDE[name]
    dump = layer.over(latent, key)
    report = layer.check(dump)
    assert (report.verdict, report.point) == ("undecidable", f"{AT}#context")
    assert report.passes_under == (f"--cache {type}",)
    assert f"a cache in {type}" in report.reason
    declared = layer.check(dump, cache=type)
    assert declared.verdict == "pass", declared.reason
    assert declared.cache.startswith(type)
    assert "noise" not in declared.cache  # recomputed, not allowed for
    assert max(p.multiple for p in declared.points) < 0.8
    assert layer.check(dump, cache="bf16").verdict == "fault"


@pytest.mark.parametrize(
    ("write", "type"), [(int8, "int8"), (blocks(127), "q8_0"), (as_is, "bf16")]
)
def test_a_cache_within_the_rounding_of_the_tensors_passes_either_way(write, type, layer):
    dump = layer.over(write)
    assert layer.check(dump).verdict == "pass"
    assert layer.check(dump, cache=type).verdict == "pass"


def test_no_fault_hides_under_a_declared_cache(layer):
    """Three percent, under a type whose own rounding is eight: the latents are at hand."""
    x = layer.attend(blocks(7)(layer.latent), blocks(7)(layer.key))
    assert np.linalg.norm(x / layer.attend(layer.latent, layer.key) - 1) > 0.05
    report = layer.check(layer.with_context(x * 1.03), cache="int4")
    assert (report.verdict, report.point) == ("fault", f"{AT}#context")
    assert report.cause.id == "cache-values-scaled"
    assert report.cause.fitted.startswith("factor on the values 1.0")


def test_an_unknown_cache_is_refused(layer):
    with pytest.raises(InputError, match="cache 'fp4'; known: float32, float16"):
        layer.check(layer.dump, cache="fp4")


def test_a_narrow_cache_is_told_apart_in_every_precision(random_bf16):
    """An engine that caches in int8 and stores in float32: nothing hides its rounding."""
    model = refmoe.load(random_bf16, "float64", reference=True)
    tokens = [i * 7 % 500 for i in range(12)]
    profile = replace(refmoe.engines.PROFILES["float32"], cache="int8")
    dump = rounded_run(model, profile, tokens, seed=1)
    report = check(model, dump, engine="refmoe")
    assert (report.verdict, report.passes_under) == ("undecidable", ("--cache int8",))
    assert check(model, dump, engine="refmoe", cache="int8").verdict == "pass"
    assert check(model, dump, engine="refmoe", profile=profile).verdict == "pass"


# --- caches that are wrong


def named(report, id, fitted=None):
    assert report.verdict == "fault"
    assert report.passes_under == ()
    assert report.cause is not None, report.shape
    assert report.cause.id == id
    if fitted is not None:
        name, value = fitted
        assert report.cause.fitted.startswith(name)
        assert float(report.cause.fitted.split()[-1]) == pytest.approx(value, rel=2e-2)


@pytest.mark.parametrize("factor", [4.0, 0.3, 1 / 448])
def test_a_lost_scale_is_named_with_its_value(factor, layer):
    both = layer.with_context(layer.attend(layer.latent * factor, layer.key * factor))
    named(layer.check(both), "cache-scaled", ("factor on the cached rows", factor))
    latent = layer.with_context(layer.attend(layer.latent * factor, layer.key))
    named(layer.check(latent), "cache-latent-scaled", ("factor on the cached latents", factor))
    key = layer.with_context(layer.attend(layer.latent, layer.key * max(factor, 0.3) * 2))
    wanted = ("factor on the cached keys", max(factor, 0.3) * 2)
    named(layer.check(key), "cache-key-scaled", wanted)


def test_a_limit_of_the_cache_is_named_with_its_value(layer):
    limit = float(np.abs(layer.latent).max() / 3)
    clipped = (np.clip(x, -limit, limit) for x in (layer.latent, layer.key))
    report = layer.check(layer.with_context(layer.attend(*clipped)))
    named(report, "cache-clipped", ("limit of cached values", limit))


def test_a_transposed_cache_is_named(layer):
    latent, key = (np.ascontiguousarray(x.T).reshape(x.shape) for x in (layer.latent, layer.key))
    named(layer.check(layer.with_context(layer.attend(latent, key))), "cache-transposed")
    only = layer.with_context(layer.attend(latent, layer.key))
    named(layer.check(only), "cache-latent-transposed")


def test_rows_of_a_chunk_are_named_with_the_position_they_begin_at(layer):
    for id, change in (
        ("cache-rows-missing", lambda x: np.concatenate((x[:5], 0 * x[5:]))),
        ("cache-rows-stale", lambda x: np.resize(x[:5], x.shape)),
    ):
        x = layer.attend(change(layer.latent), change(layer.key))
        named(layer.check(layer.with_context(x)), id, ("from position", 5))


CHUNKED = ("cache-prefix-missing", "cache-prefix-unseen", "rope-restarted")


@pytest.mark.parametrize("id", CHUNKED)
def test_what_goes_wrong_at_a_chunk_is_named_with_where_it_begins(id, random_bf16):
    model = refmoe.load(random_bf16, "float64", reference=True)
    engine = refmoe.load(random_bf16, "float32", reference=True)
    tokens = [i * 7 % 500 for i in range(14)]
    fault = BY_ID[id]
    begun = replace(fault, alter=fault.free.alter(4))
    seen = refmoe.oracle.trace.Recorder()
    watched = engine.decoder.using(engine.nx.watching(seen))
    altered(watched, begun).logits(tokens)
    arrays = {n: x for n, x in seen.seen.items() if "#rows" not in n}
    dump = refmoe.oracle.readers.base.Dump(random_bf16, arrays, tokens, "float32")
    named(check(model, dump, engine="refmoe", profile="float32"), id, ("from position", 4))


# --- the forms of a cache


def test_every_form_gives_back_rows_near_those_written():
    x = np.random.default_rng(3).normal(size=(6, 160)) * 3
    error = {"float16": 5e-4, "bfloat16": 4e-3, "e4m3": 0.05, "e5m2": 0.1, "int8": 0.02}
    error |= {"q8_0": 0.01, "int4": 0.15, "q4_0": 0.15, "float32": 1e-6}
    for type, forms in CACHES.items():
        for form in forms:
            latent, key = form.read(x[:, :128], x[:, 128:])
            back = np.concatenate((latent, key), axis=-1)
            assert np.linalg.norm(back - x) <= error[type] * np.linalg.norm(x), str(form)
    assert len({str(f) for forms in CACHES.values() for f in forms}) == sum(
        map(len, CACHES.values())
    )


def test_blocks_are_written_as_gguf_writes_them():
    gguf = pytest.importorskip("gguf", reason="the test extra has it")
    x = np.random.default_rng(3).normal(size=(6, 128)).astype(np.float32)
    for type, name in (("q8_0", "Q8_0"), ("q4_0", "Q4_0")):
        kind = gguf.GGMLQuantizationType[name]
        theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        np.testing.assert_array_equal(CACHES[type][0].latent(x), theirs)


def test_a_scale_that_no_form_has_is_allowed_for_as_noise_where_declared(layer):
    """A static scale, calibrated elsewhere: the codes cannot be told, their size can."""
    dump = layer.over(lambda x: e4m3(x * 0.7777) / 0.7777)
    report = layer.check(dump, cache="e4m3")
    assert report.verdict == "pass", report.reason
    assert report.cache == "e4m3, allowed for as noise"
    twice = layer.with_context(layer.attend(2 * layer.latent, layer.key))
    assert layer.check(twice, cache="e4m3").verdict == "fault"
