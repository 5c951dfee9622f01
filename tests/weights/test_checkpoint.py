"""Files: what is read is what was written, and every broken one is named."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import refmoe
from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.formats.registry import announced_formats
from refmoe.weights.checkpoint import Checkpoint, expected, read_header, summary
from refmoe.weights.synthetic.random import INT4_CONFIG, axes, write_random
from tests.networks import SHAPE


@pytest.fixture
def broken(random_int4: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own to be broken: three shards with an index."""
    return Path(shutil.copytree(random_int4, tmp_path / "broken"))


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_header(file: Path, change) -> None:  # type: ignore[no-untyped-def]
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# --- what is read


def test_our_reader_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)),
        "b": rng.integers(-9, 9, (7,)).astype(np.int8),
        "c": rng.standard_normal((2, 1, 4)).astype(np.float16),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.int64),
        "flag": np.array([True, False, True]),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"any": "thing"})
    stored = read_header(tmp_path / "x.safetensors")
    assert set(stored) == set(arrays)
    checkpoint = Checkpoint(tmp_path, None, stored)  # type: ignore[arg-type]
    for name, value in arrays.items():
        got = checkpoint.array(name)
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)


def test_weights_are_read_only_views_of_the_file(random_int4):
    model = refmoe.load(random_int4)
    packed = model.decoder.experts[1](0).gate_proj.packed
    assert not packed.flags.owndata
    assert not packed.flags.writeable


def test_bf16_bits_are_those_of_the_file(random_bf16):
    checkpoint = Checkpoint.open(random_bf16)
    stored = checkpoint.tensors["lm_head.weight"]
    raw = stored.file.read_bytes()[stored.start : stored.start + stored.nbytes]
    np.testing.assert_array_equal(
        checkpoint.array("lm_head.weight"), np.frombuffer(raw, "<u2").reshape(stored.shape)
    )


@pytest.mark.parametrize("format", ["f16", "f32", "bf16", "int4"])
def test_every_format_computes_the_same_network(tmp_path, format):
    """The same draw in every format: they differ by their own rounding of the weights."""
    write_random(tmp_path / format, format, seed=5)
    write_random(tmp_path / "exact", "f32", seed=5)
    x = refmoe.load(tmp_path / format, "float64").logits([1, 2, 3])
    y = refmoe.load(tmp_path / "exact", "float64").logits([1, 2, 3])
    unit = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "int4": 1 / 7}[format]
    assert np.abs(x - y).max() <= 32 * unit * np.abs(y).max()  # 32 roundings lie on a path
    assert (format == "f32") == bool((x == y).all())


def test_random_checkpoints_have_no_two_axes_alike_and_are_reproducible(tmp_path):
    for part in ("a", "b"):
        write_random(tmp_path / part, "int4", seed=3, shards=2)
    sizes = list(axes(Config.load(tmp_path / "a")).values())
    assert len(set(sizes)) == len(sizes)
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(InputError, match="not empty"):
        write_random(tmp_path / "a", "int4")


def test_the_summary_counts_bytes_and_parameters(random_int4):
    checkpoint = Checkpoint.open(random_int4)
    facts = summary(checkpoint)
    data = sum(
        p.stat().st_size - 8 - struct.unpack("<Q", p.read_bytes()[:8])[0]
        for p in shards(random_int4)
    )
    assert sum(facts["bytes"].values()) == data
    cfg = checkpoint.cfg
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    moe_layers = cfg.num_hidden_layers - 1
    idle = moe_layers * (cfg.n_routed_experts - cfg.num_experts_per_tok) * expert
    idle += (cfg.vocab_size - 1) * cfg.hidden_size
    assert facts["parameters"]["total"] - facts["parameters"]["active"] == idle


def test_a_single_file_and_shards_hold_the_same_model(tmp_path):
    write_random(tmp_path / "one", "int4", seed=4)
    write_random(tmp_path / "many", "int4", seed=4, shards=4)
    one, many = (refmoe.load(tmp_path / name).logits([3, 1, 4]) for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)


