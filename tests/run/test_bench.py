"""The benchmarks: what they print, not how fast."""

import json

import pytest

import refmoe
from refmoe.cli import main
from refmoe.run.bench import base as bench_base
from refmoe.run.bench import kernels as bench_kernels
from refmoe.weights import dense
from refmoe.weights.checkpoint import Checkpoint


def test_bench_kernels_prints_its_document(capsys, monkeypatch):
    monkeypatch.setattr(bench_base, "READ", 1 << 22)
    monkeypatch.setattr(bench_base, "ROUNDS", 1)
    document = bench_kernels.measure_kernels(bench_kernels.NAMES, (1,), (1, 3), ((256, 256),))
    assert list(document["stream_gbs"]) == ["1"]
    assert [r["name"] for r in document["kernels"]] == [
        n for n in bench_kernels.NAMES for _ in range(2)
    ]
    for row in document["kernels"]:
        assert row["ratio"] > 0
        assert row["rel_error"] <= (5e-5 if row["name"].endswith("-fast") else 5e-7)
    assert len(bench_kernels.format_kernels(document)) == 3 + len(document["kernels"])


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_bench_of_a_model_says_what_it_measured(what, sliced, monkeypatch, capsys):
    monkeypatch.setattr(bench_base, "READ", 1 << 22)
    command = ["bench", what, "--model", str(sliced), "--prompt", "8", "--dense", "q8", "--json"]
    assert main(command) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["tok_s"] > 0
    assert d["dense"] == "q8"
    assert {"attention", "router", "experts", "shared experts", "dense mlp", "head"} <= set(
        d["parts"]
    )
    if what == "decode":
        decoder = refmoe.load(sliced, dense="q8").decoder
        cfg = decoder.cfg
        expert = sum(m.nbytes for m in decoder.experts[1](0))
        dense_bytes = dense.sizes(Checkpoint.open(sliced))[1]
        least = cfg.num_experts_per_tok * expert + dense_bytes
        assert least < d["bytes_per_token"] < 1.2 * least
    assert main([a for a in command if a != "--json"]) == 0
    assert "of what reading alone" in capsys.readouterr().out
