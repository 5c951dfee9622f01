"""Lint: every planted defect is found under the right name, and healthy checkpoints have none."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import TensorSpec, serialize_file

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.lint.base import Finding, as_json
from refmoe.lint.diff import weights
from refmoe.lint.facts import names
from refmoe.lint.facts import tensors as tensor_facts
from refmoe.lint.facts.router import share_of_flips
from refmoe.lint.lint import lint, lint_against
from refmoe.lint.matrices import keys_of, matrix_of
from refmoe.model.decoder import policy
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import bf16_bits, dequantize, widen_bf16
from refmoe.model.router import GateWeights, route
from refmoe.weights.checkpoint import INDEX, Checkpoint, read_header
from refmoe.weights.synthetic import members
from refmoe.weights.synthetic.members import MEMBERS, write_member
from refmoe.weights.synthetic.random import FORMATS, Tensors, write, write_random

SPELLED = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F8_E4M3": "float8_e4m3fn",
}
E = "model.layers.1.mlp.experts.3."
GATE = "model.layers.2.mlp.gate."
BIAS = GATE + "e_score_correction_bias"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lint") / "k2-thinking"
    write_member(folder, "k2-thinking", seed=3)
    return folder


@pytest.fixture(scope="module")
def instruct(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lint") / "k2-instruct"
    write_member(folder, "k2-instruct", seed=3)
    return folder


@pytest.fixture
def int4(thinking: Path, tmp_path: Path) -> Path:
    """One to be spoiled; its shards have an index."""
    return Path(shutil.copytree(thinking, tmp_path / "int4"))


@pytest.fixture
def fp8(instruct: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(instruct, tmp_path / "fp8"))


def read(folder: Path, name: str) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    return np.array(checkpoint.array(name))


def edit(folder: Path, **new: np.ndarray | tuple[str, np.ndarray] | None) -> None:
    """Tensors replaced (another dtype: a pair), removed (None) or, if unknown, added."""
    index = json.loads((folder / INDEX).read_text())
    for name in new.keys() - index["weight_map"]:
        index["weight_map"][name] = sorted(folder.glob("*.safetensors"))[0].name
    for file in sorted(folder.glob("*.safetensors")):
        stored = read_header(file)
        checkpoint = Checkpoint(folder, None, stored)  # type: ignore[arg-type]
        tensors = {n: (SPELLED[t.dtype], np.array(checkpoint.array(n))) for n, t in stored.items()}
        for name, value in new.items():
            if index["weight_map"].get(name) != file.name:
                continue
            if value is None:
                del tensors[name], index["weight_map"][name]
            else:
                tensors[name] = value if isinstance(value, tuple) else (tensors[name][0], value)
        file.unlink()
        save(file, tensors)
    (folder / INDEX).write_text(json.dumps(index))


def save(file: Path, tensors: Tensors) -> None:
    tensors = {n: (dtype, np.ascontiguousarray(x)) for n, (dtype, x) in tensors.items()}
    specs = {
        n: TensorSpec(dtype=dtype, shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
        for n, (dtype, x) in tensors.items()
    }
    serialize_file(specs, file, {"format": "pt"})


def spoil(folder: Path, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """A tensor changed in place."""
    x = read(folder, name)
    change(x)
    edit(folder, **{name: x})


def edit_json(file: Path, **changes: Any) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**raw, **changes}))


def errors(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.level == "error"]


def only(findings: list[Finding], level: str, tensor: str | None, text: str) -> None:
    """Exactly one finding of this level, on this tensor, that says this."""
    found = [f for f in findings if f.level == level and f.text[:4] != "llam"]
    assert [f.tensor for f in found] == [tensor], found
    assert re.search(text, found[0].text), found


def says(findings: list[Finding], level: str, text: str) -> Finding:
    found = [f for f in findings if f.level == level and re.search(text, f.text)]
    assert len(found) == 1, findings
    return found[0]


# --- healthy


def test_the_embedded_model_is_healthy(tiny_k2):
    """Its betas are 1/1, which llama.cpp does not read; all else is as it should be."""
    findings = lint(tiny_k2)
    assert [f.text[:9] for f in findings if f.level != "note"] == ["llama.cpp"]
    assert says(findings, "note", "-8 in 0 of 11,796,480 codes.*a repack.* is exact").tensor is None
    assert as_json(findings)["ok"]


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_member_is_healthy(tmp_path, name):
    write_member(tmp_path / "m", name, seed=7)
    findings = lint(tmp_path / "m")
    assert errors(findings) == []
    warned = {f.text.split()[0] for f in findings if f.level == "warning"}
    # published eos is [EOS] in these two, and generation_config.json is not written here
    turn = {"<|im_end|>"} if name in ("k2-instruct", "k2.5") else set()
    betas = {"llama.cpp's"} if name in ("k2-instruct", "k2-thinking") else set()
    assert warned == turn | betas


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_healthy(tmp_path, format):
    write_random(tmp_path / "m", format, seed=7)
    assert errors(lint(tmp_path / "m")) == []


def test_json_says_level_tensor_text_and_rule():
    findings = [Finding("warning", None, "a", "yarn-betas"), Finding("error", "x", "b", "shard-x")]
    document = as_json(findings)
    wanted = {"level": "error", "tensor": "x", "text": "b", "rule": "shard-x"}
    assert document["findings"][1] == wanted
    assert not document["ok"]


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        lint(tmp_path / "x")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        lint(tmp_path)


# --- config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with K2.5's published config.json, and nothing else."""
    shutil.copy(members.HERE / "k2.5.json", tmp_path / "config.json")
    return tmp_path


