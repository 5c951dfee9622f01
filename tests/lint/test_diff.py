"""The same weights: `lint --against` and `quant verify` are one judgement of a pair.

Every pair is shown to both commands, which must agree in exit code, verdict and cause.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmoe
from refmoe.cli import main
from refmoe.config import Config
from refmoe.files import InputError
from refmoe.lint.diff.mistakes import MISTAKES
from refmoe.lint.diff.suspect import Suspect
from refmoe.lint.diff.weights import allowed, compare, same_format
from refmoe.lint.lint import lint_against
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import bf16_bits, dequantize, round_bf16, widen_bf16
from refmoe.run.export import to_gguf, to_safetensors
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic.members import write_member
from refmoe.weights.synthetic.random import pack_fp8, pack_int4, write_random
from tests.lint.test_lint import GATE, E, edit, nibbles, read, twin
from tests.lint.test_lint_gguf import spoiled

TINY = refmoe.run.load.golden_folder() / "tiny-k2"
UP = E + "up_proj.weight"


def both(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Exit code, and cause by module of what is wrong, after both commands agreed in them."""
    capsys.readouterr()
    lint_code = main(["lint", str(a), "--against", str(b), "--json"])
    linted = json.loads(capsys.readouterr().out)
    code = main(["quant", "verify", str(a), str(b), "--json"])
    verified = json.loads(capsys.readouterr().out)
    assert code == lint_code == (0 if verified["ok"] else 1)
    assert verified["findings"] == linted["findings"]
    assert verified["ok"] == linted["ok"]
    wrong = {t["name"]: t["likely"] for t in verified["tensors"] if t["verdict"] == "wrong"}
    told = {
        f["tensor"].removesuffix(".weight"): f["text"]
        for f in linted["findings"]
        if f["rule"] == "diff-weights" and f["tensor"]
    }
    assert wrong.keys() == told.keys()
    assert all(text.endswith(wrong[name]) for name, text in told.items())
    return code, wrong


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("diff")
    for name in ("k2-thinking", "k2-instruct"):
        write_member(folder / name, name, seed=3)
    return {name: folder / name for name in ("k2-thinking", "k2-instruct")}


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    folder = tmp_path_factory.mktemp("diff-gguf")
    for kind in ("q8_0", "bf16"):
        to_gguf(refmoe.load(), folder / f"{kind}.gguf", dense=kind)
    return {kind: folder / f"{kind}.gguf" for kind in ("q8_0", "bf16")}


# --- one format: any difference is another weight


def raised(bits: np.ndarray) -> np.ndarray:
    """Codes of e4m3 one step larger in magnitude; the largest stay."""
    magnitude = bits & 0x7F
    return np.where(magnitude < 0x7E, bits + 1, bits).astype(np.uint8)


def one(x: np.ndarray, at: int, change: Callable[[Any], Any]) -> np.ndarray:
    """One element of an array changed."""
    y = x.copy()
    flat = y.reshape(-1)
    flat[at] = change(flat[at])
    return y


