"""8-bit dense weights: what they replace, how far off they are, and the file that keeps them."""

import json

import numpy as np
from safetensors.numpy import load_file

import refmoe
from refmoe.cli import main
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import dequantize
from refmoe.weights import dense


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