def edit_text(folder: Path, key: str, value: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    place, _, inner = key.rpartition(".")
    (raw["text_config"][place] if place else raw["text_config"])[inner] = value
    (folder / "config.json").write_text(json.dumps(raw))


def about_config(folder: Path) -> list[Finding]:
    return [f for f in lint(folder) if "no *.safetensors" not in f.text]


def test_published_configs_are_recognised(kimi, tmp_path):
    wanted = {
        "k2-instruct_config.json": "k2-instruct",
        "moonshotai--Kimi-K2.5_config.json": "k2.5",
        "nvidia--Kimi-K2.7-Code-NVFP4_config.json": "k2.6 or k2.7-code",
        "config.json": "k2.6 or k2.7-code",
    }
    for file in (*sorted((kimi / "configs").glob("*_config.json")), kimi / "k2.6" / "config.json"):
        if file.name not in wanted:
            continue
        shutil.copy(file, tmp_path / "config.json")
        found = [f for f in about_config(tmp_path) if "cannot be read here" not in f.text]
        assert errors(found) == []
        says(found, "note", f"nearest published member is {wanted[file.name]}$")


def test_k2_instruct_was_published_with_two_eos(kimi, tmp_path):
    shutil.copy(kimi / "configs" / "k2-instruct_config.json", tmp_path / "config.json")
    generation = kimi / "configs" / "k2-instruct_generation_config.json"
    shutil.copy(generation, tmp_path / "generation_config.json")
    says(about_config(tmp_path), "warning", r"eos.*\[163585\], generation_config\.json \[163586\]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", 2.872),
        ("num_experts_per_tok", 6),
        ("norm_topk_prob", False),
        ("n_group", 8),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 10000.0),
        ("rope_scaling.factor", 40.0),
        ("rope_scaling.beta_slow", 2.0),
        ("rope_scaling.mscale", 0.707),
        ("rope_scaling.original_max_position_embeddings", 8192),
    ],
)
def test_a_constant_that_departs_is_named(config, key, value):
    edit_text(config, key, value)
    assert (
        says(about_config(config), "error", rf"^{key} = {value!r}, published .* has").tensor is None
    )


def test_a_beta_of_another_member_makes_it_that_member_but_for_its_ids(config):
    """beta_fast 1 is K2-Thinking's, with which the vocabulary's end does not agree."""
    edit_text(config, "rope_scaling.beta_fast", 1.0)
    findings = about_config(config)
    assert errors(findings) == []
    says(findings, "note", "nearest published member is k2-thinking")
    says(findings, "warning", "eos_token_id = 163585, published k2-thinking has 163586")


def test_a_refused_config_is_one_error_with_its_field(config):
    edit_text(config, "scoring_func", "softmax")
    found = errors(about_config(config))
    assert [re.findall("scoring_func = 'softmax'", f.text) for f in found] == [
        ["scoring_func = 'softmax'"]
    ] * 2