def test_several_config_groups_and_the_ignore_list_are_honoured(broken):
    raw = json.loads((broken / "config.json").read_text())["quantization_config"]
    group = raw["config_groups"]["group_0"]
    raw["config_groups"] = {
        "gates": {**group, "targets": [r"re:.*experts\.\d+\.gate_proj"]},
        "rest": {**group, "targets": [r"re:.*experts\.\d+\.(up|down)_proj"]},
    }
    raw["ignore"] = []
    edit_config(broken, quantization_config=raw)
    assert Checkpoint.open(broken).missing == []
    raw["ignore"] = [r"re:.*experts\.0\.gate_proj", "model.layers.1.mlp.experts.1.up_proj"]
    edit_config(broken, quantization_config=raw)
    missing = Checkpoint.open(broken).missing
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" in missing
    assert "model.layers.1.mlp.experts.1.up_proj.weight" in missing
    assert len(missing) == 3
    assert all(".weight_" not in name for name in missing)


# --- what is refused


def test_a_missing_shard_is_named(broken):
    shards(broken)[1].unlink()
    with pytest.raises(
        InputError, match=r"model-00002-of-00003\.safetensors is not there; \d+ tensors"
    ):
        refmoe.load(broken)


@pytest.mark.parametrize("cut", [-1, -1000, 100, 4, 0])
def test_a_truncated_shard_is_named(broken, cut):
    file = shards(broken)[0]
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=f"{file.name}.*truncated"):
        refmoe.load(broken)


def test_an_oversized_header_is_not_read(broken):
    file = shards(broken)[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    with pytest.raises(InputError, match=f"header of {1 << 60} bytes"):
        refmoe.load(broken)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(data_offsets=[0, 8]), "its offsets hold 8"),
        (lambda t: t.update(data_offsets=[-2, 190]), "not counts"),
        (lambda t: t.update(shape=[95]), "190 bytes"),
        (lambda t: t.update(dtype="F4"), "dtype F4"),
        (lambda t: t.pop("shape"), "not that of safetensors"),
    ],
)
def test_a_damaged_header_is_refused(broken, change, says):
    name = "model.layers.0.input_layernorm.weight"
    edit_header(shards(broken)[0], lambda h: change(h[name]))
    with pytest.raises(InputError, match=says):
        refmoe.load(broken)


def test_overlapping_tensors_are_refused(broken):
    def overlap(header):
        norms = [n for n in header if n.endswith("layernorm.weight") and header[n]["shape"] == [96]]
        header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]

    edit_header(shards(broken)[0], overlap)
    with pytest.raises(InputError, match=r"overlapping|a gap"):
        refmoe.load(broken)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../b", ".."])
def test_nothing_outside_the_folder_is_read(broken, shard):
    (broken.parent / "outside.safetensors").write_bytes(shards(broken)[0].read_bytes())
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = shard
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not a file of this folder"):
        refmoe.load(broken)


def test_a_wrong_shape_is_refused_before_any_computation(broken):
    edit_config(broken, kv_lora_rank=46)
    with pytest.raises(InputError, match=r"is \[60, 96\].*makes it \[58, 96\]"):
        refmoe.load(broken)


def test_a_wrong_dtype_is_refused(broken):
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_packed"
    for file in shards(broken):
        if name in read_header(file):
            edit_header(file, lambda h: h[name].update(dtype="U32"))
    with pytest.raises(InputError, match=r"weight_packed is U32, expected I32"):
        refmoe.load(broken)


def test_weight_shape_must_agree_with_what_is_packed(broken):
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_shape"
    for file in shards(broken):
        header = read_header(file)
        if name in header:
            raw = bytearray(file.read_bytes())
            raw[header[name].start] ^= 1
            file.write_bytes(bytes(raw))
    model = refmoe.load(broken)
    with pytest.raises(InputError, match=r"weight_shape says \[33, 96\]"):
        model.decoder.experts[1](0)


