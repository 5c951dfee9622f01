"""Others' layouts: SGLang's folders, llama.cpp's prints, Hugging Face's outputs, logprobs."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe import cli
from refmoe.files import InputError
from refmoe.oracle.check import check
from refmoe.oracle.readers.dump import read_dump
from tests.conftest import ROOT

TOKENS = [i * 7 % 500 for i in range(9)]
LAYERS = 3  # of the random checkpoint


@pytest.fixture(scope="module")
def traced(random_bf16):
    return refmoe.trace(refmoe.load(random_bf16), TOKENS)


@pytest.fixture(scope="module")
def model(random_bf16):
    return refmoe.load(random_bf16, "float64", reference=True)


# --- SGLang


def sglang(folder: Path, name: str, x, index=0, **tags) -> None:  # type: ignore[no-untyped-def]
    """As the dumper's `_dump_single` names and saves a tensor."""
    import torch

    folder.mkdir(exist_ok=True)
    extra = tags.pop("meta", {})
    full = {"step": 0, "rank": 0, "dump_index": index, "name": name, **tags}
    value = torch.tensor(x) if isinstance(x, np.ndarray) else x
    meta = {**full, "world_rank": 0, "world_size": 1, "sglang_parallel_info": {}, **extra}
    file = "___".join(f"{k}={v}" for k, v in full.items()) + ".pt"
    torch.save({"value": value, "meta": meta}, folder / file)


def as_sglang(folder: Path, arrays, rows=slice(None), step=0) -> None:  # type: ignore[no-untyped-def]
    """Module hooks: tuples of norms, inputs of projections, the fused first product."""
    names = {n: x for n, x in arrays.items() if not any(c in n for c in ("#", ".experts.", ".act"))}
    for i in range(LAYERS):
        own = f"model.layers.{i}.self_attn"
        if f"{own}.q_a_proj" in names:
            parts = [names.pop(f"{own}.{end}") for end in ("q_a_proj", "kv_a_proj_with_mqa")]
            names[f"{own}.fused_qkv_a_proj_with_mqa"] = np.concatenate(parts, axis=1)
            context = arrays[f"{own}#context"][rows]
            sglang(folder, f"non_intrusive__{own}.o_proj.inputs.0", context, 900 + i, step=step)
            after = f"model.layers.{i}.post_attention_layernorm"
            both = names.pop(after), arrays[f"model.layers.{i}#attn_residual"]
            for k, x in enumerate(both):
                sglang(folder, f"non_intrusive__{after}.output.{k}", x[rows], 950 + i, step=step)
            names.pop(f"{own}.kv_b_proj", None)
            del names[f"model.layers.{i}"]  # of which the layer returns only the mlp's part
            following = f"model.layers.{i + 1}.input_layernorm"
            following = following if following in arrays else "model.norm"
            x = names.pop(following)[rows], arrays[f"model.layers.{i}"][rows]
            for k, y in enumerate(x):
                sglang(folder, f"non_intrusive__{following}.output.{k}", y, 970 + i, step=step)
    for index, (name, x) in enumerate(names.items()):
        sglang(folder, f"non_intrusive__{name}.output", x[rows], index, step=step)


@pytest.mark.peers
def test_a_folder_of_sglang_is_read(traced, model, tmp_path):
    as_sglang(tmp_path / "d", traced)
    sglang(tmp_path / "d", "input_ids", np.array(TOKENS), 0)
    sglang(tmp_path / "d", "forward_mode", "prefill", 0)
    dump = read_dump(tmp_path / "d")
    assert dump.tokens == TOKENS
    assert "no tensor" in dump.notes[0]
    report = check(model, dump)
    assert (report.verdict, report.unmatched) == ("pass", {}), report.reason
    assert report.compared > 50
    names = {p.name for p in report.points}
    assert {"model.layers.0#attn_residual", "model.layers.1", "model.layers.2"} <= names
    assert "model.layers.2.self_attn.q_a_proj" in names


@pytest.mark.peers
def test_steps_follow_each_other_and_ranks_are_one(traced, model, tmp_path):
    folder = tmp_path / "d"
    as_sglang(folder, traced, slice(0, 7))
    for t in (7, 8):
        as_sglang(folder, traced, slice(t, t + 1), step=t - 6)
    sglang(folder, "input_ids", np.array(TOKENS), 0)
    sglang(folder, "non_intrusive__lm_head.output", traced["lm_head"][:7], 9, rank=1)
    dump = read_dump(folder)
    assert "3 steps are read as one sequence" in dump.notes
    report = check(model, dump)
    assert report.verdict == "pass", report.reason
    norm = traced["model.norm"]
    sglang(folder, "non_intrusive__model.norm.output.0", norm[:7] * 2, 9, rank=1)
    dump = read_dump(folder)
    assert "model.norm: its ranks hold different parts; dump it where it is whole" in dump.notes
    assert "model.norm" not in dump.arrays


@pytest.mark.peers
def test_names_given_by_hand_stand_beside_their_layer(traced, tmp_path):
    sglang(tmp_path / "d", "self_attn", traced["model.layers.2.self_attn"], layer_id=2)
    assert list(read_dump(tmp_path / "d").arrays) == ["model.layers.2.self_attn"]