@pytest.mark.parametrize("value", [[], "x", {"rope_scaling": 3}, {"quantization_config": [1]}, 7])
def test_a_nonsense_config_is_an_error(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": value or 3, "x": 1}))
    assert errors(lint(tmp_path))


def test_a_model_with_fewer_layers_is_recognised_as_derived(config):
    edit_text(config, "num_hidden_layers", 2)
    edit_text(config, "routed_scaling_factor", 2.872)
    findings = about_config(config)
    assert errors(findings) == []
    says(findings, "note", "shape but for 1 fields; nearest published member is k2.5")
    says(findings, "warning", "num_hidden_layers = 2, published k2.5 has 61")
    says(findings, "warning", r"routed_scaling_factor = 2\.872")


def test_0905_is_k2_instruct_with_another_context(tmp_path):
    raw = json.loads((members.HERE / "k2-instruct.json").read_text())
    raw["rope_scaling"]["factor"], raw["max_position_embeddings"] = 64.0, 262144
    (tmp_path / "config.json").write_text(json.dumps(raw))
    findings = about_config(tmp_path)
    says(findings, "note", "member is k2-instruct-0905$")
    assert errors(findings) == []


def test_another_storage_is_no_fault(config):
    edit_text(config, "quantization_config", None)
    findings = about_config(config)
    assert errors(findings) == []
    says(findings, "note", "quantization = 'none', published k2.5 has 'compressed-tensors'")


def test_ids_that_end_a_turn(int4):
    edit_json(int4 / "generation_config.json", eos_token_id=[275])
    found = [f.text for f in lint(int4) if f.level == "warning" and "eos" in f.text]
    assert len(found) == 1
    assert "config.json [276], generation_config.json [275]" in found[0]
    (int4 / "generation_config.json").unlink()
    edit_json(int4 / "config.json", eos_token_id=275)
    says(lint(int4), "warning", r"<\|im_end\|> is 276 and in no eos_token_id \(\[275\]\)")
    edit_json(int4 / "config.json", eos_token_id=[276, 5300])
    says(lint(int4), "error", "eos_token_id 5300 is outside the vocabulary of 530")
    edit_json(int4 / "config.json", eos_token_id=276)
    words = json.loads((int4 / "tokenizer_config.json").read_text())
    words["added_tokens_decoder"]["530"] = {"content": "<late>"}
    (int4 / "tokenizer_config.json").write_text(json.dumps(words))
    says(lint(int4), "warning", "special token <late> has id 530, vocab_size is 530")


# --- YaRN


def test_yarn_numbers_are_those_of_the_published_table(tmp_path, config):
    """Ramps, softmax scales and inv_freq as published engines have them for these configs."""
    (tmp_path / "i").mkdir()
    shutil.copy(members.HERE / "k2-instruct.json", tmp_path / "i" / "config.json")
    raw = json.loads((tmp_path / "i" / "config.json").read_text())
    findings = about_config(tmp_path / "i")
    says(findings, "note", r"YaRN in vLLM: ramp 19 to 20, softmax scale 0\.130861, cos and sin x1 ")
    says(findings, "note", r"in DeepSeek: .*0\.130861 \(0\.072169 if not more than 4096 positions")
    says(findings, "note", r"in llama\.cpp: ramp 8 to 20, softmax scale 0\.130861")
    says(findings, "warning", r"32, 1 for 1, 1: 11 of 32 .* number 19 by x8\.93 ")
    edit_json(tmp_path / "i" / "config.json", rope_scaling={**raw["rope_scaling"], "factor": 64})
    says(about_config(tmp_path / "i"), "warning", r"11 of 32 .* number 19 by x10\.2 ")
    findings = about_config(config)
    says(findings, "note", r"YaRN in SGLang: ramp 8 to 20, softmax scale 0\.144680")
    assert [f for f in findings if f.level == "warning"] == []


def test_yarn_that_engines_read_otherwise_is_warned_of(int4):
    raw = json.loads((int4 / "config.json").read_text())
    rope = {**raw["rope_scaling"], "mscale": 0.5}
    edit_json(int4 / "config.json", rope_scaling=rope, max_position_embeddings=1 << 20)
    findings = lint(int4)
    says(findings, "warning", r"llama\.cpp: GGUF has no key for mscale; .* factor 0\.853")
    says(findings, "warning", r"= 256, factor is 64: .*transformers#40320")
    edit_json(int4 / "config.json", rope_scaling=None, rope_parameters=raw["rope_scaling"])
    raw = json.loads((int4 / "config.json").read_text())
    del raw["rope_scaling"]
    (int4 / "config.json").write_text(json.dumps(raw))
    says(lint(int4), "note", "rope_parameters alone")


# --- tensors


def test_missing_unread_and_misshapen_tensors_are_named(int4):
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    edit(
        int4,
        **{
            up: None,
            "model.layers.0.mlp.up.weight": ("float32", np.ones((3, 5), np.float32)),
            down: read(int4, down).T,
            norm: ("int32", np.ones(96, np.int32)),
        },
    )
    findings = lint(int4)
    assert {(f.tensor, f.text) for f in errors(findings)} == {
        (up, "missing: config.json calls for it, and it is in no file"),
        (down, "shape [160, 96], config.json makes it [96, 160]: transposed"),
        (norm, "dtype I32, expected BF16 or F16 or F32 or F64"),
    }
    assert says(findings, "warning", "never read").tensor == "model.layers.0.mlp.up.weight"


def test_a_tensor_in_two_shards(int4):
    name = "model.layers.0.mlp.up_proj.weight"
    value = read(int4, name)
    save(int4 / "more.safetensors", {name: ("bfloat16", value)})
    findings = lint(int4)
    assert errors(findings) == []
    assert says(findings, "warning", r"more\.safetensors and.*the same bytes").tensor == name
    says(findings, "warning", r"in more\.safetensors, .* says model-00001-of")
    value[0, 0] ^= 1
    save(int4 / "more.safetensors", {name: ("bfloat16", value)})
    assert says(lint(int4), "error", "different values, the last one read").tensor == name
    (int4 / INDEX).unlink()  # then both count, and refmoe refuses the checkpoint
    assert says(lint(int4), "error", "in two|and, as").tensor == name


def test_damaged_shards_are_named(int4):
    first, second, *_ = sorted(int4.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    index = json.loads((int4 / INDEX).read_text())
    outside = "../outside.safetensors"
    (int4.parent / "outside.safetensors").write_bytes(b"not to be read")
    index["weight_map"] |= {"lm_head.weight": outside, "model.norm.weight": "absent"}
    (int4 / INDEX).write_text(json.dumps(index))
    findings = lint(int4)
    says(findings, "error", rf"{first.name}: the header describes .* truncated")
    says(findings, "error", rf"shard '{second.name}' of .* is not in the folder; \d+ tensors")
    says(findings, "error", rf"shard '{outside}' of")
    says(findings, "error", r"tensor-missing: [\d,]+ more such findings")


def test_of_very_many_the_worst_are_listed(int4):
    for e in range(8):
        name = f"model.layers.1.mlp.experts.{e}.up_proj.weight_scale"
        spoil(int4, name, lambda x, e=e: x.reshape(-1).__setitem__(slice(0, 9 - e), 0x7FC0))
    found = errors(lint(int4))
    assert [f.tensor and f.tensor.split(".")[5] for f in found] == [*"01234", None]
    assert found[0].text == "9 values that are not finite, first at [0, 0]"
    assert found[-1].text == "tensor-nonfinite: 3 more such findings"


# --- values


@pytest.mark.parametrize(
    ("name", "at", "bits"),
    [
        ("model.embed_tokens.weight", (7, 5), 0x7F80),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", (3,), 0xFFC1),
        (BIAS, (2,), np.nan),
        (E + "down_proj.weight_scale", (95, 0), 0xFF80),
    ],
)
def test_the_first_number_that_is_not_finite_is_named(int4, monkeypatch, name, at, bits):
    monkeypatch.setattr(tensor_facts, "TILE", 100)  # many pieces
    spoil(int4, name, lambda x: x.__setitem__(at, bits))
    only(
        lint(int4),
        "error",
        name,
        rf"^1 values that are not finite, first at {re.escape(str(list(at)))}$",
    )


def test_non_finite_numbers_are_found_where_nothing_reads_them(tmp_path):
    write_member(tmp_path / "v", "k2.6")
    name = "vision_tower.encoder.blocks.0.wo.weight"
    spoil(tmp_path / "v", name, lambda x: x.__setitem__((1, 2), 0x7FFF))
    only(lint(tmp_path / "v"), "error", name, r"first at \[1, 2\]")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "error"),
        ("model.norm.weight", "error"),
        (GATE + "weight", "error"),
        (BIAS, "warning"),
    ],
)
def test_a_tensor_of_zeros_is_named(int4, name, level):
    spoil(int4, name, lambda x: x.fill(0))
    only(lint(int4), level, name, "all zero")