@pytest.mark.parametrize(
    ("member", "tensor", "change", "cause"),
    [
        ("k2-instruct", UP, raised, "every code one step larger in magnitude"),
        ("k2-instruct", UP, lambda w: one(w, 7, lambda c: c ^ 1), "1 of 23,040 codes differ, each"),
        (
            "k2-instruct",
            UP + "_scale_inv",
            lambda s: one(s, 2, lambda v: np.nextafter(v, np.float32(9))),
            "codes are equal; 1 of 4 scales differ, by x1$",
        ),
        ("k2-instruct", UP + "_scale_inv", lambda s: s * np.float32(1.02), "right one times 1.02"),
        (
            "k2-thinking",
            UP + "_packed",
            lambda p: nibbles(p, lambda n: np.minimum(n + 1, 15)),
            "codes read with an offset of 7 instead of 8",
        ),
        (
            "k2-thinking",
            UP + "_packed",
            lambda p: nibbles(p, lambda n: np.where(n == 9, 10, n)),
            "codes differ, each by one step",
        ),
        ("k2-thinking", UP + "_packed", lambda p: one(p, 7, lambda w: w ^ 1), "1 of 3,072 codes"),
        (
            "k2-thinking",
            UP + "_scale",
            lambda s: one(s, 5, lambda v: v + 1),
            "codes are equal; 1 of 96 scales differ, by x1.00",
        ),
        (
            "k2-thinking",
            "model.layers.1.self_attn.o_proj.weight",
            lambda w: one(w, 100, lambda v: v + 1),
            "1 of 13,440 values differ, each by one step",
        ),
        (
            "k2-thinking",
            "model.layers.1.self_attn.o_proj.weight",
            lambda w: w + 1,
            "the right one times 1.006",  # all a step larger, which a factor makes too
        ),
        (
            "k2-thinking",
            GATE + "e_score_correction_bias",
            lambda v: one(v, 3, lambda x: np.nextafter(x, np.float32(9))),
            "1 of 11 values differ, each by one step",
        ),
    ],
)
def test_in_one_format_any_difference_is_another_weight(
    member, tensor, change, cause, members, tmp_path, capsys
):
    copy = Path(shutil.copytree(members[member], tmp_path / "copy"))
    edit(copy, **{tensor: change(read(copy, tensor))})
    code, wrong = both(members[member], copy, capsys)
    assert code == 1
    module = tensor.replace("_scale_inv", "").replace("_packed", "").replace("_scale", "")
    assert list(wrong) == [module.removesuffix(".weight")]
    (text,) = wrong.values()
    assert text.startswith(cause.rstrip("$")) or cause in text, text


@pytest.mark.parametrize(
    ("kind", "tensor", "change", "module", "cause"),
    [
        (
            "q8_0",
            "blk.0.attn_q_a.weight",
            lambda x: x[..., 2:].__isub__(1),
            "model.layers.0.self_attn.q_a_proj",
            "codes with -1 added to each",
        ),
        (
            "q8_0",
            "blk.0.attn_q_a.weight",
            lambda x: x[9, 3, 5:6].__ixor__(1),
            "model.layers.0.self_attn.q_a_proj",
            "1 of 40,960 codes differ, each by one step",
        ),
        (
            "q8_0",
            "blk.2.ffn_up_exps.weight",
            lambda x: x[5, 7, 1, 4:5].__ixor__(1),
            "model.layers.2.mlp.experts.5.up_proj",
            "1 of 32,768 codes differ, each by one step",
        ),
        (
            "q8_0",
            "blk.2.ffn_up_exps.weight",
            lambda x: x[5, 7, 1, :1].__ixor__(1),
            "model.layers.2.mlp.experts.5.up_proj",
            "codes are equal; 1 of 1,024 scales differ",
        ),
        (
            "bf16",
            "blk.1.attn_v_b.weight",
            lambda x: x[1, 2, 3:4].__ixor__(1),
            "model.layers.1.self_attn.kv_b_proj",
            "no simple cause found; 1 of 524,288 values differ",
        ),
    ],
)
def test_two_ggufs_in_one_format_are_equal_or_not(
    kind, tensor, change, module, cause, ggufs, tmp_path, capsys
):
    changed = spoiled(ggufs[kind], tmp_path / "x.gguf", **{tensor: change})
    code, wrong = both(ggufs[kind], changed, capsys)
    assert code == 1
    assert list(wrong) == [module]
    assert wrong[module].startswith(cause)


# --- two formats: codes and scales that no conversion makes


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x[5, ..., 2:].__isub__(0x11), "codes read with an offset of 9 instead of 8"),
        (lambda x: x[5, 7, 1, 4:5].__ixor__(1), "no simple cause found; 1 of 32,768 values"),
        (lambda x: x[5, 7, 1, :1].__ixor__(8), "no simple cause found; "),
    ],
)
def test_a_damaged_repack_of_int4_is_not_quantised_anew(change, cause, ggufs, tmp_path, capsys):
    """In Q4_0 on INT4's own grid not one code may differ, nor one scale by a step of bf16."""
    name = "blk.2.ffn_up_exps.weight"
    changed = spoiled(ggufs["bf16"], tmp_path / "x.gguf", **{name: change})
    code, wrong = both(TINY, changed, capsys)
    assert code == 1
    assert list(wrong) == ["model.layers.2.mlp.experts.5.up_proj"]
    assert next(iter(wrong.values())).startswith(cause)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("member", ["k2-instruct", "k2-thinking"])
