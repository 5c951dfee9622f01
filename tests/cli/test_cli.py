"""The verbs as a user meets them: output, JSON, exit codes, errors a person can act on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import refmoe
from refmoe import cli
from refmoe.cli.generate import _process_age
from tests.conftest import ROOT, heed_ctrl_c


def run(*args: object, capsys) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    code = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_prints_text_and_a_summary(capsys):
    code, out, err = run("generate", "My lord", "--max-new-tokens", 5, capsys=capsys)
    assert code == 0
    assert out.strip()
    assert "2 prompt + 5 new tokens" in err
    assert "tok/s" in err


def test_generate_json_has_the_promised_fields(capsys):
    code, out, _ = run("generate", "My lord", "--max-new-tokens", 4, "--json", capsys=capsys)
    document = json.loads(out)
    assert code == 0
    assert set(document) == {
        "text",
        "tokens",
        "prompt_tokens",
        "new_tokens",
        "seconds",
        "tok_s",
        "first_token_s",
        "store",
    }
    assert document["new_tokens"] == len(document["tokens"]) == 4
    assert document["text"] == refmoe.load().tokenizer.decode(document["tokens"])


def test_generate_takes_tokens_where_there_is_no_vocabulary(random_bf16, tmp_path, capsys):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(random_bf16 / name)
    (tmp_path / "t.json").write_text("[1, 2, 3]")
    args = ["generate", "--model", folder, "--max-new-tokens", 3]
    code, out, _ = run(*args, "--tokens", tmp_path / "t.json", capsys=capsys)
    assert code == 0
    assert len(out.split()) == 3
    code, _, err = run(*args, "hello", capsys=capsys)
    assert code == 2
    assert "tiktoken.model: no such file" in err


def test_inspect_tells_bytes_and_parameters(capsys):
    code, out, _ = run("inspect", "--json", capsys=capsys)
    document = json.loads(out)
    assert code == 0
    assert set(document) == {
        *("config", "tensors", "bytes", "dense", "parameters", "missing", "unread")
    }
    assert document["config"]["n_routed_experts"] == 40
    assert sum(document["bytes"].values()) == sum(
        np.prod(t["shape"]) * {"BF16": 2, "I32": 4, "F32": 4}[t["dtype"]]
        for t in document["tensors"].values()
    )
    code, out, _ = run("inspect", capsys=capsys)
    assert code == 0
    assert "routed experts" in out
    assert "missing: none" in out


def test_inspect_of_a_checkpoint_with_a_missing_tensor_fails(random_bf16, tmp_path, capsys):
    raw = json.loads((random_bf16 / "config.json").read_text())
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**raw, "n_shared_experts": 2, "num_hidden_layers": 5})
    )
    (folder / "model.safetensors").symlink_to(random_bf16 / "model.safetensors")
    code, out, _ = run("inspect", "--model", folder, "--json", capsys=capsys)
    assert code == 1
    assert "model.layers.4.input_layernorm.weight" in json.loads(out)["missing"]
    code, _, err = run("generate", "x", "--model", folder, capsys=capsys)
    assert code == 2
    assert "is a shard missing?" in err


def test_trace_writes_the_logits_of_every_position(random_int4, tmp_path, capsys):
    tokens, out = tmp_path / "tokens.json", tmp_path / "trace.safetensors"
    tokens.write_text("[5, 6, 7]")
    args = ["trace", "--model", random_int4, "--tokens", tokens, "--numerics", "float64"]
    code, text, _ = run(*args, "--points", "lm_head", "--out", out, capsys=capsys)
    assert code == 0
    assert "1 points of 1 sequences" in text
    arrays = safetensors.numpy.load_file(out)
    assert set(arrays) == {"lm_head"}
    assert arrays["lm_head"].dtype == np.float64
    np.testing.assert_array_equal(
        arrays["lm_head"], refmoe.load(random_int4, "float64").logits([5, 6, 7])
    )
    tokens.write_text("[[5, 6, 7], [8]]")
    code, _, _ = run(*args, "--points", "model.layers.*.mlp.gate#*", "--out", out, capsys=capsys)
    arrays = safetensors.numpy.load_file(out)
    assert code == 0
    assert arrays["1/model.layers.2.mlp.gate#experts"].shape == (1, 4)
    assert len(arrays) == 2 * 2 * 2
    code, _, err = run(*args, "--points", "lm_heads", "--out", out, capsys=capsys)
    assert code == 2
    assert "no point matches 'lm_heads'" in err


def test_an_interrupted_trace_leaves_no_file(random_int4, tmp_path, monkeypatch):
    def fail(arrays, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    args = ["trace", "--model", random_int4, "--text", "x", "--out", tmp_path / "t.safetensors"]
    assert cli.main([str(a) for a in args]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}", "[1.5]", '["a"]', "[true]", "[[1], 2]"])
def test_a_bad_tokens_file_is_refused(tmp_path, content, capsys):
    (tmp_path / "t.json").write_text(content)
    code, _, err = run(
        "trace", "--tokens", tmp_path / "t.json", "--out", tmp_path / "o", capsys=capsys
    )
    assert code == 2
    assert "t.json" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "x", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["generate", "x", "--temperature", "-1"], "temperature = -1.0"),
        (["generate", "x", "--max-new-tokens", "-1"], "max_new_tokens = -1"),
        (["generate", ""], "the prompt is empty"),
        (["tok", "--decode", "1 x"], "--decode takes token ids"),
        (["tok", "--decode", "99999"], "token 99999"),
    ],
)
def test_bad_use_exits_2_with_a_reason(args, says, capsys):
    code, out, err = run(*args, capsys=capsys)
    assert code == 2
    assert out == ""
    assert says in err


def test_tok_goes_both_ways(capsys):
    _, out, _ = run("tok", "Good morrow<|im_end|>", capsys=capsys)
    ids, pieces = out.splitlines()
    assert "2050" not in ids.split()
    assert pieces.startswith('"G')
    _, text, _ = run("tok", "--decode", ids, capsys=capsys)
    assert text == "Good morrow<|im_end|>\n"
    _, out, _ = run("tok", "--special", "Good morrow<|im_end|>", capsys=capsys)
    assert out.splitlines()[0].split()[-1] == "2050"


def test_tok_renders_messages_and_compares_with_another_engines_ids(tmp_path, capsys):
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "Who art thou?"}]')
    args = ["tok", "--messages", tmp_path / "m.json"]
    _, out, _ = run(*args, "--json", capsys=capsys)
    document = json.loads(out)
    assert document["text"].endswith(
        "Who art thou?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert "".join(document["pieces"]) == document["text"]
    assert document["difference"] is None
    (tmp_path / "ids.json").write_text(json.dumps(document["tokens"]))
    code, out, _ = run(*args, "--against", tmp_path / "ids.json", capsys=capsys)
    assert (code, out) == (0, f"the same {len(document['tokens'])} tokens\n")
    (tmp_path / "ids.json").write_text(json.dumps([2048, *document["tokens"]]))
    code, out, _ = run(*args, "--against", tmp_path / "ids.json", capsys=capsys)
    assert code == 1
    assert out.startswith("special tokens: at byte 0, token 0: the ids differ by a BOS in front")
    code, _, err = run("tok", capsys=capsys)
    assert (code, err) == (2, "refmoe: give a TEXT or --messages FILE\n")


@pytest.mark.parametrize(
    "theirs",
    [
        lambda ids: {"count": len(ids), "max_model_len": 9, "tokens": ids},
        lambda ids: {"tokens": [{"id": i, "piece": "?"} for i in ids]},
        lambda ids: [{"id": i, "text": "?"} for i in ids],
        lambda ids: {"input_ids": [ids], "attention_mask": [[1] * len(ids)]},
        lambda ids: {"prompt_token_ids": ids, "choices": []},
        lambda ids: {"choices": [{"prompt_token_ids": ids, "token_ids": [5]}]},
        lambda ids: {"choices": [{"raw_output": {"prompt_token_ids": ids}}]},
        lambda ids: {"meta_info": {"input_token_logprobs": [[None, i, None] for i in ids]}},
    ],
)
def test_tok_reads_what_servers_say_of_a_prompt(theirs, tmp_path, capsys):
    text = "Good morrow, my lord"
    ids = refmoe.load().tokenizer.encode(text)
    (tmp_path / "t.json").write_text(json.dumps(theirs(ids)))
    args = ["tok", text, "--against", tmp_path / "t.json"]
    assert run(*args, capsys=capsys)[:2] == (0, f"the same {len(ids)} tokens\n")
    (tmp_path / "t.json").write_text(json.dumps(theirs([*ids, 7])))
    assert run(*args, capsys=capsys)[0] == 1


@pytest.mark.parametrize(
    "theirs",
    [
        lambda n: {"usage": {"prompt_tokens": n}, "choices": []},
        lambda n: {"content": "x", "tokens": [5, 6], "tokens_evaluated": n},
        lambda n: {"response": "x", "prompt_eval_count": n},
    ],
)
def test_tok_compares_numbers_where_a_response_has_no_ids(theirs, tmp_path, capsys):
    text = "Good morrow, my lord"
    n = len(refmoe.load().tokenizer.encode(text))
    args = ["tok", text, "--against", tmp_path / "t.json"]
    (tmp_path / "t.json").write_text(json.dumps(theirs(n)))
    code, out, _ = run(*args, capsys=capsys)
    assert code == 0
    assert f"{n} tokens in both" in out
    assert "only their number is compared" in out
    (tmp_path / "t.json").write_text(json.dumps(theirs(n + 1)))
    code, out, _ = run(*args, capsys=capsys)
    assert code == 1
    assert f"{n} tokens here, {n + 1} there" in out
    assert "a BOS in front" in out
    (tmp_path / "t.json").write_text('{"choices": []}')
    code, _, err = run(*args, capsys=capsys)
    assert code == 2
    assert "no token ids in it" in err


def test_tiny_writes_a_checkpoint_that_opens(tmp_path, capsys):
    folder = tmp_path / "t"
    args = ["tiny", folder, "--format", "int4", "--seed", 3, "--shards", 2]
    code, _, err = run(
        *args, "--shape", "n_group=3", "topk_group=2", "n_routed_experts=12", capsys=capsys
    )
    assert code == 0
    assert err == "refmoe: warning: qk_rope_head_dim = n_routed_experts = 12\n"
    assert refmoe.load(folder).cfg.n_group == 3
    code, _, err = run(*args, capsys=capsys)
    assert code == 2
    assert "not empty" in err


def test_a_nonfinite_weight_is_named(random_bf16, tmp_path, capsys):
    from refmoe.weights.checkpoint import read_header

    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "config.json").symlink_to(random_bf16 / "config.json")
    stored = read_header(random_bf16 / "model.safetensors")[
        "model.layers.2.mlp.shared_experts.up_proj.weight"
    ]
    raw = bytearray((random_bf16 / "model.safetensors").read_bytes())
    raw[stored.start : stored.start + 2] = b"\xc0\x7f"  # NaN
    (folder / "model.safetensors").write_bytes(bytes(raw))
    (tmp_path / "t.json").write_text("[1, 2]")
    code, _, err = run(
        "generate", "--model", folder, "--tokens", tmp_path / "t.json", capsys=capsys
    )
    assert code == 1
    assert "model.layers.2.mlp.shared_experts.up_proj: the first value that is not finite" in err


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "refmoe", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=heed_ctrl_c,
    )


def test_ctrl_c_ends_with_a_summary_and_a_clean_line():
    process = start("generate", "My lord", "--max-new-tokens", "4000")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert "interrupted]" in err
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_error():
    process = start("generate", "My lord", "--max-new-tokens", "200")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 0


def test_the_prompt_may_come_from_standard_input():
    process = subprocess.run(
        [sys.executable, "-m", "refmoe", "generate", "--json", "--max-new-tokens", "1"],
        input="My lord",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(process.stdout)["prompt_tokens"] == 2


@pytest.mark.system
def test_the_age_of_the_process_is_measured_from_its_start():
    age = _process_age()
    if age is None:
        pytest.skip("this system does not tell when a process started")
    time.sleep(0.05)
    later = _process_age()
    assert later is not None
    assert 0 < age < later
    assert os.getpid() > 0


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, capsys):
    (tmp_path / "t.json").write_text("[1, 2]")
    args = ["trace", "--tokens", str(tmp_path / "t.json"), "--out", str(tmp_path / "no" / "x")]
    assert cli.main(args) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_several_prompts_are_judged_each_and_what_fits_none_is_told(tmp_path, capsys):
    (tmp_path / "t.json").write_text("[[1, 2], [3]]")
    np.savez(tmp_path / "d.npz", lm_head=np.zeros((2, 3)))
    args = ["check", str(tmp_path / "d.npz"), "--tokens", str(tmp_path / "t.json")]
    assert cli.main(args) == 2
    shown = capsys.readouterr().out
    assert "UNDECIDABLE" in shown
    assert "could not be fitted, first lm_head" in shown