def test_subnormal_numbers_are_other_bytes(int4):
    name = "model.layers.1.self_attn.o_proj.weight"
    spoil(int4, name, lambda x: np.bitwise_and(x, 0x807F, out=x))
    only(lint(int4), "warning", name, "subnormal")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.__setitem__(slice(None), bf16_bits(widen_bf16(x) - 1)), "stored less 1"),
        (lambda x: x.fill(0x3F80), "every gain is 1: the initial value"),
    ],
)
def test_gains_that_no_training_leaves(int4, change, text):
    name = "model.layers.2.post_attention_layernorm.weight"
    spoil(int4, name, change)
    only(lint(int4), "warning", name, text)


def test_a_copy_of_another_tensor_is_named(int4):
    name = E + "up_proj.weight_packed"
    other = "model.layers.2.mlp.experts.7.up_proj.weight_packed"
    edit(int4, **{other: read(int4, name)})
    only(lint(int4), "warning", other, f"the same bytes as {name}")


# --- INT4


@pytest.mark.parametrize(
    ("part", "change", "level", "text"),
    [
        ("weight_packed", lambda x: x.fill(0), "error", r"^96 of 96 groups have every code at -8"),
        ("weight_packed", lambda x: x[3, 4:8].fill(0), "error", r"^1 of 96 groups have every code"),
        ("weight_scale", lambda x: x.__setitem__((0, 1), 0), "error", "^1 of 96 .* a scale of 0"),
        ("weight_scale", lambda x: x.__ior__(0x8000), "error", "^96 of 96 .* negative"),
        ("weight_scale", lambda x: x.__setitem__((0, 1), 0x4780), "warning", "above float16's"),
        ("weight_scale", lambda x: x.__setitem__((0, 1), 0x3401), "warning", "^1 .* in float16"),
        ("weight_shape", lambda x: x.__setitem__(0, 33), "error", r"says \[33, 96\].*\[32, 96\]"),
    ],
)
def test_int4_codes_and_scales(int4, part, change, level, text):
    name = E + "gate_proj." + part
    spoil(int4, name, change)
    findings = lint(int4)
    only(findings, level, name, text)
    rounded = "float16" in text and "above" not in text
    if rounded or "above" in text:
        says(findings, "note", "1 scales change in float16.*a repack is not exact")


