"""8-bit dense weights, the slice of K2 and the bench: what they are, not how fast."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import refmoe
from refmoe.cli import main
from refmoe.files import InputError
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import dequantize
from refmoe.run import generate as run_generate
from refmoe.run.bench import base as bench_base
from refmoe.run.bench import kernels as bench_kernels
from refmoe.run.generate import generation_decoder, prefill, step
from refmoe.weights import dense
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic.k2_slice import SHAPE as K2
from refmoe.weights.synthetic.k2_slice import k2_slice
from refmoe.weights.synthetic.random import write_random
from refmoe.weights.writer import Spec, write_stream


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A checkpoint whose dense matrices have whole groups, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shape = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 96, "intermediate_size": 224}
    shape |= {"num_attention_heads": 4, "v_head_dim": 32, "moe_intermediate_size": 64}
    write_random(tmp_path / "model", "int4", seed=3, shape=shape)
    return tmp_path / "model"


def test_a_q8_weight_is_off_by_half_a_step_and_the_rounding_of_its_scale():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((30, 96)).astype(np.float32) * 10.0 ** rng.integers(-4, 4, (30, 1))
    w = w.astype(np.float32)
    w[3, 32:64] = 0
    q = Q8.quantize(w)
    step = np.abs(w).reshape(30, 3, 32).max(axis=-1, keepdims=True) / 127
    off = np.abs(dequantize(q, np.float64).reshape(30, 3, 32) - w.reshape(30, 3, 32))
    # a float16 scale is off by 2⁻¹¹ of itself, or 2⁻²⁵ where it is subnormal, 127 times at most
    assert (off <= step / 2 * (1 + 2.0**-20) + 127 * np.maximum(step * 2.0**-11, 2.0**-25)).all()
    assert (dequantize(q)[3, 32:64] == 0).all()


def test_dense_q8_replaces_what_every_token_uses_and_nothing_else(small):
    exact, q8 = refmoe.load(small), refmoe.load(small, dense="q8")
    for before, after in zip(exact.decoder.layers, q8.decoder.layers, strict=True):
        assert isinstance(after.self_attn.o_proj, Q8)
        assert isinstance(after.self_attn.kv_b_proj, Q8)
        np.testing.assert_array_equal(
            dequantize(after.input_layernorm), dequantize(before.input_layernorm)
        )
    assert isinstance(q8.decoder.layers[0].mlp.down_proj, Q8)
    moe = q8.decoder.layers[1].mlp
    assert isinstance(moe.shared_experts.up_proj, Q8)
    assert not isinstance(moe.gate.weight, Q8)
    assert not isinstance(q8.decoder.experts[1](0).up_proj, Q8)
    assert not isinstance(q8.decoder.embed_tokens, Q8)
    wanted = Q8.quantize(dequantize(exact.decoder.lm_head))
    np.testing.assert_array_equal(q8.decoder.lm_head.blocks, wanted.blocks)


def test_the_kernels_of_q8_are_the_definition_of_q8(small):
    """The same 8-bit weights, by kernels and by model/ in float64."""
    tokens = [5, 17, 2, 44, 9, 30]
    fast = refmoe.load(small, dense="q8").logits(tokens)
    truth = refmoe.load(small, "float64", reference=True, dense="q8").logits(tokens)
    plain = refmoe.load(small, reference=True, dense="q8").logits(tokens)
    error, usual = (np.abs(y - truth).max() for y in (fast, plain))
    assert error <= 4 * usual  # float32 in another order of sums


def test_large_dense_weights_are_kept_in_a_file_that_is_checked(small):
    model = refmoe.load(small)
    made = dense.dense_q8(model.checkpoint, model.decoder, keep=True)
    (file,) = dense.folder().glob("*.safetensors")
    stored = load_file(file)  # the library reads it
    np.testing.assert_array_equal(stored["lm_head"], made.lm_head.blocks)
    stamp = file.stat().st_mtime_ns
    dense.dense_q8(model.checkpoint, model.decoder, keep=True)
    assert file.stat().st_mtime_ns == stamp
    with file.open("r+b") as out:  # a bit falls over
        out.seek(-5, 2)
        out.write(b"!")
    again = dense.dense_q8(model.checkpoint, model.decoder, keep=True)
    np.testing.assert_array_equal(again.lm_head.blocks, stored["lm_head"])
    assert not list(dense.folder().glob("*.part"))
    with file.open("r+b") as out:  # its header, which the hash does not cover
        out.seek(12)
        out.write(b"?")
    again = dense.dense_q8(model.checkpoint, model.decoder, keep=True)
    np.testing.assert_array_equal(again.lm_head.blocks, stored["lm_head"])


def test_where_there_is_no_place_for_the_file_it_is_made_in_memory(small, monkeypatch):
    monkeypatch.setattr(dense, "folder", lambda: small / "config.json" / "no folder")
    model = refmoe.load(small)
    made = dense.dense_q8(model.checkpoint, model.decoder, keep=True)
    assert isinstance(made.lm_head, Q8)


def test_inspect_states_the_bytes_of_both(small, capsys):
    assert main(["inspect", "--model", str(small), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["dense"]
    found: dict[str, object] = {}
    decoder = refmoe.load(small).decoder
    dense.replaced(decoder, lambda name, m: found.setdefault(name, m))
    assert told["q8"] == sum(dense.size_of(m) for m in found.values())
    assert told["exact"] == sum(m.nbytes for m in found.values())


def test_a_stream_is_what_the_library_reads(tmp_path):
    a, b = np.arange(10, dtype=np.int32), np.ones((3, 5), np.float32)
    specs = [Spec("a", "I32", (10,)), Spec("b", "F32", (3, 5))]
    write_stream(tmp_path / "x.safetensors", specs, [a[:4], a[4:], b])
    read = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["a"], a)
    np.testing.assert_array_equal(read["b"], b)
    with pytest.raises(ValueError, match="40 bytes came for tensors of 100"):
        write_stream(tmp_path / "y.safetensors", specs, [a])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


SMALL = {
    "hidden_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
}


@pytest.fixture
def sliced(tmp_path, monkeypatch):
    monkeypatch.setattr("refmoe.weights.synthetic.k2_slice.SHAPE", {**K2, **SMALL})
    return k2_slice(tmp_path / "slices", 12, 4096)


def test_the_slice_is_a_checkpoint_of_k2s_shape_and_is_written_once(sliced):
    checkpoint = Checkpoint.open(sliced)
    assert not checkpoint.missing
    assert not checkpoint.unread
    assert checkpoint.cfg.n_routed_experts == 12
    assert checkpoint.cfg.vocab_size == 4096
    stamp = (sliced / "model.safetensors").stat().st_mtime_ns
    assert k2_slice(sliced.parent, 12, 4096) == sliced
    assert (sliced / "model.safetensors").stat().st_mtime_ns == stamp
    hidden = refmoe.trace(refmoe.load(sliced), [1, 2, 3], ["model.layers.1"])["model.layers.1"]
    assert 0.1 < np.sqrt((hidden**2).mean()) < 100  # no activation runs away


def test_a_slice_that_does_not_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("refmoe.weights.synthetic.k2_slice.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the slice takes 15\.5 GB, 1\.0 GB are free"):
        k2_slice(tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


@pytest.fixture
def with_kernels(monkeypatch):
    """No model is so tiny that it is generated from without kernels."""
    monkeypatch.setattr(run_generate, "TINY", 0)


def test_decoding_by_steps_is_the_whole_sequence(small, with_kernels):
    """As exact as the definition in float32; 16-bit activations are 64 times finer than bf16's."""
    tokens = [5, 17, 2, 44, 9, 30, 11, 3]
    truth = refmoe.load(small, "float64", reference=True).logits(tokens)[2:]

    def off(logits: np.ndarray) -> float:
        return float(np.sqrt(((logits - truth) ** 2).mean()))

    def stepped(int4: str) -> np.ndarray:
        decoder = generation_decoder(refmoe.load(small), int4)
        memory = decoder.caches()
        rows = [prefill(decoder, tokens[:3], memory)]
        return np.array(rows + [step(decoder, token, memory) for token in tokens[3:]])

    plain = off(refmoe.load(small, reference=True).logits(tokens)[2:])
    coarse = off(refmoe.load(small, "bfloat16", reference=True).logits(tokens)[2:])
    assert off(stepped("exact")) <= 4 * plain
    assert off(stepped("fast")) <= coarse / 16