@pytest.mark.peers
def test_a_fused_norm_is_given_no_sum(traced, model, tmp_path):
    """SGLang's norm adds the residual itself; elsewhere its only input is the sum."""
    folder = tmp_path / "d"
    as_sglang(folder, traced)
    sglang(folder, "input_ids", np.array(TOKENS))
    for i in range(LAYERS):
        name = f"non_intrusive__model.layers.{i}.post_attention_layernorm.inputs"
        attention = traced[f"model.layers.{i}.self_attn"]
        sglang(folder, f"{name}.0", attention, 20 + i, layer_id=i)  # before its output
        sglang(folder, f"{name}.1", attention, 30 + i, layer_id=i)
    report = check(model, read_dump(folder))
    assert report.verdict == "pass", report.reason
    assert "model.layers.0#attn_residual" in {p.name for p in report.points}
    alone = tmp_path / "alone"
    x = traced["model.layers.1#attn_residual"]
    sglang(alone, "non_intrusive__model.layers.1.post_attention_layernorm.inputs.0", x)
    np.testing.assert_array_equal(read_dump(alone).arrays["model.layers.1#attn_residual"], x)


@pytest.mark.peers
def test_a_layer_that_returns_two_parts_is_not_the_first(traced, tmp_path):
    folder = tmp_path / "d"
    sglang(folder, "non_intrusive__model.layers.1.output.0", traced["model.layers.1.mlp"], 1)
    sglang(folder, "non_intrusive__model.layers.1.output.1", traced["model.layers.1"], 2)
    sglang(folder, "non_intrusive__model.layers.2.output", traced["model.layers.2"], 3)
    assert list(read_dump(folder).arrays) == ["model.layers.2"]


def positions(folder: Path, step: int, first: int, rows: int, **tags) -> None:  # type: ignore[no-untyped-def]
    sglang(folder, "positions", np.arange(first, first + rows), 1, step=step, **tags)
    ids = np.array(TOKENS[first : first + rows])
    sglang(folder, "input_ids", ids, 2, step=step, **tags)


@pytest.mark.peers
def test_positions_tell_which_steps_are_one_prompt(traced, model, tmp_path):
    folder = tmp_path / "d"
    warm = {n: x[:3] for n, x in traced.items() if len(x) >= 3}
    as_sglang(folder, warm, step=0)
    positions(folder, 0, 0, 3)
    for step, rows in ((4, (0, 6)), (5, (6, 8)), (6, (8, 9))):  # in chunks, then decoding
        as_sglang(folder, traced, slice(*rows), step=step)
        positions(folder, step, rows[0], rows[1] - rows[0])
        for layer in range(LAYERS):  # keyword arguments of layers, under the same name
            positions(folder, step, rows[0], rows[1] - rows[0], layer_id=layer)
        x = traced["lm_head"][rows[1] - 1 : rows[1]]
        sglang(folder, "non_intrusive__output.next_token_logits", x, 99, step=step)
    for file in folder.glob("*lm_head*"):  # which SGLang's hooks do not see
        file.unlink()
    dump = read_dump(folder)
    assert list(dump.prompts) == [TOKENS[:3], TOKENS]
    assert dump.notes == ("4 steps are read as 2 prompts",)
    report = check(model, dump)
    assert (report.verdict, report.unmatched) == ("pass", {}), report.reason
    logits = dump.arrays["lm_head"]
    assert dump.partial == {"lm_head"}
    assert (~np.isnan(logits).any(axis=1)).nonzero()[0].tolist() == [8, 10, 11]
    np.testing.assert_array_equal(logits[[8, 10, 11]], traced["lm_head"][[5, 7, 8]])
    logits[10] = logits[10, ::-1].copy()
    report = check(model, dump)
    assert (report.verdict, report.point) == ("fault", "lm_head")


@pytest.mark.peers
def test_a_nan_of_the_engine_is_no_unknown_row(traced, model, tmp_path):
    folder = tmp_path / "d"
    positions(folder, 0, 0, 9)
    x = traced["lm_head"][-1:].copy()
    x[0, 7] = np.nan
    sglang(folder, "non_intrusive__logits_processor.output.next_token_logits", x, 3)
    report = check(model, read_dump(folder))
    assert (report.verdict, report.point, report.reason) == ("fault", "lm_head", "not finite")


@pytest.mark.peers
@pytest.mark.parametrize("batch", [False, True])
def test_prompts_side_by_side_are_told_apart(random_bf16, traced, model, tmp_path, batch):
    """As SGLang has them, rows of one after the other, or a batch of transformers [B, T, ...]."""
    folder, tokens = tmp_path / "d", [5, 4, 3, 2, 1, 0, 6, 7, 8][: 9 if batch else 4]
    other = refmoe.trace(refmoe.load(random_bf16), tokens)
    names = [n for n in traced if "#" not in n and ".experts." not in n and ".act" not in n]
    for name in names:
        parts = traced[name], other[name]
        x = np.stack(parts) if batch else np.concatenate(parts)
        sglang(folder, f"non_intrusive__{name}.output", x)
    ids = [np.array(TOKENS), np.array(tokens)]
    at = [np.arange(len(i)) for i in ids]
    sglang(folder, "input_ids", np.stack(ids) if batch else np.concatenate(ids))
    sglang(folder, "position_ids", np.stack(at) if batch else np.concatenate(at))
    dump = read_dump(folder)
    assert list(dump.prompts) == [TOKENS, tokens]
    report = check(model, dump)
    assert report.verdict == "pass", report.reason
    assert [p.verdict for p in report.prompts] == ["pass", "pass"]
    next(folder.glob("*lm_head*")).unlink()
    rows = np.stack([traced["lm_head"][-1], other["lm_head"][-1]])  # one for each prompt
    sglang(folder, "non_intrusive__logits_processor.output.next_token_logits", rows)
    dump = read_dump(folder)
    last = len(TOKENS) - 1, len(TOKENS) + len(tokens) - 1
    assert (~np.isnan(dump.arrays["lm_head"]).any(axis=1)).nonzero()[0].tolist() == [*last]
    assert check(model, dump).verdict == "pass"