def test_a_group_of_zeros_may_have_no_scale(int4):
    """The quantiser's own amax/7 is 0 there; the codes say 0 as well."""
    spoil(int4, E + "gate_proj.weight_packed", lambda x: x.view(np.uint32)[3, 4:8].fill(0x88888888))
    spoil(int4, E + "gate_proj.weight_scale", lambda x: x.__setitem__((3, 1), 0))
    assert errors(lint(int4)) == []


def test_codes_are_counted(int4):
    note = says(lint(int4), "note", "gate_proj: 22 tensors").text
    codes = np.concatenate(
        [
            np.stack([two & 15, two >> 4]).ravel()
            for layer in (1, 2)
            for e in range(11)
            for two in [
                read(int4, f"model.layers.{layer}.mlp.experts.{e}.gate_proj.weight_packed").view(
                    "u1"
                )
            ]
        ]
    )
    assert f"{codes.size:,} codes: -8 none" in note
    assert f"±7 {100 * np.isin(codes, (1, 15)).mean():.2g} %" in note
    assert f"0 {100 * (codes == 8).mean():.2g} %" in note
    spoil(int4, E + "gate_proj.weight_packed", lambda x: x.__setitem__((0, 0), 0x11111110))
    says(lint(int4), "note", "-8 in 1 of")


# --- FP8


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("weight", lambda x: x.__setitem__((140, 7), 0xFF), r"^1 NaN codes, first at \[140, 7\]"),
        ("weight_scale_inv", lambda x: x.__setitem__((1, 1), 0), "^1 of 4 block scales are 0"),
        ("weight_scale_inv", lambda x: np.negative(x, out=x), "^4 of 4 block scales are negative"),
        ("weight_scale_inv", lambda x: x.__setitem__((0, 0), np.inf), "not finite"),
        ("weight_scale_inv", lambda x: np.divide(1, x, out=x), "inverted"),
    ],
)
def test_fp8_codes_and_scales(fp8, part, change, text):
    name = E + "gate_proj." + part
    spoil(fp8, name, change)
    assert says(errors(lint(fp8)), "error", text).tensor == name
    assert len(errors(lint(fp8))) == 1


def test_scales_of_a_wrong_number_of_blocks_are_a_shape(fp8):
    """The partial last block of 576 rows is where they go wrong (ms-swift#6851)."""
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit(fp8, **{name: ("float32", np.ones((1, 2), np.float32))})
    only([f for f in lint(fp8) if "im_end" not in f.text], "error", name, r"^shape \[1, 2\]")


# --- router


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (lambda x: x[4].fill(0), "error", "row 4 is zero"),
        (lambda x: x[4].fill(0x3C00), "error", "row 4 is constant"),
        (lambda x: x.__setitem__(4, x[9]), "warning", "row 9 is row 4 again"),
    ],
)
def test_rows_of_the_gate(int4, change, level, text):
    spoil(int4, GATE + "weight", change)
    only(lint(int4), level, GATE + "weight", text)


def test_a_bias_that_bf16_flattens_is_counted(int4):
    """An offset larger than the differences, as GLM-5's: 238 values became 8 (sglang#31213)."""
    bias = (6 + 0.02 * np.arange(11)).astype(np.float32)  # steps of bf16 from 4 to 8: 1/32
    edit(int4, **{BIAS: bias})
    note = says(lint(int4), "note", "in bf16 11 distinct values become 7, 4 pairs")
    assert note.tensor == BIAS
    share = float(re.findall(r"([\d.]+)% of tokens", note.text)[0]) / 100
    assert share > 0.02
    edit(int4, **{BIAS: ("bfloat16", bf16_bits(bias))})
    warned = says(lint(int4), "warning", "stored as BF16, 7 distinct values for 11 experts")
    assert warned.tensor == BIAS


