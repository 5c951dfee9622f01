"""Every member of the family in its published layout, and FP8."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import refmoe
from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.formats.fp8_block import E4M3, Fp8Block, Fp8Scheme
from refmoe.model.formats.names import canonical
from refmoe.model.formats.registry import announced_formats, find_scheme, unknown_method
from refmoe.model.matrix import dequantize, rows, tiles
from refmoe.weights.checkpoint import Checkpoint, expected, read_config
from refmoe.weights.synthetic.members import MEMBERS, write_member
from refmoe.weights.synthetic.random import pack_fp8, write_random
from tests.networks import SHAPE, gamma

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", params=sorted(MEMBERS))
def member(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("members") / request.param
    write_member(folder, request.param, seed=7)
    return request.param, folder


# --- FP8


def test_e4m3_is_the_format_of_its_definition():
    """Sign, exponent with bias 7, fraction; no infinity, NaN at ±0x7f (arXiv:2209.05433)."""
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, fraction = (code >> 3) & 15, code & 7
        if code & 0x7F == 0x7F:
            assert np.isnan(E4M3[code])
        elif exponent == 0:
            assert E4M3[code] == sign * fraction * 2.0**-9
        else:
            assert E4M3[code] == sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)
    assert np.nanmax(E4M3) == 448


@pytest.mark.peers
def test_e4m3_is_torchs():
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(E4M3, codes.float().numpy())


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.sampled_from([(4, 4), (3, 5), (128, 128)]))
def test_fp8_is_code_times_the_scale_of_its_block_partial_ones_included(seed, O, I, block):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (O, I)).astype(np.uint8)
    bits[bits & 0x7F == 0x7F] = 0
    shape = -(-O // block[0]), -(-I // block[1])
    m = Fp8Block(bits, rng.standard_normal(shape).astype(np.float32), block)
    w = dequantize(m, np.float64)
    for o in range(O):
        for i in range(I):
            scale = float(m.scale[o // block[0], i // block[1]])
            assert w[o, i] == float(E4M3[bits[o, i]]) * scale  # exact: 28 bits fit in float64
    np.testing.assert_array_equal(dequantize(m), w.astype(np.float32))
    np.testing.assert_array_equal(
        dequantize(m, rounded=("fp8",)), matrix.round_bf16(w.astype(np.float32))
    )


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_packing_to_fp8_takes_the_nearest_code(seed, O, I):
    w = np.random.default_rng(seed).standard_normal((O, I))
    m = Fp8Block(*pack_fp8(w, (8, 8)), (8, 8))
    scale = np.repeat(np.repeat(m.scale, 8, axis=0)[:O], 8, axis=1)[:, :I].astype(np.float64)
    every = E4M3[np.isfinite(E4M3)].astype(np.float64)
    best = np.abs(w[..., None] - every * scale[..., None]).min(axis=-1)
    assert (np.abs(dequantize(m, np.float64) - w) <= best * (1 + 1e-12)).all()


@given(seeds, st.integers(1, 30))
def test_tiles_of_fp8_end_at_blocks(seed, elements):
    w = np.random.default_rng(seed).standard_normal((21, 10))
    m = Fp8Block(*pack_fp8(w, (4, 3)), (4, 3))
    parts = [dequantize(tile) for _, tile in tiles(m, elements)]
    np.testing.assert_array_equal(np.concatenate(parts), dequantize(m))
    assert all(block.start % 4 == 0 for block, _ in tiles(m, elements))
    with pytest.raises(ValueError, match="do not begin at a block"):
        rows(m, slice(2, 4))


def test_fp8_differs_from_its_source_by_its_rounding(tmp_path):
    write_random(tmp_path / "fp8", "fp8", seed=5)
    checkpoint = Checkpoint.open(tmp_path / "fp8")
    m = checkpoint.matrix("model.layers.0.self_attn.kv_a_proj_with_mqa")
    assert isinstance(m, Fp8Block)
    assert m.scale.shape == (1, 1)
    assert not isinstance(checkpoint.matrix("lm_head"), Fp8Block)
    assert not isinstance(checkpoint.matrix("model.layers.1.mlp.gate"), Fp8Block)
    x = np.random.default_rng(0).standard_normal((2, m.shape[1])).astype(np.float32)
    wide = dequantize(m, np.float64)
    bound = gamma(m.shape[1] + 2, np.float32) * (np.abs(x).astype(np.float64) @ np.abs(wide).T)
    assert (np.abs(matrix.linear(x, m) - x.astype(np.float64) @ wide.T) <= bound).all()


# --- layouts


def test_every_member_opens_whole(member):
    _, folder = member
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.missing == []
    assert checkpoint.unread == []
    assert checkpoint.stray == []
    assert checkpoint.warnings == []
    logits = refmoe.load(folder).logits([1, 2, 3])
    assert np.isfinite(logits).all()


def test_members_have_their_published_names_dtypes_and_shards(member):
    name, folder = member
    checkpoint = Checkpoint.open(folder)
    stored = {t.name: t for t in checkpoint.tensors.values()}
    files = sorted({t.file.name for t in stored.values()})
    prefix = "language_model." if name in ("k2.5", "k2.6") else ""
    expert = stored_at(stored, prefix + "model.layers.{}.mlp.experts.0.down_proj.", checkpoint.cfg)
    dtypes = {key.rpartition(".")[2]: t.dtype for key, t in expert.items()}
    if name in ("k2-thinking", "k2.5", "k2.6"):
        assert dtypes == {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I32"}
        assert files[0].startswith("model-00001-of-0000")
    elif name == "moonlight":
        assert dtypes == {"weight": "BF16"}
        assert prefix + "model.layers.0.self_attn.q_proj.weight" in stored
    else:
        assert dtypes == {"weight": "F8_E4M3", "weight_scale_inv": "F32"}
        assert find_scheme(checkpoint.cfg.quantization, "fp8") == Fp8Scheme()
    if name == "k2-instruct":
        assert files == [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
        assert stored["model.layers.1.self_attn.rotary_emb.inv_freq"].shape == (56,)
    vision = [n for n in stored if n.startswith(("vision_tower.", "mm_projector."))]
    assert bool(vision) == (name in ("k2.5", "k2.6"))
    bias = stored_at(stored, prefix + "model.layers.{}.mlp.gate.e_score", checkpoint.cfg)
    assert {t.dtype for t in bias.values()} == {"F32"}


def stored_at(stored, pattern, cfg):  # type: ignore[no-untyped-def]
    at = pattern.format(cfg.num_hidden_layers - 1)
    return {n: t for n, t in stored.items() if n.startswith(at)}


def test_deepseeks_scale_may_be_in_another_shard_than_its_weight(tmp_path):
    write_member(tmp_path / "v3", "deepseek-v3", seed=1)
    tensors = Checkpoint.open(tmp_path / "v3").tensors
    apart = [
        n
        for n in tensors
        if n.endswith("_scale_inv")
        and tensors[n].file != tensors[n.removesuffix("_scale_inv")].file
    ]
    assert apart
    mtp = [n for n in tensors if n.startswith("model.layers.4.")]
    assert "model.layers.4.eh_proj.weight" in mtp


@pytest.mark.parametrize(
    ("wrapper", "head"),
    [
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("language_model.", "lm_head."),
    ],
)
def test_every_prefix_is_the_same_model(tmp_path, random_int4, wrapper, head):
    plain = refmoe.load(random_int4)
    # the names alone are other ones: rename in headers and index
    for file in random_int4.iterdir():
        raw = file.read_bytes()
        if file.suffix == ".safetensors":
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            header = {rename(n, wrapper, head): v for n, v in header.items()}
            text = json.dumps(header).encode()
            raw = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        elif file.name.endswith("index.json"):
            index = json.loads(raw)
            index["weight_map"] = {
                rename(n, wrapper, head): f for n, f in index["weight_map"].items()
            }
            raw = json.dumps(index).encode()
        (tmp_path / file.name).write_bytes(raw)
    wrapped = refmoe.load(tmp_path)
    assert wrapped.checkpoint.tensors["lm_head.weight"].name == head + "weight"
    np.testing.assert_array_equal(wrapped.logits([4, 5, 6]), plain.logits([4, 5, 6]))


def rename(name: str, wrapper: str, head: str) -> str:
    if name.startswith("lm_head."):
        return head + name.removeprefix("lm_head.")
    return wrapper + name.removeprefix("model.") if name.startswith("model.") else name


def test_one_tensor_under_two_names_is_refused(tmp_path):
    a, b = ({n: np.zeros(3, np.float32)} for n in ("lm_head.x", "language_model.lm_head.x"))
    safetensors.numpy.save_file(a, tmp_path / "a.safetensors")
    safetensors.numpy.save_file(b, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    with pytest.raises(InputError, match=r"language_model\.lm_head\.x of .*b.* is lm_head\.x"):
        Checkpoint.open(tmp_path)


def test_names_are_canonical_whatever_wrapped_them():
    for name in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert canonical(name) == "model.norm.weight"
    assert canonical("vision_tower.x") == "vision_tower.x"


# --- configs


def test_every_published_config_parses_its_text_fields(kimi):
    files = [p for p in (kimi / "configs").glob("*_config.json") if "tokenizer" not in p.name]
    parsed = 0
    for file in sorted(files):
        if "quant_config" in file.name or "generation" in file.name:
            continue
        if "K3" in file.name:
            with pytest.raises(InputError, match="'kimi_linear' in text_config"):
                Config.load(file)
            continue
        cfg = Config.load(file)
        assert (cfg.hidden_size, cfg.n_routed_experts, cfg.num_experts_per_tok) == (7168, 384, 8)
        if "NVFP4" in file.name:
            assert "modelopt" in (unknown_method(cfg.quantization) or "")
        parsed += 1
    assert parsed == 6


def test_published_shapes_hold_for_k2_instruct(kimi):
    """139,644 tensors as listed: 61 layers with a left-over inv_freq each."""
    cfg = Config.load(kimi / "configs" / "k2-instruct_config.json")
    shapes = {name: shape for name, shape, _ in expected(cfg)}
    assert len(shapes) + 61 == 139_644
    a = "model.layers.0.self_attn."
    assert shapes[a + "kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert shapes[a + "q_b_proj.weight"] == (12288, 1536)
    assert shapes["model.layers.60.mlp.experts.383.down_proj.weight_scale_inv"] == (56, 16)


def test_nvfp4_is_refused_when_weights_are_opened(tmp_path, random_bf16):
    raw = json.loads((random_bf16 / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert unknown_method(read_config(tmp_path).quantization) == "modelopt"
    with pytest.raises(InputError, match="quant_method = 'modelopt' is not supported"):
        refmoe.load(tmp_path)


def test_an_unknown_member_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no member 'k9'; known: k2-instruct"):
        write_member(tmp_path / "x", "k9")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fmt": "e5m2"}, "fmt = 'e5m2'"),
        ({"weight_block_size": None}, "weight_block_size = None"),
        ({"weight_block_size": [128, 0]}, "whole number from 1"),
    ],
)
def test_another_fp8_is_refused_by_field(change, says):
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    with pytest.raises(InputError, match=says):
        announced_formats(
            Config.from_dict({**SHAPE, "quantization_config": {**fp8, **change}}).quantization
        )