def test_missing_unread_and_stray_tensors_are_reported(broken):
    index_file = broken / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    lost = "model.layers.1.mlp.shared_experts.up_proj.weight"
    del index["weight_map"][lost]  # now in a shard, and in no index
    index_file.write_text(json.dumps(index))

    def add(header):
        header["model.layers.0.self_attn.extra"] = header.pop("model.embed_tokens.weight")

    checkpoint = Checkpoint.open(broken)
    assert checkpoint.missing == [lost]
    assert checkpoint.stray == [lost]
    assert any("index.json" in line for line in checkpoint.warnings)
    with pytest.raises(InputError, match=f"1 tensors are missing, first {lost}"):
        refmoe.load(broken)
    index_file.unlink()  # then every shard counts, and nothing is missing
    edit_header(shards(broken)[0], add)
    checkpoint = Checkpoint.open(broken)
    assert checkpoint.missing == ["model.embed_tokens.weight"]
    assert checkpoint.unread == ["model.layers.0.self_attn.extra"]
    assert any("never read" in line for line in checkpoint.warnings)


def test_published_left_overs_are_ignored_by_name(broken):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(56, np.float32),
        "model.layers.3.eh_proj.weight": np.zeros((4, 8), np.float32),
    }
    safetensors.numpy.save_file(extra, broken / "extra.safetensors")
    (broken / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint.open(broken)
    assert checkpoint.unread == []
    assert checkpoint.warnings == []
    assert summary(checkpoint)["bytes"]["other"] == 4 * (56 + 32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "kimi_linear"}, "model_type = 'kimi_linear'.*supported: kimi_k2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "original_max_position_embeddings is missing",
        ),
        ({"hidden_size": -3}, "hidden_size = -3"),
        ({"num_experts_per_tok": 12}, "num_experts_per_tok = 12 of 11"),
        ({"qk_rope_head_dim": 13}, "pairs"),
        ({"n_group": 3}, "n_group = 3 does not divide 11"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'"),
    ],
)
def test_an_unsupported_config_is_refused_by_field(broken, changes, says):
    edit_config(broken, **changes)
    with pytest.raises(InputError, match=says):
        refmoe.load(broken)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_bits", 8), ("symmetric", False), ("group_size", 128), ("actorder", "group")],
)
def test_another_int4_scheme_is_refused_by_field(key, value):
    raw = json.loads(json.dumps(INT4_CONFIG))
    raw["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(InputError, match=rf"group_0\.weights\.{key}"):
        announced_formats(Config.from_dict({**SHAPE, "quantization_config": raw}).quantization)


def test_published_configs_parse(kimi):
    k26 = Config.load(kimi / "k2.6")
    assert (k26.num_hidden_layers, k26.n_routed_experts, k26.rms_norm_eps) == (61, 384, 1e-5)
    assert k26.rope_scaling is not None
    assert k26.rope_scaling.beta_fast == 32.0
    names = [name for name, _, _ in expected(k26)]
    # 208,550 tensors of K2.5 as published, less 335 of vision tower and projector
    assert len(names) == len(set(names)) == 208_550 - 335
    assert sum(name.endswith(".weight_packed") for name in names) == 60 * 384 * 3
    with pytest.raises(InputError, match="kimi_linear"):
        Config.load(kimi / "configs" / "moonshotai--Kimi-K3_config.json")


def test_rope_parameters_are_read_as_rope_scaling_is():
    old = {**SHAPE}
    rope = {**old.pop("rope_scaling"), "rope_theta": old.pop("rope_theta"), "rope_type": "yarn"}
    del rope["type"]
    assert Config.from_dict({**old, "rope_parameters": rope}) == Config.from_dict(SHAPE)
    assert Config.from_dict({"text_config": SHAPE, "model_type": "kimi_k25"}) == Config.from_dict(
        SHAPE
    )