def test_the_share_of_flips_is_the_routers_own(int4):
    """With directions as random as is supposed, the router itself flips as often."""
    checkpoint = Checkpoint.open(int4)
    cfg = checkpoint.cfg
    rng = np.random.default_rng(0)
    gate = np.linalg.qr(rng.standard_normal((96, 96)))[0][:11]  # rows uncorrelated
    gain = np.abs(widen_bf16(read(int4, "model.layers.2.post_attention_layernorm.weight")))
    edit(int4, **{GATE + "weight": ("float32", (gate / gain).astype(np.float32))})
    bias, other = (rng.standard_normal(11) * s for s in (0.1, 0.1))
    share = share_of_flips(Checkpoint.open(int4), 2, bias, other)
    x = rng.standard_normal((4096, 96)) * gain
    w = (gate / gain).astype(np.float32).astype(np.float64)
    nx = policy("float64")
    sets = [np.sort(route(x, GateWeights(w, b), cfg, nx).experts) for b in (bias, other)]
    mine = (sets[0] != sets[1]).any(axis=1).mean()
    # five standard errors of the difference of two shares
    assert abs(share - mine) < 5 * np.sqrt(mine * (1 - mine) * (1 / 2048 + 1 / 4096))
    assert share_of_flips(Checkpoint.open(int4), 2, bias, bias) == 0


# --- two checkpoints


def twin(source: Path, target: Path, dtype: str) -> None:
    """The same model with every quantised matrix written out in full."""
    checkpoint = Checkpoint.open(source)
    raw = {k: v for k, v in json.loads((source / "config.json").read_text()).items()}
    raw.pop("quantization_config", None)
    tensors: Tensors = {}
    for key in keys_of(checkpoint):
        name = checkpoint.tensors[key].name if key in checkpoint.tensors else key
        m = matrix_of(checkpoint, key)
        if isinstance(m, Int4 | Fp8Block):
            w = dequantize(m, np.float64)
            tensors[name] = (dtype, bf16_bits(w) if dtype == "bfloat16" else w.astype(dtype))
        else:
            tensors[name] = (
                SPELLED[checkpoint.tensors[key].dtype],
                np.array(checkpoint.array(key)),
            )
    write(target, raw, {"model.safetensors": tensors})


def notes(findings: list[Finding], start: str) -> list[str]:
    return [f.text for f in findings if f.level == "note" and f.text.startswith(start)]


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_a_checkpoint_is_itself(tmp_path, name):
    write_member(tmp_path / "m", name, seed=7)
    findings = lint_against(tmp_path / "m", tmp_path / "m")
    assert {f.level for f in findings} == {"note"}
    assert all(f.text.startswith("the same bits: ") for f in findings)


