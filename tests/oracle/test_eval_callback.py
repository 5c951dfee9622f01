"""Logs that llama-eval-callback wrote: golden/make_eval_callback.py."""

import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe.oracle.check import check, judge_dump
from refmoe.oracle.readers.dump import read_dump
from refmoe.run.export import to_gguf

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "llamacpp"
ABOUT = json.loads((GOLDEN / "eval-callback.json").read_text("utf-8"))
TOKENS = ABOUT["tokens"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    with tarfile.open(GOLDEN / "eval-callback.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    out = {}
    for name, (dense, experts) in {"f32": ("f32", "f32"), "q8_0": ("q8_0", "q4_0")}.items():
        to_gguf(refmoe.load(), folder / f"{name}.gguf", dense=dense, experts=experts)
        out[name] = refmoe.load(folder / f"{name}.gguf", "float64", reference=True)
    return out


def assert_same(a, b):
    assert a.arrays.keys() == b.arrays.keys()
    for name, x in a.arrays.items():
        np.testing.assert_array_equal(x, b.arrays[name], err_msg=name)


@pytest.mark.parametrize("name", ["f32.txt", "f32-verbose.log", "f32-json.log"])
def test_the_same_run_in_every_way_people_log_it(name, logs):
    dump, both = read_dump(logs / name), read_dump(logs / "f32.log")
    assert both.tokens == TOKENS
    assert dump.tokens == (None if name == "f32.txt" else TOKENS)
    assert_same(dump, both)
    assert len(both.arrays) == 76
    assert not both.unread
    assert not any("skipped" in note for note in both.notes + dump.notes)


def test_a_healthy_run_passes(logs, models):
    dump = read_dump(logs / "f32.log")
    report = check(models["f32"], dump, profile="float32", keep=False)
    assert report.verdict == "pass", report.reason
    assert report.unmatched == {}
    # each block of the network, as far as the corners of a print go
    assert report.compared == 76
    assert {"model.layers.0.self_attn#k_pe", "model.layers.3.mlp.shared_experts", "lm_head"} <= {
        p.name for p in report.points
    }


@pytest.mark.parametrize("name", ["f32-own.log", "q8_0-own.log"])
def test_its_own_betas_pass_as_its_own_and_are_named_elsewhere(name, logs, models):
    model = models[name.partition("-")[0]]
    dump = read_dump(logs / name)
    assert dump.tokens == TOKENS
    report = check(model, dump, engine="llama.cpp", keep=False)
    assert report.verdict == "pass", report.reason
    assert "yarn_betas" in report.conventions
    found = judge_dump(model, dump, profile="llama.cpp", keep=False, explain=name[0] == "q")
    report = found.report
    assert (report.verdict, report.point) == ("fault", "model.layers.0.self_attn#q_pe")
    assert name[0] == "f" or (report.cause is not None and report.cause.id == "yarn-betas")


def test_as_people_run_it_it_is_within_its_profile(logs, models):
    report = check(models["q8_0"], read_dump(logs / "q8_0.log"), profile="llama.cpp", keep=False)
    assert report.verdict == "pass", report.reason


def test_chunks_of_a_prompt_are_one_sequence(logs, models, tmp_path):
    dump = read_dump(logs / "f32-chunks.log")
    assert dump.tokens == TOKENS
    assert "4 forward passes are read as one sequence of 14 rows" in dump.notes
    # chunks of four rows are printed whole, and so are their choices of experts
    assert dump.arrays["model.layers.1.mlp.gate#experts"].shape == (14, 6)
    report = check(models["f32"], dump, profile="float32", keep=False)
    assert report.verdict == "pass", report.reason
    assert report.router["flips"] == 0
    assert "model.layers.1.mlp.gate#weights" in {p.name for p in report.points}
    # standard output alone: chunks are of one size but for the last
    text = (logs / "f32-chunks.log").read_text("utf-8")
    alone = "".join(x for x in text.splitlines(True) if not re.match(r"\d+\.\d\d\.", x))
    (tmp_path / "alone.txt").write_text(alone)
    assert read_dump(tmp_path / "alone.txt").tokens is None
    assert_same(read_dump(tmp_path / "alone.txt"), dump)
    # of the third chunk's second row, one number
    third = [m.start() for m in re.finditer(r" l_out-1 = \(f32\)        ADD", text)][2]
    row = re.compile(r"\[( +-?\d+\.\d{4}){1}, .*\n")
    start = row.search(text, row.search(text, third).end()).start()
    wrong = text[:start] + re.sub(r"-?\d+\.\d{4}", "9.7531", text[start:], count=1)
    (tmp_path / "wrong.log").write_text(wrong)
    changed = read_dump(tmp_path / "wrong.log")
    where = np.argwhere(changed.arrays["model.layers.1"] != dump.arrays["model.layers.1"])
    assert [9, 0] in where.tolist()
    model = models["f32"]
    report = judge_dump(model, changed, profile="float32", keep=False, explain=False).report
    assert (report.verdict, report.point) == ("fault", "model.layers.1")


def test_of_two_prompts_the_longest_is_read(logs, tmp_path):
    text = (logs / "f32-chunks.log").read_text("utf-8")
    short = text.replace("number of input tokens = 14", "number of input tokens = 4", 1)
    short = short[: [m.start() for m in re.finditer(" embd = ", short)][1]]  # its first chunk
    (tmp_path / "two.log").write_text(short + "\n" + (logs / "f32.log").read_text("utf-8"))
    dump = read_dump(tmp_path / "two.log")
    assert dump.tokens == TOKENS
    assert "1 forward passes are of other prompts and are not read" in dump.notes
    assert_same(dump, read_dump(logs / "f32.log"))


STRAY = "W ggml_backend_sched: 12.5 MiB at [1.25] of 0.1234, reserving\n"


def test_what_else_writes_into_a_tensor_is_skipped(logs, tmp_path):
    lines = (logs / "f32.log").read_text("utf-8").splitlines(True)
    rows = [i for i, line in enumerate(lines) if re.match(r" {12}\[ ", line)]
    dice = random.Random(0)
    for i in sorted(dice.sample(rows, 40), reverse=True):
        cut = dice.choice([0, 12, 13, 27, lines[i].rfind("]"), len(lines[i])])
        # the tool prints a number at a time: a line of another stream may come between any two
        cut = lines[i].find(",", cut) if 13 < cut < lines[i].rfind("]") else cut
        lines[i] = lines[i][:cut] + STRAY + lines[i][cut:]
    (tmp_path / "stray.log").write_text("".join(lines))
    dump, clean = read_dump(tmp_path / "stray.log"), read_dump(logs / "f32.log")
    assert not dump.unread
    assert_same(dump, clean)
    (note,) = [n for n in dump.notes if "skipped" in n]
    assert re.match(r"\d+ lines inside tensors are no part of them .* first 'W ggml_back", note)


def test_a_damaged_tensor_is_told_and_forbids_a_pass(logs, models, tmp_path):
    text = (logs / "f32.log").read_text("utf-8")
    start = text.index(" attn_norm-1 = (f32)")
    row = re.compile(r" {12}\[ .*\n").search(text, start)
    (tmp_path / "d.log").write_text(text[: row.start()] + text[row.end() :])
    dump = read_dump(tmp_path / "d.log")
    assert "model.layers.1.input_layernorm" not in dump.arrays
    said = "[256, 14, 1, 1], of which 30 numbers are printed"
    assert dump.unread == {"model.layers.1.input_layernorm": said}
    assert any(said in note for note in dump.notes)
    assert len(dump.arrays) == 75
    report = check(models["f32"], dump, profile="float32", runs=6, keep=False)
    assert report.verdict == "undecidable"
    assert "model.layers.1.input_layernorm" in report.reason
    # without its header it is nobody's
    head = text.rindex("\n", 0, start) + 1
    (tmp_path / "d.log").write_text(text[:head] + text[text.index("\n", start) + 1 :])
    dump = read_dump(tmp_path / "d.log")
    assert any(note.startswith("1 tensors have no line that says") for note in dump.notes)


def test_a_log_may_end_anywhere(logs, tmp_path):
    text = (logs / "f32.log").read_text("utf-8")
    whole, file = read_dump(logs / "f32.log"), tmp_path / "cut.log"
    first = text.index(" norm-0 = ")
    dice = random.Random(1)
    for _ in range(40):
        file.write_text(text[: dice.randrange(first, len(text))])
        dump = read_dump(file)
        assert not dump.unread
        assert dump.tokens == TOKENS
        assert not any("skipped" in note for note in dump.notes)
        for name, x in dump.arrays.items():
            known = ~np.isnan(x)
            assert known.any(), name
            np.testing.assert_array_equal(x[known], whole.arrays[name][known], err_msg=name)
    dump = read_dump(logs / "q8_0-own.log")  # as it came
    assert any(note.startswith("the log ends within") for note in dump.notes)
    assert "lm_head" not in dump.arrays