def test_a_code_off_by_one_shows_in_what_was_written_out(member, dtype, members, tmp_path, capsys):
    copy = Path(shutil.copytree(members[member], tmp_path / "copy"))
    if member == "k2-instruct":
        edit(copy, **{UP: raised(read(copy, UP))})
        cause = "every code one step larger in magnitude"
    else:
        packed = nibbles(read(copy, UP + "_packed"), lambda n: np.minimum(n + 1, 15))
        edit(copy, **{UP + "_packed": packed})
        cause = "codes read with an offset of 7 instead of 8"
    twin(copy, tmp_path / "out", dtype)
    for a, b in ((members[member], tmp_path / "out"), (tmp_path / "out", members[member])):
        code, wrong = both(a, b, capsys)
        assert (code, list(wrong)) == (1, [UP.removesuffix(".weight")])
        if a == members[member]:
            assert list(wrong.values()) == [cause]


# --- valid pairs


def test_copies_in_other_files_and_under_other_names_are_the_same(tmp_path, capsys):
    """One shard or three, and the wrapper's prefix of K2.5."""
    write_random(tmp_path / "a", "int4", seed=5)
    write_random(tmp_path / "b", "int4", seed=5, shards=3)
    assert both(tmp_path / "a", tmp_path / "b", capsys) == (0, {})
    for name, member in (("c", "k2-thinking"), ("d", "k2.6")):
        write_member(tmp_path / name, member, seed=5)
    findings = lint_against(tmp_path / "c", tmp_path / "d")
    same = [f for f in findings if f.rule == "diff-equal"]
    assert same
    assert all(f.text.startswith("the same bits") for f in same)
    assert {f.rule for f in findings if f.level == "error"} <= {"diff-config"}  # another beta


@pytest.mark.parametrize(("one", "other"), [("bf16", "int4"), ("bf16", "fp8"), ("f32", "f16")])
def test_a_model_and_what_quantisers_make_of_it_are_the_same(one, other, tmp_path, capsys):
    for kind in (one, other):
        write_random(tmp_path / kind, kind, seed=5)
    assert both(tmp_path / one, tmp_path / other, capsys) == (0, {})
    assert both(tmp_path / other, tmp_path / one, capsys) == (0, {})


def test_exports_are_the_same(ggufs, tmp_path, capsys):
    """INT4 and Q4_0, bf16 and Q8_0, Q8_0 and f16, kv_b_proj whole and in halves."""
    back = tmp_path / "back"
    to_safetensors(refmoe.load(ggufs["q8_0"]), back, "int4", "f16")
    for a, b in ((TINY, ggufs["q8_0"]), (TINY, ggufs["bf16"]), (ggufs["q8_0"], back)):
        assert both(a, b, capsys) == (0, {})
        assert both(b, a, capsys) == (0, {})
    assert both(ggufs["q8_0"], ggufs["bf16"], capsys) == (0, {})


rng = np.random.default_rng(5)
W = round_bf16(rng.standard_normal((256, 256)).astype(np.float32))


def as_q4_0(w: np.ndarray) -> Q4:
    gguf = pytest.importorskip("gguf")
    quants = pytest.importorskip("gguf.quants")
    raw = quants.quantize(w, gguf.GGMLQuantizationType.Q4_0)
    return Q4(raw.reshape(len(w), -1, 18))


def as_coded(w: np.ndarray, kind: str) -> Coded:
    gguf = pytest.importorskip("gguf")
    quants = pytest.importorskip("gguf.quants")
    which = gguf.GGMLQuantizationType[kind]
    raw = quants.quantize(w, which)
    return Coded(raw, w.shape[1], lambda blocks: quants.dequantize(blocks, which), kind)


FORMATS = {
    "float64": lambda w: w.astype(np.float64),
    "float32": lambda w: w,
    "float16": lambda w: w.astype(np.float16),
    "bf16": lambda w: BF16(bf16_bits(w)),
    "int4": lambda w: Int4(*pack_int4(w)),
    "int4 amax/7.5": lambda w: Int4(*pack_int4(w, 7.5)),
    "fp8": lambda w: Fp8Block(*pack_fp8(w, (128, 128)), (128, 128)),
    "q8_0": Q8.quantize,
    "q4_0": as_q4_0,
    "q5_0": lambda w: as_coded(w, "Q5_0"),
    "q4_1": lambda w: as_coded(w, "Q4_1"),
}


