"""Others' layouts: SGLang's folders, llama.cpp's prints, Hugging Face's outputs, logprobs."""

import json
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe import cli
from refmoe.config import InputError
from refmoe.oracle.compare import check
from refmoe.oracle.readers import read_dump

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
    torch = pytest.importorskip("torch", reason="the peers extra is not installed")
    folder.mkdir(exist_ok=True)
    full = {"step": 0, "rank": 0, "dump_index": index, "name": name, **tags}
    value = torch.tensor(x) if isinstance(x, np.ndarray) else x
    meta = {**full, "world_rank": 0, "world_size": 1, "dims": None, "sglang_parallel_info": {}}
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


def test_names_given_by_hand_stand_beside_their_layer(traced, tmp_path):
    sglang(tmp_path / "d", "self_attn", traced["model.layers.2.self_attn"], layer_id=2)
    assert list(read_dump(tmp_path / "d").arrays) == ["model.layers.2.self_attn"]


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
        assert (name in dump.partial) == (not known.all())
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


def test_a_print_that_is_cut_off_is_refused(traced, tmp_path):
    text = llamacpp(traced)
    (tmp_path / "d.txt").write_text(text[: text.index("sum") - 40])
    with pytest.raises(InputError, match=r"inp_embd .* is the file cut off"):
        read_dump(tmp_path / "d.txt")
    (tmp_path / "d.txt").write_text("llama_perf: nothing here\n")
    with pytest.raises(InputError, match="no tensor of llama-eval-callback"):
        read_dump(tmp_path / "d.txt")


# --- Hugging Face


def test_hidden_states_and_logits_of_transformers_are_points(tmp_path):
    torch = pytest.importorskip("torch", reason="the peers extra is not installed")
    pytest.importorskip("mlx_lm", reason="the peers extra is not installed")
    from refmoe.oracle import bench

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
        ('{"top_logprobs": [{"a": -1}]}', "position 0 is no object"),
        ('{"top_logprobs": [{"7": -9999}]}', "log-probability -9999"),
        ('{"top_logprobs": [{"7": 0.5}]}', "log-probability 0.5"),
        ('{"top_logprobs": [{"7": 0}, null]}', "every log-probability is 0"),
        ('{"tokens": [1], "top_logprobs": [{"7": -1}, null]}', "and other tokens"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(text, said, tmp_path):
    (tmp_path / "top.json").write_text(text)
    with pytest.raises(InputError, match=said):
        read_dump(tmp_path / "top.json")