def test_int4_written_out_exactly_is_the_same(thinking, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TILE", 1000)
    twin(thinking, tmp_path / "f32", "float32")
    findings = lint_against(thinking, tmp_path / "f32")
    assert errors(findings) == []
    assert notes(findings, "the same values") == [
        "the same values: 66 of routed experts, INT4 and F32"
    ]
    back = lint_against(tmp_path / "f32", thinking)
    assert notes(back, "the same values") == ["the same values: 66 of routed experts, F32 and INT4"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_int4_written_out_with_rounding_is_equal_but_for_it(thinking, tmp_path, dtype, kind):
    """float16 has the 11 significant bits the product needs; bf16 has 8 (k2-facts 3.1)."""
    twin(thinking, tmp_path / "out", dtype)
    findings = lint_against(thinking, tmp_path / "out")
    assert errors(findings) == []
    start = "the same values" if dtype == "float16" else "equal but for rounding"
    (text,) = notes(findings, start)
    assert text.startswith(f"{start}: 66 of routed experts, INT4 and {kind}")


def test_fp8_written_out_is_equal_but_for_rounding(instruct, tmp_path):
    twin(instruct, tmp_path / "out", "bfloat16")
    findings = lint_against(instruct, tmp_path / "out")
    assert errors(findings) == []
    assert any("66 of routed experts, FP8 and BF16" in t for t in notes(findings, "equal but"))


@pytest.mark.parametrize(("format", "kind"), [("int4", "INT4"), ("fp8", "FP8")])
def test_the_weights_before_quantisation_are_within_a_step(tmp_path, format, kind):
    """The same draw in both formats, quantised to nearest."""
    write_random(tmp_path / "q", format, seed=5)
    write_random(tmp_path / "f", "f32", seed=5)
    findings = lint_against(tmp_path / "q", tmp_path / "f")
    assert errors(findings) == []
    (text,) = [t for t in notes(findings, "within a quantisation step") if "routed" in t]
    assert f"66 of routed experts, {kind} and F32, relative error up to 0.0" in text.replace(
        "up to 0.1", "up to 0.0"
    )


def test_a_rounded_bias_is_warned_of(thinking, int4):
    edit(int4, **{BIAS: ("bfloat16", bf16_bits(read(int4, BIAS)))})
    findings = lint_against(thinking, int4)
    assert errors(findings) == []
    only(findings, "warning", BIAS, r"rounded to BF16: 11 distinct .*% of tokens")


def rope_to_halves(cfg: Config, w: np.ndarray, heads: int) -> np.ndarray:
    w = w.reshape(heads, -1, w.shape[-1]).copy()
    R = cfg.qk_rope_head_dim
    w[:, -R:] = np.concatenate((w[:, -R::2], w[:, -R + 1 :: 2]), axis=1)
    return w.reshape(-1, w.shape[-1])


def nibbles(packed: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Codes [O, I/8, 8], lowest first, changed and packed again."""
    n = packed.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    n = change(n).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(n, axis=-1).view(np.int32)


Q_B, KV_A = (f"model.layers.1.self_attn.{m}.weight" for m in ("q_b_proj", "kv_a_proj_with_mqa"))
CFG = Config.from_dict(members.reduced(MEMBERS["k2-thinking"]))


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        (Q_B, lambda w: rope_to_halves(CFG, w, 5), "rotated channels permuted from pairs to"),
        (KV_A, lambda w: rope_to_halves(CFG, w, 1), "rotated channels permuted from pairs to"),
        ("lm_head.weight", lambda w: np.roll(w, 265, axis=0), "halves of its rows swapped"),
        (
            "lm_head.weight",
            lambda w: bf16_bits(widen_bf16(w) * np.float32(2.5)),
            r"relative error 1\.5: the right one times 2\.5$",
        ),
        ("model.norm.weight", lambda w: bf16_bits(widen_bf16(w) - 1), "the right one plus -1"),
        ("model.embed_tokens.weight", lambda w: w[::-1], "relative error 1.*no simple cause"),
        (E + "up_proj.weight_scale", lambda s: s + 0x80, "the right one times 2"),
        (
            E + "up_proj.weight_packed",
            lambda p: nibbles(p, lambda n: n[..., ::-1]),
            "nibbles read from the highest",
        ),
        (
            E + "up_proj.weight_packed",
            lambda p: nibbles(p, lambda n: n[..., [1, 0, 3, 2, 5, 4, 7, 6]]),
            "nibbles swapped in each byte",
        ),
        (E + "up_proj.weight_packed", lambda p: p.byteswap(), "bytes of each word reversed"),
        (
            E + "up_proj.weight_packed",
            lambda p: nibbles(p, lambda n: n ^ 8),
            "two's complement",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_cause(thinking, int4, part, change, text):
    edit(int4, **{part: change(read(int4, part))})
    name = re.sub("_(packed|scale)$", "", part)
    only(lint_against(thinking, int4), "error", name, text)


SCALES = E + "up_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w, s: w + s, "codes read with an offset of 7 instead of 8"),
        (lambda w, s: np.where(w < 0, w + 8 * s, w - 8 * s), "two's complement"),
        (lambda w, s: 1.01 * w, "the right one times 1.01"),
        (lambda w, s: w.T, r"shape \[96, 32\] for \[32, 96\]: transposed"),
        (lambda w, s: w[:, np.arange(96) ^ 1], "nibbles swapped in each byte"),
        (lambda w, s: q4_0(w), "nibbles in Q4_0's order"),
        (lambda w, s: 0 * w, "relative error 1: all zero"),
        (lambda w, s: w[:31], r"shape \[31, 96\] for \[32, 96\]: no simple cause"),
        (lambda w, s: np.where(w == w.max(), np.nan, w), "no simple cause"),
    ],
)
def test_a_wrongly_unpacked_tensor_is_named_with_its_cause(thinking, tmp_path, change, text):
    """What an engine holds after loading: the packed tensor unpacked by a wrong rule."""
    twin(thinking, tmp_path / "f32", "float32")
    scale = np.repeat(widen_bf16(read(thinking, SCALES)), 32, axis=1)
    name = E + "up_proj.weight"
    replace_single(tmp_path / "f32", name, lambda w: change(w, scale))
    only(lint_against(thinking, tmp_path / "f32"), "error", name, text)
    back = errors(lint_against(tmp_path / "f32", thinking))  # seen from the other side: wrong too
    assert [f.tensor for f in back] == [name]


def q4_0(w: np.ndarray) -> np.ndarray:
    """Element j beside element j + 16, of each 32."""
    return w.reshape(len(w), -1, 2, 16).swapaxes(2, 3).reshape(w.shape)


def replace_single(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = folder / "model.safetensors"
    stored = read_header(file)
    checkpoint = Checkpoint(folder, None, stored)  # type: ignore[arg-type]
    tensors = {n: (SPELLED[t.dtype], np.array(checkpoint.array(n))) for n, t in stored.items()}
    dtype, value = tensors[name]
    file.unlink()
    save(file, {**tensors, name: (dtype, np.asarray(change(value), value.dtype))})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda code, s: code, "its codes without their block scales"),
        (lambda code, s: code / s, "codes divided by weight_scale_inv"),
        (lambda code, s: 1.05 * code * s, "the right one times 1.05$"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_fp8_scales_are_named(instruct, tmp_path, change, text, dtype):
    twin(instruct, tmp_path / "f32", dtype)
    name = E + "up_proj.weight"
    scale = read(instruct, name + "_scale_inv")
    wide = np.repeat(np.repeat(scale, 128, axis=0)[:144], 128, axis=1)[:, :160]
    code = dequantize(matrix_of(Checkpoint.open(instruct), name), np.float64) / wide
    value = change(code, wide)
    value = bf16_bits(value) if dtype == "bfloat16" else value
    replace_single(tmp_path / "f32", name, lambda w: value)
    only(lint_against(instruct, tmp_path / "f32"), "error", name, text)


@pytest.mark.parametrize("folder", ["thinking", "instruct"])
def test_confused_tensors_are_named(folder, request, tmp_path):
    source = request.getfixturevalue(folder)
    other = Path(shutil.copytree(source, tmp_path / "x"))
    parts = ("_packed", "_scale") if folder == "thinking" else ("", "_scale_inv")
    shared = "model.layers.2.mlp.shared_experts."
    taken = "model.layers.1.mlp.experts.8.down_proj.weight"
    new = {E + "down_proj.weight" + part: read(source, taken + part) for part in parts}
    for a, b in (("gate", "up"), ("up", "gate")):
        for part in ("",) if folder == "thinking" else parts:
            new[f"{shared}{a}_proj.weight{part}"] = read(source, f"{shared}{b}_proj.weight{part}")
    edit(other, **new)
    found = {f.tensor: f.text for f in errors(lint_against(source, other))}
    assert set(found) == {
        E + "down_proj.weight",
        shared + "gate_proj.weight",
        shared + "up_proj.weight",
    }
    assert "it is our model.layers.1.mlp.experts.8.down_proj" in found[E + "down_proj.weight"]
    assert "gate and up swapped" in found[shared + "gate_proj.weight"]


def test_two_configs_are_compared_field_by_field(thinking, int4):
    edit_json(int4 / "config.json", routed_scaling_factor=2.872, max_position_embeddings=4096)
    findings = lint_against(thinking, int4)
    only(
        [f for f in findings if f.level == "error"],
        "error",
        None,
        r"^routed_scaling_factor = 2\.872, .* has 2\.827",
    )
    says(findings, "warning", "max_position_embeddings = 4096")


def test_tensors_of_one_side_are_named(thinking, int4):
    name = "model.layers.1.input_layernorm.weight"
    edit(int4, **{name: None, "more": ("float32", np.ones(3, np.float32))})
    findings = lint_against(thinking, int4)
    assert says(findings, "error", "^not in").tensor == name
    assert says(findings, "warning", "^only in").tensor == "more"


def test_a_dump_of_loaded_weights_needs_no_config(thinking, int4):
    (int4 / "config.json").unlink()
    findings = lint_against(thinking, int4)
    assert errors(findings) == []
    says(findings, "note", "has no config.json")


def test_integers_are_compared_by_their_bits(thinking, int4):
    edit(int4, **{"model.norm.weight": ("int32", np.arange(96, dtype=np.int32))})
    only(lint_against(thinking, int4), "error", "model.norm.weight", "not the same bits")


# --- bad files, progress


def test_other_files_that_cannot_be_read_are_findings(int4):
    (int4 / "generation_config.json").write_text("{")
    (int4 / "tokenizer_config.json").write_text("[]")
    (int4 / INDEX).write_text(json.dumps({"weight_map": {"a": 3}}))
    findings = lint(int4)
    for name in ("generation_config.json", "tokenizer_config.json", INDEX):
        says(findings, "error", re.escape(name))
    assert len(errors(findings)) == 3  # without an index every shard counts: nothing is missing


def test_sizes_that_no_tensor_can_have_are_one_error(int4):
    edit_json(int4 / "config.json", hidden_size=90)
    says(lint(int4), "error", "no whole groups of 32")


def test_progress_is_shown_on_a_terminal_alone(thinking, monkeypatch, capsys):
    lint(thinking)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lint(thinking)
    shown = capsys.readouterr()
    assert "B/s" in shown.err
    assert shown.out == ""


# --- what ends an examination early


def test_weights_in_a_format_that_cannot_be_read_end_it_after_the_settings(config):
    edit_text(config, "quantization_config", {"quant_method": "modelopt"})
    found = lint(config)
    (error,) = errors(found)
    assert (error.rule, error.text[:25]) == ("config-format", "quant_method = 'modelopt'")
    assert "yarn-engines" in {f.rule for f in found}


def test_an_end_of_turn_that_is_no_id_is_named(int4):
    edit_json(int4 / "generation_config.json", eos_token_id="[EOS]")
    (found,) = errors(lint(int4))
    assert (found.rule, found.text[:24]) == ("stop-invalid", "eos_token_id = '[EOS]', ")


def test_a_config_of_another_model_is_told_once(int4, monkeypatch):
    """No member has a million tensors; here a limit of three stands for it."""
    monkeypatch.setattr(names, "MISSING_LIMIT", 3)
    edit_json(int4 / "config.json", n_routed_experts=400)
    says(lint(int4), "error", r"^config\.json is another model's$")