@pytest.mark.parametrize("one", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_one_original_in_two_formats_is_the_same(one, other):
    """Both made of one bf16 original, and the second made of the first."""
    a, b = FORMATS[one](W), FORMATS[other](W)
    if one != other and {one, other} != {"int4", "int4 amax/7.5"}:
        assert compare(a, b).verdict != "wrong"
        made = FORMATS[other](dequantize(a, np.float32))
        assert compare(a, made).verdict != "wrong"
        assert compare(made, a).verdict != "wrong"
    elif one == other:
        assert compare(a, b).verdict in ("same bits", "same values")


@pytest.mark.parametrize("kind", ["float32", "float16", "bf16", "int4", "fp8", "q8_0", "q4_0"])
def test_the_bound_is_where_a_number_becomes_another(kind):
    """A number in float64 just within the bound of a format is its value, just outside is not."""
    a = FORMATS[kind](W)
    x = dequantize(a, np.float64)
    for by, same in ((0.99, True), (1.01, False)):
        y = x.copy()
        rounding, steps = allowed(a, x, y, y)
        bound = np.broadcast_to(rounding + steps, x.shape)
        y[3, 5] += by * bound[3, 5]
        assert (compare(a, y).verdict != "wrong") == same
        assert (compare(y, a).verdict != "wrong") == same


def test_q4_0_cuts_on_one_side_alone():
    """ggml's d = max/-8 cuts numbers up to 8·d to 7·d; a code raised from 6 to 7 is not that."""
    w = np.full((1, 32), 0.5, np.float32)
    w[0, 0], w[0, 1] = -8.0, 8.0  # d = 1: 8 is cut to 7
    q4 = as_q4_0(w)
    assert dequantize(q4)[0, 1] == 7
    assert compare(w, q4).verdict == "within a step"
    w[0, 1] = 6.0
    assert compare(w, q4).verdict == "wrong"


def test_halves_of_keys_and_values_are_one_format_with_the_whole():
    H, N, V, C = 4, 32, 64, 32
    whole = rng.standard_normal((H, N + V, C)).astype(np.float32)
    keys = np.ascontiguousarray(whole[:, :N].transpose(0, 2, 1)).reshape(H * C, N)
    values = whole[:, N:].reshape(H * V, C)
    flat = BF16(bf16_bits(whole.reshape(-1, C)))
    halves = Heads(BF16(bf16_bits(keys)), BF16(bf16_bits(values)), H)
    assert same_format(flat, halves)
    assert compare(flat, halves).verdict == "same values"
    keys_off = halves._replace(k_b=BF16(one(halves.k_b.bits, 77, lambda b: b + 1)))
    assert compare(flat, keys_off).verdict == "wrong"
    q8 = Heads(
        Q8.quantize(widen_bf16(halves.k_b.bits)), Q8.quantize(widen_bf16(halves.v_b.bits)), H
    )
    assert not same_format(Q8.quantize(widen_bf16(flat.bits)), q8)  # blocks of keys run across
    assert compare(flat, q8).verdict == "within a step"
    assert compare(Q8.quantize(widen_bf16(flat.bits)), q8).verdict == "within a step"


# --- configs, names, other models


def test_another_model_is_refused_by_both(tmp_path, capsys):
    write_random(tmp_path / "other", "bf16")
    with pytest.raises(InputError, match=r"not two files of one model: hidden_size 256 and 96"):
        lint_against(TINY, tmp_path / "other")
    for command in (["lint", str(TINY), "--against"], ["quant", "verify", str(TINY)]):
        assert main([*command, str(tmp_path / "other")]) == 2
    capsys.readouterr()


def test_constants_and_damage_are_told_by_both(members, tmp_path, capsys):
    copy = Path(shutil.copytree(members["k2-thinking"], tmp_path / "copy"))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "routed_scaling_factor": 2.872}))
    assert both(members["k2-thinking"], copy, capsys) == (1, {})
    (copy / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 4096}))
    assert both(members["k2-thinking"], copy, capsys) == (0, {})
    (copy / "config.json").unlink()
    assert both(members["k2-thinking"], copy, capsys) == (0, {})
    edit(copy, **{UP + "_scale": None})
    capsys.readouterr()
    assert main(["quant", "verify", str(members["k2-thinking"]), str(copy)]) == 1
    assert "diff-damaged" in capsys.readouterr().out
    assert main(["lint", str(members["k2-thinking"]), "--against", str(copy)]) == 1


