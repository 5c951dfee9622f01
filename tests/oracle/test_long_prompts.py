"""What a long prompt costs `check`: memory grows with the prompt, and how far it is is told.

Scores and probabilities are [T, H, T]: of 64 heads and 1,500 tokens, 1.2 GB each in float64.
"""

import tracemalloc

import numpy as np
import pytest

import refmoe
from refmoe.model import mla
from refmoe.oracle.check import check, judge_dump
from refmoe.oracle.readers.base import Dump
from refmoe.progress import steps

LIMIT = 1 << 15  # scores at once, in place of 128 MB


@pytest.fixture
def largest(monkeypatch):
    """The most scores at once, in blocks small enough for these prompts."""
    seen: list[int] = []
    original = mla.softmax

    def softmax(s):
        seen.append(s.size)
        return original(s)

    monkeypatch.setattr(mla, "SCORES", LIMIT)
    monkeypatch.setattr(mla, "softmax", softmax)
    return seen


def dump_of(model, tmp_path, T: int, ends: tuple[str, ...]) -> Dump:
    tokens = [i * 37 % 500 for i in range(T)]
    points = [f"model.layers.*{end}" for end in ends]
    return Dump(tmp_path, refmoe.trace(model, tokens, [*points, "lm_head"]), tokens, "float32")


def test_scores_that_no_dump_holds_are_never_whole(random_bf16, tmp_path, largest):
    model = refmoe.load(random_bf16)
    heads, T = model.cfg.num_attention_heads, 150
    dump = dump_of(model, tmp_path, T, (".self_attn", "q_b_proj"))
    del largest[:]
    report = check(model, dump, runs=2, keep=False)
    assert report.verdict == "pass", report.reason
    assert "model.layers.1.self_attn#scores" in report.missing
    assert "model.layers.1.self_attn#scores" in report.judged_with("model.layers.1.self_attn")
    assert max(largest) <= LIMIT < heads * T * T
    # each run in several blocks, which together are every score once
    assert sum(largest) == (2 + 2) * model.cfg.num_hidden_layers * heads * T * T


def test_scores_that_a_dump_holds_are_compared_whole(random_bf16, tmp_path, largest):
    model = refmoe.load(random_bf16)
    heads, T = model.cfg.num_attention_heads, 100
    dump = dump_of(model, tmp_path, T, ("#probs",))
    del largest[:]
    report = check(model, dump, runs=2, keep=False)
    assert report.verdict == "pass", report.reason
    assert "model.layers.1.self_attn#probs" in {p.name for p in report.points}
    assert max(largest) == heads * T * T
    wrong = dump.arrays["model.layers.1.self_attn#probs"]
    wrong[90] = wrong[90, :, ::-1]
    report = check(model, dump, runs=2, keep=False, profile="float32")
    assert (report.verdict, report.point) == ("fault", "model.layers.1.self_attn#probs")


def test_memory_grows_with_the_prompt_and_not_with_its_square(random_bf16, tmp_path, largest):
    model = refmoe.load(random_bf16)
    peaks = []
    for T in (120, 480):
        dump = dump_of(model, tmp_path, T, (".self_attn", "#context"))
        tracemalloc.start()
        check(model, dump, runs=2, keep=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]  # four times the tokens, sixteen times the scores


def test_the_noise_of_blocks_is_that_of_whole_scores(random_bf16, tmp_path):
    """The errors of scores that nobody wants are drawn as one: the level is that of two."""
    model = refmoe.load(random_bf16)
    dump = dump_of(model, tmp_path, 40, ("self_attn#context",))
    levels = []
    # shown whole and never gone on with, scores get errors as any other point
    sketches = refmoe.trace(model, dump.tokens, ["*#scores", "*#probs"], sketched=True)
    for more in ({}, sketches):
        own = Dump(tmp_path, dump.arrays | more, dump.tokens, "bfloat16")
        found = judge_dump(model, own, runs=12, keep=False, explain=False)
        noise = found.envelope.noise["model.layers.1.self_attn#context"]
        levels.append(np.sqrt((noise**2).mean()))
    assert abs(levels[0] / levels[1] - 1) < 0.05


def test_how_far_it_is_is_said(random_bf16, tmp_path, capsys, monkeypatch):
    model = refmoe.load(random_bf16)
    dump = dump_of(model, tmp_path, 5, (".mlp",))
    dump.arrays["model.layers.1.mlp"] *= 2
    said = []
    judge_dump(model, dump, runs=3, keep=False, progress=lambda *what: said.append(what))
    runs = [("emulated runs of float32", i, 3) for i in range(3)]
    assert said[:3] == runs
    name, done, total = said[-1]
    assert name == "known faults tried"
    assert done == total - 1
    monkeypatch.setattr("refmoe.progress.EVERY", 0.0)
    with steps() as tell:
        tell(*runs[1])
    assert "refmoe: emulated runs of float32: step 1 of 3, 0 s" in capsys.readouterr().err
