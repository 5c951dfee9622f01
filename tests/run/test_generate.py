"""Decoding step by step is the whole sequence, whatever the cache; kernels compile once."""

import os
import subprocess
import sys

import numpy as np
import pytest

import refmoe
from refmoe.cli import main
from refmoe.run import generate as run_generate
from refmoe.run.generate import generation_decoder, prefill, step


@pytest.fixture
def with_kernels(monkeypatch):
    """No model is so tiny that it is generated from without kernels."""
    monkeypatch.setattr(run_generate, "TINY", 0)


def test_decoding_by_steps_is_the_whole_sequence(small, with_kernels):
    """As exact as the definition in float32; 16-bit activations are 64 times finer than bf16's."""
    tokens = [5, 17, 2, 44, 9, 30, 11, 3]
    truth = refmoe.load(small, "float64", reference=True).logits(tokens)[2:]

    def off(logits: np.ndarray) -> float:
        return float(np.sqrt(((logits - truth) ** 2).mean()))

    def stepped(int4: str) -> np.ndarray:
        decoder = generation_decoder(refmoe.load(small), int4)
        memory = decoder.caches()
        rows = [prefill(decoder, tokens[:3], memory)]
        return np.array(rows + [step(decoder, token, memory) for token in tokens[3:]])

    plain = off(refmoe.load(small, reference=True).logits(tokens)[2:])
    coarse = off(refmoe.load(small, "bfloat16", reference=True).logits(tokens)[2:])
    assert off(stepped("exact")) <= 4 * plain
    assert off(stepped("fast")) <= coarse / 16


def test_a_bf16_cache_costs_less_than_an_engine_in_bf16(small, with_kernels):
    """It makes two of the roundings that such an engine makes at every point, and they are seen."""
    tokens = [5, 17, 2, 44, 9, 30, 11, 3]
    truth = refmoe.load(small, "float64", reference=True).logits(tokens)[2:]

    def off(cache: str) -> float:
        decoder = generation_decoder(refmoe.load(small), "exact", cache)
        memory = decoder.caches()
        rows = [prefill(decoder, tokens[:3], memory)]
        rows += [step(decoder, token, memory) for token in tokens[3:]]
        return float(np.sqrt(((np.array(rows) - truth) ** 2).mean()))

    coarse = refmoe.load(small, "bfloat16", reference=True).logits(tokens)[2:]
    assert off("float32") < off("bf16") < np.sqrt(((coarse - truth) ** 2).mean())


def test_a_first_compilation_is_told(tmp_path):
    script = "import sys; from refmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    generate = ["generate", "My", "--max-new-tokens", "2"]  # of a tiny model: needs no kernels
    trace = ["trace", "--text", "My", "--points", "lm_head", "--out", str(tmp_path / "out")]
    told = []
    for argv in (generate, trace, trace):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", script, *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        told.append("compiling kernels for this processor" in done.stderr)
    assert told == [False, True, False]


def test_no_number_of_threads_below_one(capsys):
    assert main(["generate", "My", "--threads", "0"]) == 2
    assert "at least one" in capsys.readouterr().err