@pytest.mark.peers
def test_rows_without_a_beginning_are_refused(tmp_path):
    folder, x = tmp_path / "cached", np.ones((3, 4), np.float32)
    sglang(folder, "positions", np.array([4, 5, 6]))
    sglang(folder, "non_intrusive__model.norm.output", x)
    with pytest.raises(InputError, match="--disable-radix-cache"):
        read_dump(folder)
    sglang(folder, "positions", np.array([0, 1]), step=1)
    sglang(folder, "input_ids", np.array([8, 9]), step=1)
    for step in (2, 3, 4):  # dry runs
        sglang(folder, "positions", np.array([0]), step=step)
    dump = read_dump(folder)
    assert dump.tokens == [8, 9]
    assert dump.notes[0] == "3 prompts of a single token, as of dry runs, are not read"
    assert "steps 0 have rows that follow no other" in dump.notes[1]


@pytest.mark.peers
@pytest.mark.parametrize("dims", ["t h[tp]", "t h(tp)", "t (heads*d)[tp:sharded] # ep:replicated"])
def test_parts_are_put_together_along_their_dims(traced, tmp_path, dims):
    folder, x = tmp_path / "d", traced["model.layers.1.self_attn.q_b_proj"]
    for rank, part in enumerate(np.split(x, [40, x.shape[1] - 30], axis=1)):
        own = {"tp_rank": 2 - rank, "tp_size": 3}  # ranks of the world in another order
        meta = {"dims": dims, "sglang_parallel_info": own}
        name = "non_intrusive__model.layers.1.self_attn.q_b_proj.output"
        sglang(folder, name, part, rank=2 - rank, meta=meta | {"sglang_parallel_info": own})
    arrays = read_dump(folder).arrays
    parts = np.split(x, [40, x.shape[1] - 30], axis=1)
    whole = arrays["model.layers.1.self_attn.q_b_proj"]
    np.testing.assert_array_equal(whole, np.concatenate(parts[::-1], axis=1))
    next(folder.glob("*rank=1*")).unlink()
    dump = read_dump(folder)
    assert dump.arrays == {}
    assert "2 of its 3 parts are there" in dump.notes[0]


@pytest.mark.peers
@pytest.mark.parametrize("dims", ["t h[tp:partial]", "t[cp:zigzag] h", "t[sp] h[tp]", "t ((", None])
def test_parts_that_are_no_plain_split_are_named(tmp_path, dims):
    for layer in range(3):
        for rank in range(2):
            x = np.full((4, 6), rank, np.float32)
            name = f"non_intrusive__model.layers.{layer}.mlp.output"
            sglang(tmp_path / "d", name, x, layer, rank=rank, meta={"dims": dims})
    dump = read_dump(tmp_path / "d")
    assert dump.arrays == {}
    assert dump.notes == (
        "model.layers.*.mlp (3 of them): its ranks hold different parts; dump it where it is whole",
    )


@pytest.mark.peers
def test_choices_are_read_where_a_backend_shows_them(traced, tmp_path):
    folder, name = tmp_path / "d", "non_intrusive__model.layers.{}.mlp.topk.output.{}"
    chosen = traced["model.layers.1.mlp.gate#experts"].astype(np.int32)
    weights = traced["model.layers.1.mlp.gate#weights"]
    for i, x in enumerate((weights, chosen, traced["model.layers.1.mlp.gate"])):
        sglang(folder, name.format(1, i), x, i)
    for i, x in enumerate((weights, weights)):  # bypassed: no indices
        sglang(folder, name.format(2, i), x, 5 + i)
    dump = read_dump(folder)
    assert list(dump.arrays) == ["model.layers.1.mlp.gate#experts"]
    assert dump.notes[0].startswith("model.layers.2.mlp.gate#experts: no indices")


@pytest.mark.peers
def test_what_is_no_tensor_is_named_and_the_rest_read(traced, tmp_path):
    import torch

    folder = tmp_path / "d"
    x = traced["model.layers.2.mlp"]
    sglang(folder, "mlp__output", x, 1, layer_id=2, recompute_status="disabled", pp_rank=0)
    sglang(folder, "input_ids", TOKENS, 2)  # a list
    sglang(folder, "dtype", torch.float32, 3)  # asks for a name that is not read
    sglang(folder, "rids", ["a"], 4)
    sglang(folder, "param__model.norm.weight", traced["model.norm"], 5)
    sglang(folder, "mlp", x * 2, 6, layer_id=2, recompute_status="recompute")
    sglang(folder, "mlp", x * 2, 7, layer_id=2)
    (folder / "log.txt").write_text("hello")
    file = "name=attn___layer_id=0___dump_index=8___rank=0___step=0.pt"  # in any order
    torch.save({"value": torch.ones(9, 2), "meta": {}}, folder / file)
    dump = read_dump(folder)
    assert list(dump.arrays) == ["model.layers.2.mlp", "model.layers.0.attn"]
    np.testing.assert_array_equal(dump.arrays["model.layers.2.mlp"], x)
    assert dump.tokens == TOKENS
    assert dump.notes == (
        "1 entries are no .pt files of the dumper",
        "model.layers.2.mlp: called more than once in a step, the first is read",
        "dtype: no tensor",
    )
    (folder / "step=one___name=x.pt").write_bytes(b"")
    with pytest.raises(InputError, match="step is 'one', expected a number"):
        read_dump(folder)