def test_a_bf16_cache_costs_less_than_an_engine_in_bf16(small, with_kernels):
    """It makes two of the roundings that such an engine makes at every point, and they are seen."""
    tokens = [5, 17, 2, 44, 9, 30, 11, 3]
    truth = refmoe.load(small, "float64", reference=True).logits(tokens)[2:]

    def off(cache: str) -> float:
        decoder = generation_decoder(refmoe.load(small), "exact", cache)
        memory = decoder.caches()
        rows = [prefill(decoder, tokens[:3], memory)]
        rows += [step(decoder, token, memory) for token in tokens[3:]]
        return float(np.sqrt(((np.array(rows) - truth) ** 2).mean()))

    coarse = refmoe.load(small, "bfloat16", reference=True).logits(tokens)[2:]
    assert off("float32") < off("bf16") < np.sqrt(((coarse - truth) ** 2).mean())


def test_bench_kernels_prints_its_document(capsys, monkeypatch):
    monkeypatch.setattr(bench_base, "READ", 1 << 22)
    monkeypatch.setattr(bench_base, "ROUNDS", 1)
    document = bench_kernels.measure_kernels(bench_kernels.NAMES, (1,), (1, 3), ((256, 256),))
    assert list(document["stream_gbs"]) == ["1"]
    assert [r["name"] for r in document["kernels"]] == [
        n for n in bench_kernels.NAMES for _ in range(2)
    ]
    for row in document["kernels"]:
        assert row["ratio"] > 0
        assert row["rel_error"] <= (5e-5 if row["name"].endswith("-fast") else 5e-7)
    assert len(bench_kernels.format_kernels(document)) == 3 + len(document["kernels"])


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_bench_of_a_model_says_what_it_measured(what, sliced, monkeypatch, capsys):
    monkeypatch.setattr(bench_base, "READ", 1 << 22)
    command = ["bench", what, "--model", str(sliced), "--prompt", "8", "--dense", "q8", "--json"]
    assert main(command) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["tok_s"] > 0
    assert d["dense"] == "q8"
    assert {"attention", "router", "experts", "shared experts", "dense mlp", "head"} <= set(
        d["parts"]
    )
    if what == "decode":
        decoder = refmoe.load(sliced, dense="q8").decoder
        cfg = decoder.cfg
        expert = sum(m.nbytes for m in decoder.experts[1](0))
        dense_bytes = dense.sizes(Checkpoint.open(sliced))[1]
        least = cfg.num_experts_per_tok * expert + dense_bytes
        assert least < d["bytes_per_token"] < 1.2 * least
    assert main([a for a in command if a != "--json"]) == 0
    assert "of what reading alone" in capsys.readouterr().out


def test_a_first_compilation_is_told(tmp_path):
    script = "import sys; from refmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "generate", "My", "--max-new-tokens", "2"]
    told = []
    for _ in range(2):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        told.append("compiling kernels for this processor" in done.stderr)
    assert told == [True, False]


def test_no_number_of_threads_below_one(capsys):
    assert main(["generate", "My", "--threads", "0"]) == 2
    assert "at least one" in capsys.readouterr().err
