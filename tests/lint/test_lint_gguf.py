"""Lint of a GGUF, alone and against a folder: faults planted in exports of tiny-k2 are named."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import refmoe
from refmoe.config import Config
from refmoe.lint.diff.report import verify
from refmoe.lint.lint import lint, lint_against
from refmoe.run import export
from refmoe.run.export import to_gguf
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.gguf import read_part
from refmoe.weights.synthetic.members import MEMBERS, write_member
from tests.lint.test_lint import errors, only, says

TINY = refmoe.run.load.golden_folder() / "tiny-k2"
EXPERT = "model.layers.2.mlp.experts.5."
Change = Callable[[np.ndarray], Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lint-gguf")
    for kind in ("q8_0", "bf16", "f32"):
        to_gguf(refmoe.load(), folder / f"{kind}.gguf", dense=kind)
    return {kind: folder / f"{kind}.gguf" for kind in ("q8_0", "bf16", "f32")}


def spoiled(source: Path, out: Path, **changes: Change) -> Path:
    """A copy with tensors changed in place: of plain types numbers, of others bytes of blocks."""
    raw = bytearray(source.read_bytes())
    tensors = read_part(source).tensors
    for name, change in changes.items():
        t = tensors[name]
        size = {"Q4_0": 18, "Q8_0": 34}.get(t.dtype)
        x = np.frombuffer(raw, np.uint8, t.nbytes, t.start)
        if size is None:
            x = x.view({"F32": np.float32, "BF16": np.uint16}[t.dtype]).reshape(t.shape)
        else:
            x = x.reshape(*t.shape[:-1], -1, size)
        change(x)
    out.write_bytes(raw)
    return out


def rewritten(
    source: Path, out: Path, metadata: dict[str, Any] | None = None, **tensors: Any
) -> Path:
    """A copy as the library writes it: metadata and tensors replaced, or (None) left out."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "deepseek2")
    for f in reader.fields.values():
        if f.name.startswith("GGUF.") or f.name == "general.architecture":
            continue
        value = {f.name: f.contents(), **(metadata or {})}[f.name]
        if value is not None:
            writer.add_key_value(f.name, value, f.types[0], *f.types[1:2])
    for t in reader.tensors:
        data, kind = tensors.pop(t.name, (t.data, t.tensor_type)) or (None, None)
        if data is not None:
            writer.add_tensor(t.name, data, raw_dtype=kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# --- one file


def test_a_healthy_export_has_no_findings_of_its_own(files):
    for file in files.values():
        findings = lint(file)
        assert [f.text[:9] for f in findings if f.level != "note"] == ["llama.cpp"]
    says(lint(files["q8_0"]), "note", r"experts\.\*\.up_proj: 120 of Q4_0.*as a repack of INT4")


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_every_member_is_healthy_as_a_gguf(tmp_path, name):
    write_member(tmp_path / "m", name, seed=7)
    made = to_gguf(refmoe.load(tmp_path / "m"), tmp_path / "m.gguf", dense="f32")
    findings = lint(tmp_path / "m.gguf")
    assert made.tensors > 20
    assert errors(findings) == []
    assert {f.text[:9] for f in findings if f.level == "warning"} <= {"llama.cpp", "max_posit"}


PLANTED: dict[str, tuple[str, str, Change, str, str, str]] = {
    "ones": (
        "f32",
        "blk.1.attn_norm.weight",
        lambda x: x.fill(1),
        "warning",
        "model.layers.1.input_layernorm.weight",
        "every gain is 1: the initial value",
    ),
    "less one": (
        "f32",
        "blk.1.ffn_norm.weight",
        lambda x: x.__isub__(np.median(x)),
        "warning",
        "model.layers.1.post_attention_layernorm.weight",
        "gains lie around 0.*stored less 1",
    ),
    "nan": (
        "f32",
        "blk.3.attn_q_b.weight",
        lambda x: x.__setitem__((3, 5), np.nan),
        "error",
        "model.layers.3.self_attn.q_b_proj.weight",
        r"1 values that are not finite, first at \[3, 5\]",
    ),
    "expert twice": (
        "f32",
        "blk.2.ffn_down_exps.weight",
        lambda x: x.__setitem__(5, x[4]),
        "warning",
        f"{EXPERT}down_proj.weight",
        r"same bytes as model\.layers\.2\.mlp\.experts\.4\.down_proj\.weight",
    ),
    "never written": (
        "f32",
        "blk.2.ffn_up_exps.weight",
        lambda x: x[5, 7].fill(0),
        "error",
        f"{EXPERT}up_proj.weight",
        "8 of 1,024 blocks are nothing but zero bytes",
    ),
    "lost scale": (
        "f32",
        "blk.2.ffn_up_exps.weight",
        lambda x: x[5, 7, 1, :2].fill(0),
        "warning",
        f"{EXPERT}up_proj.weight",
        "1 of 1,024 blocks have codes, and a scale of 0",
    ),
    "no codes": (
        "f32",
        "blk.2.ffn_up_exps.weight",
        lambda x: x[5, 7, :, 2:].fill(0),
        "warning",
        f"{EXPERT}up_proj.weight",
        "8 of 1,024 blocks have every code at -8",
    ),
    "infinite scale": (
        "f32",
        "blk.2.ffn_gate_exps.weight",
        lambda x: x[5, 7, 1, :2].__setitem__(slice(None), [0, 0x7C]),
        "error",
        f"{EXPERT}gate_proj.weight",
        "1 scales are not finite",
    ),
    "negative scale": (
        "q8_0",
        "blk.0.attn_q_a.weight",
        lambda x: x[9, 3, 1:2].__ior__(0x80),
        "error",
        "model.layers.0.self_attn.q_a_proj.weight",
        "1 of 1,280 blocks have a negative scale",
    ),
    "all zero": (
        "q8_0",
        "blk.0.attn_q_a.weight",
        lambda x: x.fill(0),
        "error",
        "model.layers.0.self_attn.q_a_proj.weight",
        "every scale is zero",
    ),
    "gate row": (
        "f32",
        "blk.3.ffn_gate_inp.weight",
        lambda x: x[11].fill(0),
        "error",
        "model.layers.3.mlp.gate.weight",
        "row 11 is zero: expert 11 has no gate",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault, files, tmp_path):
    kind, tensor, change, level, name, text = PLANTED[fault]
    findings = lint(spoiled(files[kind], tmp_path / "x.gguf", **{tensor: change}))
    only(findings, level, name, text)
    assert [f for f in errors(findings) if f.tensor != name] == []


def test_a_tensor_of_another_layer_is_a_copy(files, tmp_path):
    t = read_part(files["f32"]).tensors["blk.1.attn_q_b.weight"]
    source = np.frombuffer(files["f32"].read_bytes(), np.float32, t.nbytes // 4, t.start)

    def copied(x: np.ndarray) -> None:
        x[:] = source.reshape(x.shape)

    changed = spoiled(files["f32"], tmp_path / "x.gguf", **{"blk.3.attn_q_b.weight": copied})
    text = r"the same bytes as model\.layers\.1\.self_attn\.q_b_proj"
    only(lint(changed), "warning", "model.layers.3.self_attn.q_b_proj.weight", text)


def test_a_head_that_is_the_embedding_is_no_copy_but_told(files, tmp_path):
    tied = rewritten(files["f32"], tmp_path / "x.gguf", **{"output.weight": None})
    only(lint(tied), "warning", None, "the head is the embedding")


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "Q5_0", "IQ1_M"])
def test_blocks_of_other_types_are_looked_into(kind, files, tmp_path):
    """Random blocks with finite scales; one made infinite. IQ1_M's is spread over its nibbles."""
    which = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[which]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (160, 256 // elements * size), dtype=np.uint8)
    blocks = raw.reshape(-1, size)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    if kind == "IQ1_M":
        blocks[:, 48:] = np.array([0, 0, 0, 0, 0, 0, 0, 0x30], np.uint8)  # 2⁻³, in top nibbles
    else:
        blocks[:, at + 1] &= 0x3B
        if kind in ("Q4_K", "Q2_K"):
            blocks[:, at + 3] &= 0x3B
    name = "model.layers.1.self_attn.q_a_proj.weight"
    made = rewritten(files["f32"], tmp_path / "x.gguf", **{"blk.1.attn_q_a.weight": (raw, which)})
    assert errors(lint(made)) == []
    if kind == "IQ1_M":
        blocks[7, 55] = 0x70
        blocks[7, 53] = 0xC0
    else:
        blocks[7, at : at + 2] = 0, 0x7C
    made = rewritten(files["f32"], tmp_path / "y.gguf", **{"blk.1.attn_q_a.weight": (raw, which)})
    (found,) = errors(lint(made))
    assert (found.tensor, found.text.partition(" ")[2]) == (
        name,
        "values are not finite" if kind == "IQ1_M" else "scales are not finite",
    )


def test_a_type_that_nothing_decodes_is_named(files, tmp_path):
    """The gguf package knows the size of Q8_K, and does not decode it."""
    which = gguf.GGMLQuantizationType.Q8_K
    raw = np.zeros((160, gguf.GGML_QUANT_SIZES[which][1]), np.uint8)
    made = rewritten(files["f32"], tmp_path / "x.gguf", **{"blk.1.attn_q_a.weight": (raw, which)})
    (found,) = errors(lint(made))
    assert found.rule == "gguf-undecodable"
    assert found.tensor == "model.layers.1.self_attn.q_a_proj.weight"
    assert "cannot decode" in found.text


def test_a_truncated_file_is_one_error(files, tmp_path):
    (tmp_path / "x.gguf").write_bytes(files["f32"].read_bytes()[:-1000])
    (found,) = lint(tmp_path / "x.gguf")
    assert (found.level, found.rule) == ("error", "gguf-unreadable")
    assert "truncated or damaged" in found.text


def test_a_vocabulary_that_does_not_fit_is_named(files, tmp_path):
    tokens = read_part(files["f32"]).metadata["tokenizer.ggml.tokens"]
    short = rewritten(files["f32"], tmp_path / "x.gguf", {"tokenizer.ggml.tokens": tokens[:-3]})
    says(lint(short), "error", r"tokens are 2301, vocab_size is 2304")
    key = "tokenizer.ggml.padding_token_id"
    outside = rewritten(files["f32"], tmp_path / "y.gguf", {key: 2304})
    only(lint(outside), "error", None, "pad has id 2304, outside the vocabulary of 2304")


def test_a_router_in_a_lower_type_is_read_as_what_it_is(files, tmp_path):
    """A gate in Q8_0, and a bias in F16, which near ties do not survive."""
    model = refmoe.load()
    gate = export._encode_tile(
        refmoe.model.matrix.dequantize(model.checkpoint.matrix("model.layers.2.mlp.gate")), "q8_0"
    )[0]
    bias = model.checkpoint.array("model.layers.2.mlp.gate.e_score_correction_bias")
    kinds = gguf.GGMLQuantizationType
    made = rewritten(
        files["f32"],
        tmp_path / "x.gguf",
        **{
            "blk.2.ffn_gate_inp.weight": (gate, kinds.Q8_0),
            "blk.2.exp_probs_b.bias": (bias.astype(np.float16), kinds.F16),
        },
    )
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    only(lint(made), "warning", name, r"stored as F16, .* published is F32")


def published(name: str) -> Config:
    return Config.from_dict(MEMBERS[name].published())


def header(cfg: Config, out: Path, **changed: Any) -> Path:
    """A GGUF of metadata alone, as `export` writes them."""
    writer = gguf.GGUFWriter(out, "deepseek2")
    checkpoint = Checkpoint(out.parent, cfg, {})
    export._write_metadata(writer, SimpleNamespace(cfg=cfg, checkpoint=checkpoint))
    for key, value in changed.items():
        writer.kv_data[0][f"deepseek2.{key}"].value = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("name", ["k2-instruct", "k2-thinking", "k2.5", "deepseek-v3"])
def test_constants_are_held_against_the_published_member(name, tmp_path):
    cfg = published(name)
    right = [f for f in lint(header(cfg, tmp_path / "x.gguf")) if f.tensor is None]
    says(right, "note", f"nearest published member is .*{re.escape(name)}")
    assert [f for f in errors(right) if "missing" not in f.text] == []
    wrong = lint(
        header(cfg, tmp_path / "y.gguf", expert_weights_scale=2.5 if cfg.n_group == 1 else 1.0)
    )
    says(wrong, "error", "^routed_scaling_factor = .*, published .* has")


# --- two of one model


def test_a_gguf_and_its_folder_agree_both_ways(files):
    for kind, file in files.items():
        for one, other in ((TINY, file), (file, TINY)):
            findings = lint_against(one, other)
            assert {f.level for f in findings} == {"note"}
            says(findings, "note", "the same values: 360 of routed experts")
            within = [f for f in findings if f.text.startswith("within a quantisation step")]
            assert bool(within) == (kind == "q8_0")
            assert sum(int(n) for f in findings for n in re.findall(r": (\d+) of", f.text)) == 417


def test_two_ggufs_are_compared_and_a_folder_without_config(files, tmp_path):
    findings = lint_against(files["q8_0"], files["f32"])
    assert {f.level for f in findings} == {"note"}
    says(findings, "note", "the same bits: 360 of routed experts, Q4_0")
    for file in TINY.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    findings = lint_against(files["f32"], tmp_path)
    says(findings, "note", "has no config.json: only tensors")
    assert {f.level for f in findings} == {"note"}


def test_configs_of_a_gguf_and_a_folder_are_compared(files, tmp_path):
    changed = rewritten(
        files["f32"],
        tmp_path / "x.gguf",
        {
            "deepseek2.rope.scaling.yarn_beta_fast": None,
            "deepseek2.expert_weights_scale": 2.5,
            "tokenizer.ggml.eos_token_id": 7,
        },
    )
    findings = lint_against(TINY, changed)
    assert {f.text.partition(",")[0] for f in errors(findings)} == {
        "rope_scaling.beta_fast = 32.0",
        "routed_scaling_factor = 2.5",
    }
    says(findings, "warning", "^eos_token_id = 7, ")


def rows_of(order: np.ndarray) -> Change:
    def change(x: np.ndarray) -> None:
        x[:] = x[order]

    return change


R, HEAD = 64, 192
PAIRS = np.concatenate((np.arange(0, R, 2), np.arange(1, R, 2)))
BY_HEAD = np.arange(4 * HEAD).reshape(4, HEAD).copy()
BY_HEAD[:, HEAD - R :] = BY_HEAD[:, HEAD - R :][:, PAIRS]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize(
    ("tensor", "change", "name", "text"),
    [
        (
            "blk.2.attn_q_b.weight",
            rows_of(BY_HEAD.reshape(-1)),
            "model.layers.2.self_attn.q_b_proj.weight",
            "rotated channels permuted from pairs to halves",
        ),
        (
            "blk.2.ffn_up_exps.weight",
            lambda x: x.__setitem__(5, x[6].copy()),
            f"{EXPERT}up_proj.weight",
            r"another expert's: it is our model\.layers\.2\.mlp\.experts\.6\.up_proj",
        ),
        (
            "blk.2.ffn_up_exps.weight",
            lambda x: x[5, ..., 2:].__isub__(0x11),
            f"{EXPERT}up_proj.weight",
            "codes read with an offset of 9 instead of 8",
        ),
        (
            "blk.2.attn_k_b.weight",
            lambda x: x.__setitem__(slice(None), np.roll(x, 1, axis=0)),
            "model.layers.2.self_attn.kv_b_proj.weight",
            "no simple cause",
        ),
    ],
)
def test_a_fault_in_a_gguf_is_named_against_its_folder(
    kind, tensor, change, name, text, files, tmp_path
):
    changed = spoiled(files[kind], tmp_path / "x.gguf", **{tensor: change})
    (found,) = errors(lint_against(TINY, changed))
    assert found.tensor == name
    assert re.search(text, found.text)


def test_what_is_in_one_of_the_two_only_is_named(files, tmp_path):
    extra = np.ones((4, 32), np.float32)
    changed = rewritten(
        files["f32"],
        tmp_path / "x.gguf",
        **{
            "blk.2.attn_q_b.weight": None,
            "blk.1.attn_odd.weight": (extra, gguf.GGMLQuantizationType.F32),
        },
    )
    findings = lint_against(TINY, changed)
    only(findings, "error", "model.layers.2.self_attn.q_b_proj.weight", "not in")
    only(findings, "warning", "blk.1.attn_odd.weight", "only in")


def test_a_bias_that_was_rounded_is_told_with_what_it_does(files, tmp_path):
    bias = refmoe.load().checkpoint.array("model.layers.2.mlp.gate.e_score_correction_bias")
    half = (bias.astype(np.float16), gguf.GGMLQuantizationType.F16)
    made = rewritten(files["f32"], tmp_path / "x.gguf", **{"blk.2.exp_probs_b.bias": half})
    says(lint_against(TINY, made), "warning", "rounded to F16: .* of tokens choose other experts")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0"])
def test_what_ggmls_own_quantiser_makes_is_no_fault(kind, files, tmp_path):
    """Q4_0 may cut a weight by a whole step, of the sign its largest has not: d = max/-8."""
    which = gguf.GGMLQuantizationType[kind]
    w = refmoe.model.matrix.dequantize(refmoe.load().checkpoint.matrix("lm_head"))
    made = rewritten(
        files["f32"],
        tmp_path / "x.gguf",
        **{"output.weight": (gguf.quants.quantize(w, which), which)},
    )
    for one, other in ((TINY, made), (made, TINY)):
        assert errors(lint_against(one, other)) == []
    (verdict,) = [v for v in verify(TINY, made).tensors if v.name == "lm_head"]
    assert verdict.verdict == "rounded"
    if kind == "Q4_0":
        assert errors(lint(made)) == []
        says(lint(made), "note", "lm_head: 1 of Q4_0.*llama.cpp's quantiser leaves them")