def test_a_weight_that_only_the_copy_has_is_an_error_if_the_network_needs_it(members, tmp_path):
    copy = Path(shutil.copytree(members["k2-thinking"], tmp_path / "copy"))
    edit(copy, **{"model.norm.weight": None, "more": ("float32", np.ones(3, np.float32))})
    levels = {f.tensor: f.level for f in lint_against(copy, members["k2-thinking"])}
    assert levels["model.norm.weight"] == "error"
    levels = {f.tensor: f.level for f in lint_against(members["k2-thinking"], copy)}
    assert (levels["model.norm.weight"], levels["more"]) == ("error", "warning")


# --- the catalogue of mistakes


def heads(w: np.ndarray, order: list[int]) -> np.ndarray:
    return w.reshape(len(order), -1, w.shape[-1])[order].reshape(w.shape)


def parted(w: np.ndarray, keys: int, H: int) -> tuple[np.ndarray, np.ndarray]:
    by_head = w.reshape(H, -1, w.shape[-1])
    return by_head[:, :keys], by_head[:, keys:]


A = "model.layers.1.self_attn."


@pytest.mark.parametrize(
    ("tensor", "change", "cause"),
    [
        ("q_b_proj", lambda w, c: heads(w, [0, 2, 1, 3, 4]), "its head 1 is our head 2"),
        ("kv_b_proj", lambda w, c: heads(w, [4, 3, 2, 1, 0]), "its head 0 is our head 4"),
        (
            "o_proj",
            lambda w, c: heads(np.ascontiguousarray(w.T), [1, 0, 2, 3, 4]).T,
            "its head 0 is our head 1",
        ),
        (
            "kv_b_proj",
            lambda w, c: np.concatenate(
                parted(w, c.qk_nope_head_dim, c.num_attention_heads)[::-1], axis=1
            ).reshape(w.shape),
            "values before keys in each head",
        ),
        (
            "kv_b_proj",
            lambda w, c: np.concatenate(
                [p.reshape(-1, w.shape[1]) for p in parted(w, c.qk_nope_head_dim, 5)]
            ),
            "keys of all heads before values of all heads",
        ),
        (
            "q_b_proj",
            lambda w, c: np.roll(w.reshape(5, -1, w.shape[1]), c.qk_rope_head_dim, axis=1).reshape(
                w.shape
            ),
            "rotated channels before the others in each head",
        ),
        ("o_proj", lambda w, c: np.roll(w, 48, axis=0), "halves of its rows swapped"),
        ("o_proj", lambda w, c: w[np.arange(96) ^ 1], "rows in pairs, each pair turned"),
    ],
)
def test_mistakes_are_named(tensor, change, cause, members, tmp_path, capsys):
    copy = Path(shutil.copytree(members["k2-thinking"], tmp_path / "copy"))
    name = f"{A}{tensor}.weight"
    cfg = Config.load(copy)
    edit(copy, **{name: np.ascontiguousarray(change(read(copy, name), cfg))})
    code, wrong = both(members["k2-thinking"], copy, capsys)
    assert (code, list(wrong)) == (1, [name.removesuffix(".weight")])
    assert cause in wrong[A + tensor]


def test_every_mistake_of_the_catalogue_is_documented_and_yields_what_it_says(members):
    """A mistake never turns a healthy matrix into itself, or its name would mean nothing."""
    ours = Checkpoint.open(members["k2-thinking"])
    for key in (UP, A + "q_b_proj.weight", A + "kv_b_proj.weight", "lm_head.weight"):
        m = ours.matrix(key.removesuffix(".weight"))
        s = Suspect(key, ours, m, m)
        for mistake in MISTAKES:
            assert (mistake.__doc__ or "").startswith("Yield ")
            for cause, made in mistake(s):
                assert cause.text
                assert not np.array_equal(made.values, s.x.values), cause


def test_codes_of_e4m3_in_order():
    """What `raised` does: the next larger magnitude, 9.5 % in the mean as a relative step."""
    codes = np.arange(1, 0x7E, dtype=np.uint8)
    assert (E4M3[raised(codes)] > E4M3[codes]).all()