def test_a_folder_of_folders_says_which_to_give(tmp_path):
    (tmp_path / "dump_2026").mkdir()
    with pytest.raises(InputError, match="give a folder inside it: dump_2026"):
        read_dump(tmp_path)


def test_an_empty_or_damaged_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \.pt file"):
        read_dump(tmp_path)
    (tmp_path / "step=0___name=x.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="can be read safely"):
        read_dump(tmp_path)


# --- llama.cpp


def corners(n: int) -> list[int]:
    return list(range(n)) if n <= 6 else [0, 1, 2, n - 3, n - 2, n - 1]


def print_tensor(name: str, op: str, source: str, x: np.ndarray) -> str:
    """common_debug_cb_eval's lines: ne innermost first, three first and last of each axis."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    ne = ", ".join(map(str, reversed(x.shape)))
    lines = [
        f"common_debug_cb_eval: {name:>24} = (f32) {op:>10}({source}{{9, 9, 1, 1}}, }}) = {{{ne}}}"
    ]
    for i3 in range(x.shape[0]):
        lines.append("    [")
        for i2 in corners(x.shape[1]):
            lines += ["        ..., "] if i2 == x.shape[1] - 3 > 3 else []
            lines.append("        [")
            for i1 in corners(x.shape[2]):
                lines += ["            ..., "] if i1 == x.shape[2] - 3 > 3 else []
                row = x[i3, i2, i1]
                shown = [f"{row[k]:12.4f}" for k in corners(len(row))]
                shown[3:3] = ["   ..."] if len(row) > 6 else []
                lines.append("            [" + ", ".join(shown) + "  ],")
            lines.append("        ],")
        lines += ["    ]", f"    sum = {x.sum():f}"]
    return "\n".join(lines) + "\n"


def llamacpp(arrays) -> str:  # type: ignore[no-untyped-def]
    """deepseek2's graph of a prompt: the last layer's MLP and the head see the last row alone."""
    out = "llama_model_loader: loaded meta data\n"
    out += print_tensor("inp_embd", "GET_ROWS", "token_embd.weight", arrays["model.embed_tokens"])
    for i in range(LAYERS):
        at, last = f"model.layers.{i}", slice(-1 if i == LAYERS - 1 else None, None)
        own = f"{at}.self_attn"

        def show(name: str, op: str, point: str, rows=slice(None), source="x", at=at, i=i) -> str:  # type: ignore
            return print_tensor(f"{name}-{i}", op, source, arrays[at + point][rows])

        out += show("attn_norm", "MUL", ".input_layernorm")
        out += show("q", "MUL_MAT", ".self_attn.q_a_proj", source=f"blk.{i}.attn_q_a.weight")
        out += show("q", "MUL", ".self_attn.q_a_layernorm")
        out += show("q", "MUL_MAT", ".self_attn.q_b_proj", source=f"blk.{i}.attn_q_b.weight")
        out += show("kv_cmpr_pe", "MUL_MAT", ".self_attn.kv_a_proj_with_mqa")
        out += show("k_pe", "VIEW", ".self_attn#k_pe")  # before it turns: anything
        out += show("q_pe", "ROPE", ".self_attn#q_pe")
        k = arrays[f"{own}#k_pe"]
        out += print_tensor(f"k_pe-{i}", "ROPE", "x", k.reshape(len(k), 1, -1))
        out += show("kv_cmpr", "MUL", ".self_attn.kv_a_layernorm")
        out += show("ffn_inp", "ADD", "#attn_residual", last)
        out += show("ffn_norm", "MUL", ".post_attention_layernorm", last)
        if f"{at}.mlp.gate" in arrays:
            out += show("ffn_moe_logits", "MUL_MAT", ".mlp.gate", last)
            out += show("ffn_moe_topk", "VIEW", ".mlp.gate#experts", last)
            weights = arrays[f"{at}.mlp.gate#weights"][last]
            out += print_tensor(f"ffn_moe_weights_norm-{i}", "DIV", "x", weights / 2.827)
            out += print_tensor(f"ffn_moe_weights_scaled-{i}", "SCALE", "x", weights[..., None])
            out += show("ffn_moe_out", "ADD", ".mlp.experts", last)
            out += show("ffn_shexp", "MUL_MAT", ".mlp.shared_experts", last)
        out += show("ffn_out", "ADD", ".mlp", last)
        out += show("l_out", "ADD", "", last)
    out += print_tensor("result_norm", "MUL", "x", arrays["model.norm"][-1:])
    return out + print_tensor("result_output", "MUL_MAT", "output.weight", arrays["lm_head"][-1:])


def test_a_print_of_llama_cpp_is_read_as_far_as_it_goes(traced, model, tmp_path):
    file = tmp_path / "eval.txt"
    file.write_text(llamacpp(traced))
    dump = read_dump(file)
    assert dump.step == pytest.approx(5e-5)
    for name, x in dump.arrays.items():
        whole = traced[name]
        assert x.shape == whole.shape, name
        known = ~np.isnan(x)
        np.testing.assert_allclose(x[known], whole[known], atol=5.1e-5)
        assert name in dump.partial  # of four decimals, whether or not all are printed
    assert "lm_head: 1 of 9 rows, taken as the last" in dump.notes
    report = check(model, dump, TOKENS, profile="float32")
    assert report.verdict == "pass", report.reason
    assert report.compared >= 40
    wrong = dict(traced)
    for name in ("model.layers.1.mlp", "model.layers.1"):
        wrong[name] = traced[name] + 0.5 * traced["model.layers.1.mlp.experts"]
    file.write_text(llamacpp(wrong))
    report = check(model, read_dump(file), TOKENS, profile="float32")
    assert (report.verdict, report.point) == ("fault", "model.layers.1.mlp")


def test_an_older_print_shows_the_first_three(tmp_path):
    x = np.arange(40.0).reshape(4, 10)
    rows = "\n".join("[" + ", ".join(f"{v:8.4f}" for v in x[r, :3]) + ", ...]," for r in range(3))
    head = "ggml_debug:   l_out-1 = (f32) ADD(a{10, 4, 1, 1}, b{10, 4, 1, 1}}) = {10, 4, 1, 1}\n"
    (tmp_path / "old.log").write_text(head + "[[\n" + rows + "\n ...]]\n")
    ((name, y),) = read_dump(tmp_path / "old.log").arrays.items()
    assert name == "model.layers.1"
    np.testing.assert_array_equal(y[:3, :3], x[:3, :3])
    assert np.isnan(y[3]).all()


def test_a_print_that_is_cut_off_is_read_as_far_as_it_goes(traced, tmp_path):
    text, name = llamacpp(traced), "model.embed_tokens"
    (tmp_path / "d.txt").write_text(text[: text.index("sum") - 40])
    dump = read_dump(tmp_path / "d.txt")
    assert list(dump.arrays) == [name]
    known = ~np.isnan(dump.arrays[name])
    assert known.sum(axis=1).tolist() == [6, 6, 6, 0, 0, 0, 6, 6, 0]
    np.testing.assert_allclose(dump.arrays[name][known], traced[name][known], atol=5.1e-5)
    assert dump.notes[0].startswith("the log ends within inp_embd or after it")
    (tmp_path / "d.txt").write_text(text[: text.index("\n", text.index("inp_embd")) + 9])
    with pytest.raises(InputError, match="nothing is printed of inp_embd"):
        read_dump(tmp_path / "d.txt")
    (tmp_path / "d.txt").write_text("llama_perf: nothing here\n")
    with pytest.raises(InputError, match="no tensor of llama-eval-callback"):
        read_dump(tmp_path / "d.txt")


def test_products_are_known_by_their_weights(traced, tmp_path):
    text = ""
    for i, name in enumerate(("q_a_proj", "q_b_proj", "o_proj")):
        weight = {"q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "o_proj": "attn_output"}[name]
        x = traced[f"model.layers.1.self_attn.{name}"]
        text += print_tensor(f"node_{i}", "MUL_MAT", f"blk.1.{weight}.weight", x)
    context = traced["model.layers.1.self_attn#context"]
    text += print_tensor("kqv_out-1", "CONT", "kqv-1", context)
    text += print_tensor("kqv_out-1 (view)", "VIEW", "kqv_out-1", context * 2)
    text += print_tensor("ffn_up-1", "MUL_MAT", "blk.1.ffn_up_shexp.weight", context)
    text += print_tensor("ffn_up-0", "MUL_MAT", "blk.0.ffn_up.weight", context)
    text += print_tensor("ffn_moe_up-1", "MUL_MAT_ID", "blk.1.ffn_up_exps.weight", context)
    (tmp_path / "d.txt").write_text(text)
    ends = ("q_a_proj", "q_b_proj", "o_proj")
    assert list(read_dump(tmp_path / "d.txt").arrays) == [
        *(f"model.layers.1.self_attn.{end}" for end in ends),
        "model.layers.1.self_attn#context",
        "model.layers.1.mlp.shared_experts.up_proj",
        "model.layers.0.mlp.up_proj",
    ]


def test_the_longest_of_several_passes_is_read_and_its_tokens(traced, tmp_path):
    short = {n: x[:2] * 3 for n, x in traced.items()}
    log = f"number of input tokens = {len(TOKENS)}\n" + "".join(f"  {t}\n" for t in TOKENS)
    (tmp_path / "d.log").write_text(llamacpp(short) + llamacpp(traced) + llamacpp(short))
    dump = read_dump(tmp_path / "d.log")
    assert dump.tokens is None
    assert dump.notes[:2] == (  # nothing tells a short prompt from what is decoded
        "1 forward passes are of other prompts and are not read",
        "2 forward passes are read as one sequence of 11 rows",
    )
    x = dump.arrays["model.layers.0"][:9]
    known = ~np.isnan(x)
    np.testing.assert_allclose(x[known], traced["model.layers.0"][known], atol=5.1e-5)
    (tmp_path / "d.log").write_text(log + llamacpp(traced) + llamacpp(short))
    assert read_dump(tmp_path / "d.log").tokens == TOKENS
    (tmp_path / "d.log").write_text(log.replace("= 9", "= 8") + llamacpp(traced))
    assert read_dump(tmp_path / "d.log").tokens is None


def test_a_printed_nan_is_a_fault_and_no_hole(traced, model, tmp_path):
    wrong = dict(traced)
    wrong["model.layers.1.mlp.experts"] = traced["model.layers.1.mlp.experts"].copy()
    wrong["model.layers.1.mlp.experts"][1, 2] = np.nan
    (tmp_path / "d.txt").write_text(llamacpp(wrong))
    report = check(model, read_dump(tmp_path / "d.txt"), TOKENS, profile="float32")
    found = report.verdict, report.point, report.reason
    assert found == ("fault", "model.layers.1.mlp.experts", "not finite")


def test_weights_are_read_with_whole_choices_alone(traced, tmp_path):
    (tmp_path / "d.txt").write_text(llamacpp(traced))  # nine rows: three are not printed
    dump = read_dump(tmp_path / "d.txt")
    assert not any("gate#" in name for name in dump.arrays)
    assert any("experts and weights of 2 layers" in note for note in dump.notes)
    short = {n: x[:5] for n, x in traced.items()}
    (tmp_path / "d.txt").write_text(llamacpp(short))
    arrays = read_dump(tmp_path / "d.txt").arrays
    whole = arrays["model.layers.1.mlp.gate#experts"]
    np.testing.assert_array_equal(whole, short["model.layers.1.mlp.gate#experts"])
    weights = short["model.layers.1.mlp.gate#weights"]
    np.testing.assert_allclose(arrays["model.layers.1.mlp.gate#weights"], weights, atol=5.1e-5)
    assert "model.layers.2.mlp.gate#experts" not in arrays  # of the last row alone


def test_a_print_of_too_many_rows_is_refused(tmp_path):
    text = print_tensor("l_out-0", "ADD", "x", np.zeros((3, 3)))
    (tmp_path / "d.txt").write_text(text.replace("{3, 3, 1, 1}\n", "{999999, 999999, 1, 1}\n"))
    with pytest.raises(InputError, match="print a shorter prompt"):
        read_dump(tmp_path / "d.txt")


# --- Hugging Face


@pytest.mark.peers
def test_hidden_states_and_logits_of_transformers_are_points(tmp_path):
    import torch

    from refmoe.oracle.selftest import power as bench

    engines = bench.engines()
    with engines.make.tempfile.TemporaryDirectory() as tmp:
        twins = engines.Twins(Path(tmp))
        peer = twins.transformers("random-bf16", "float32", "eager")
        with torch.no_grad():
            out = peer(
                torch.tensor([TOKENS]),
                use_cache=False,
                output_hidden_states=True,
                output_router_logits=True,
            )
        kept = {"hidden_states": out.hidden_states, "logits": out.logits, "input_ids": TOKENS}
        if getattr(out, "router_logits", None):
            kept["router_logits"] = out.router_logits
        kept["input_ids"] = torch.tensor([TOKENS])
        torch.save(kept, tmp_path / "out.pt")
        report = check(twins.models["random-bf16-float32"], read_dump(tmp_path / "out.pt"))
    assert (report.verdict, report.unmatched) == ("pass", {}), report.reason
    names = {p.name for p in report.points}
    assert {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"} <= names
    assert "model.layers.2" not in names  # transformers keeps the norm of it


@pytest.mark.peers
def test_what_generate_returns_is_one_sequence(tmp_path):
    import torch

    from refmoe.oracle.selftest import power as bench

    engines = bench.engines()
    with engines.make.tempfile.TemporaryDirectory() as tmp:
        twins = engines.Twins(Path(tmp))
        peer = twins.transformers("random-bf16", "float32", "eager")
        wanted = {f"output_{end}": True for end in ("hidden_states", "logits", "scores")}
        out = peer.generate(
            torch.tensor([TOKENS]),
            attention_mask=torch.ones(1, len(TOKENS), dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            **wanted,
        )
        torch.save({k: v for k, v in out.items() if k != "past_key_values"}, tmp_path / "out.pt")
        dump = read_dump(tmp_path / "out.pt")
        report = check(twins.models["random-bf16-float32"], dump)
    rows = len(TOKENS) + 2
    assert dump.tokens == out.sequences[0, :rows].tolist()
    assert dump.partial == {"lm_head"}
    assert np.isnan(dump.arrays["lm_head"]).any(axis=1).sum() == rows - 3
    assert "scores" in dump.notes[0]
    assert (report.verdict, report.unmatched) == ("pass", {}), report.reason
    names = [p.name for p in report.points]
    assert names[:3] == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    assert names[3:] == ["model.norm", "lm_head"]


@pytest.mark.peers
def test_outputs_are_named_whatever_holds_them(traced, tmp_path):
    import safetensors.torch as safetensors
    import torch

    order = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    flat = {f"hidden_states.{i}": traced[name][None] for i, name in enumerate(order)}
    flat |= {f"router_logits.{i}": traced[f"model.layers.{i + 1}.mlp.gate"] for i in range(2)}
    flat |= {"logits": traced["lm_head"][None], "input_ids": np.array([TOKENS])}
    np.savez(tmp_path / "d.npz", **flat)
    tensors = {n: torch.tensor(x) for n, x in flat.items()}
    safetensors.save_file(tensors, tmp_path / "d.safetensors")
    nested = {"hidden_states": tuple(tensors[f"hidden_states.{i}"] for i in range(4))}
    nested |= {"router_logits": [tensors["router_logits.0"], tensors["router_logits.1"]]}
    nested |= {"logits": tensors["logits"], "input_ids": TOKENS}
    torch.save(nested, tmp_path / "d.pt")
    for suffix in ("npz", "safetensors", "pt"):
        dump = read_dump(tmp_path / f"d.{suffix}")
        assert dump.tokens == TOKENS
        assert set(dump.arrays) == {*order, "lm_head"} | {
            f"model.layers.{i}.mlp.gate" for i in (1, 2)
        }
        for name, x in dump.arrays.items():
            np.testing.assert_array_equal(x.reshape(traced[name].shape), traced[name])


def test_a_part_of_the_hidden_states_is_not_taken_for_the_last(traced, tmp_path):
    x = traced["model.norm"]
    np.savez(tmp_path / "d.npz", **{"hidden_states.0": x, "hidden_states.2": x})
    dump = read_dump(tmp_path / "d.npz")
    assert list(dump.arrays) == ["model.embed_tokens"]
    assert "hidden_states.2: others are missing" in dump.notes[0]
    np.savez(tmp_path / "d.npz", **{"router_logits.0": x, "last_hidden_state": x})
    dump = read_dump(tmp_path / "d.npz")
    assert list(dump.arrays) == ["model.norm"]
    assert "of which layers?" in dump.notes[0]


def test_token_ids_are_one_sequence_of_integers(traced, tmp_path):
    for ids in (np.zeros((2, 5)), np.array([1.5]), np.array([], int), np.array(["a"])):
        np.savez(tmp_path / "d.npz", input_ids=ids)
        with pytest.raises(InputError, match=r"input_ids is .*expected the token ids"):
            read_dump(tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", x=np.array(["a"]), y=traced["model.norm"])
    dump = read_dump(tmp_path / "d.npz")
    assert list(dump.arrays) == ["y"]
    assert dump.unread == {"x": "<U1, no numbers"}


# --- what could harm


@pytest.mark.peers
def test_nested_dicts_and_lists_are_flattened_and_do_not_swell(tmp_path):
    import torch

    t = torch.ones(2)
    torch.save({"a": {"b": t, "c": [t, {"d": (t,)}]}, 3: t, "text": "x"}, tmp_path / "d.pt")
    assert list(read_dump(tmp_path / "d.pt").arrays) == ["a.b", "a.c.0", "a.c.1.d.0", "3"]
    circle: dict = {}  # type: ignore[type-arg]
    circle["again"] = [circle]
    torch.save(circle, tmp_path / "d.pt")
    with pytest.raises(InputError, match="in a circle"):
        read_dump(tmp_path / "d.pt")
    laugh: list = []  # type: ignore[type-arg]
    for _ in range(18):
        laugh = [laugh] * 10
    torch.save({"x": laugh}, tmp_path / "d.pt")
    with pytest.raises(InputError, match="more than 1000000 entries"):
        read_dump(tmp_path / "d.pt")


@pytest.mark.peers
def test_a_small_file_makes_no_large_array(tmp_path):
    import torch

    shared = torch.arange(12.0).reshape(3, 1, 4)
    torch.save({"x": shared.expand(3, 64, 4)}, tmp_path / "d.pt")  # one key for 64 heads
    np.testing.assert_array_equal(read_dump(tmp_path / "d.pt").arrays["x"][:, 9], shared[:, 0])
    torch.save({"x": torch.ones(1).expand(10**9, 10**9)}, tmp_path / "d.pt")
    with pytest.raises(InputError, match="in a storage of 1 numbers"):
        read_dump(tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
        file.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(InputError, match="is said to have 10000000 bytes"):
        read_dump(tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(InputError, match="a memo of 2147483647 places in 9 bytes"):
        read_dump(tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("other", b"")
    with pytest.raises(InputError, match=r"without data\.pkl"):
        read_dump(tmp_path / "d.pt")


@pytest.fixture(scope="module")
def whole_files(traced, tmp_path_factory):
    """A dump in every format."""
    import safetensors.torch as safetensors
    import torch

    folder = tmp_path_factory.mktemp("whole")
    few = {n: x[:4, :7].copy() for n, x in traced.items() if n in ("model.norm", "model.layers.0")}
    few["input_ids"] = np.array(TOKENS[:4])
    np.savez(folder / "d.npz", **few)
    tensors = {n: torch.tensor(x) for n, x in few.items()}
    safetensors.save_file(tensors, folder / "d.safetensors", {"tokens": json.dumps(TOKENS[:4])})
    torch.save({"a": tensors, "b": [tensors["model.norm"]]}, folder / "d.pt")
    log = "number of input tokens = 4\n 1\n 2\n 3\n 4\n"
    (folder / "d.txt").write_text(log + llamacpp({n: x[:4] for n, x in traced.items()}))
    row = {"7": -0.5, "8": -2.0}
    ours = {"tokens": TOKENS[:3], "top_logprobs": [row, row, None]}
    (folder / "d.json").write_text(json.dumps(ours))
    for step in range(2):
        positions(folder / "d", step, 4 * step, 4)
        sglang(folder / "d", "non_intrusive__model.norm.output", few["model.norm"], 3, step=step)
    return folder


def test_a_member_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("a.npy", b"no header of numpy's")
    with pytest.raises(InputError, match=r"a.* is no array"):
        read_dump(tmp_path / "d.npz")


def kinds(dump) -> list[str]:  # type: ignore[no-untyped-def]
    return [x.dtype.kind for x in dump.arrays.values()]


@pytest.mark.peers
@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt", "txt", "json", "folder"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(whole_files, tmp_path, suffix):
    rng = np.random.default_rng(7)
    target = tmp_path / f"d.{suffix}"
    if suffix == "folder":
        target = tmp_path / "d"
        shutil.copytree(whole_files / "d", target)
        spoilt = sorted(target.iterdir())
    else:
        shutil.copy(whole_files / f"d.{suffix}", target)
        spoilt = [target]
    read_dump(target)
    refused = 0
    for trial in range(150):
        file = spoilt[trial % len(spoilt)]
        whole = file.read_bytes()
        raw = np.frombuffer(whole, np.uint8).copy()
        if trial % 3 == 0:
            raw = raw[: rng.integers(len(raw))]
        else:  # also where the names and the shapes are, at either end
            ends = min(len(raw), 400)
            at = rng.integers(len(raw) if trial % 3 == 1 else ends, size=rng.integers(1, 9))
            raw[at if trial % 2 else len(raw) - 1 - at] = rng.integers(256, size=len(at))
        file.write_bytes(raw.tobytes())
        said = None
        try:
            dump = read_dump(target)
        except InputError as e:
            said = str(e)
        refused += said is not None or bool(dump.unread)
        assert str(tmp_path) in said if said else set(kinds(dump)) <= set("fiub"), said
        file.write_bytes(whole)
    assert refused > 20


# --- top-k log-probabilities


def top(model, k: int = 5) -> list[dict[str, float]]:  # type: ignore[no-untyped-def]
    logits = model.logits(TOKENS).astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [{str(i): float(row[i]) for i in np.argsort(-row)[:k]} for row in logprobs]


def test_log_probabilities_alone_are_judged(random_bf16, tmp_path, capsys):
    rows = top(refmoe.load(random_bf16))
    file = tmp_path / "top.json"
    args = ["check", str(file), "--model", str(random_bf16)]
    file.write_text(json.dumps({"tokens": TOKENS, "top_logprobs": rows}))
    assert cli.main(args) == 0
    assert "PASS" in capsys.readouterr().out
    as_vllm = [None] + [
        {i: {"logprob": x, "rank": 1, "decoded_token": "?"} for i, x in row.items()}
        for row in rows[:-1]
    ]
    choice = {"prompt_token_ids": TOKENS, "prompt_logprobs": as_vllm, "logprobs": None}
    file.write_text(json.dumps({"choices": [choice]}))
    assert cli.main(args) == 0
    rows[4] = {i: x - 0.5 for i, x in rows[4].items()}
    file.write_text(json.dumps({"tokens": TOKENS, "top_logprobs": rows}))
    assert cli.main(args) == 1
    assert "FAULT: lm_head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "neither top_logprobs nor prompt_logprobs"),
        ('{"top_logprobs": []}', "neither top_logprobs"),
        ('{"top_logprobs": [3]}', "position 0 is no object"),
        ('{"top_logprobs": [{"a": -1}]}', "position 0 has a token id 'a'"),
        ('{"top_logprobs": [{"7": -9999}]}', "log-probability -9999"),
        ('{"top_logprobs": [{"7": 0.5}]}', "log-probability 0.5"),
        ('{"top_logprobs": [{"7": 0}, null]}', "every log-probability is 0"),
        ('{"tokens": [1], "top_logprobs": [{"7": -1}, null]}', "and other tokens"),
        ('{"tokens": [1.5], "top_logprobs": [{"7": -1}]}', "tokens is no list of integers"),
        ('{"tokens": "a", "top_logprobs": [{"7": -1}]}', "tokens is no list of integers"),
        ('{"top_logprobs": [{"7": -1, "07": -1}]}', "the same token twice"),
        ('{"top_logprobs": [{"7": 0, "8": 0}, {"9": -1}]}', "add up to 2; are they logarithms"),
        ('{"top_logprobs": [{"7": NaN}]}', "log-probability nan"),
        ('{"top_logprobs": [{"7": -1' + "0" * 400 + "}]}", "no object|log-probability"),
        ('{"top_logprobs": [{"99999999999999999999": -1}]}', "a token id 99999999999999999999"),
        ('{"choices": [3]}', "neither top_logprobs"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(text, said, tmp_path):
    (tmp_path / "top.json").write_text(text)
    with pytest.raises(InputError, match=said):
        read_dump(tmp_path / "top.json")


# --- adding a reader

MINE = """
import numpy as np
from refmoe.oracle.readers.arrays import dump_of_arrays
from refmoe.oracle.readers.base import Reader, register

def recognise(path):
    return path.is_file() and path.suffix == ".csv"

def read(path):
    rows = np.loadtxt(path, delimiter=",", ndmin=2)
    return dump_of_arrays(path, {"lm_head": rows}, list(range(1, len(rows) + 1)))

register(Reader("csv", ".csv", recognise, read))
"""


def test_a_reader_is_added_in_one_file(tmp_path):
    """A file in a copy of readers/ is found without another word."""
    package = tmp_path / "refmoe"
    shutil.copytree(ROOT / "refmoe", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "oracle" / "readers" / "csv_file.py").write_text(MINE, "utf-8")
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    (tmp_path / "x.doc").write_text("")
    code = (
        "import refmoe\n"
        "dump = refmoe.read_dump('x.csv')\n"
        "assert dump.arrays['lm_head'].tolist() == [[1, 2], [3, 4]] and dump.tokens == [1, 2]\n"
        "try: refmoe.read_dump('x.doc')\n"
        "except refmoe.InputError as e: print(e)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "x.doc: .doc suffix; supported: .csv, .json, .npz, .pt, .safetensors, .sse, .txt, "
        "or a folder of SGLang's dumper, or a folder with a file for each rank\n"
    )
