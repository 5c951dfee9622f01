"""llama.cpp itself on refmoe's exports of tiny-k2, recorded (golden/make_llamacpp.py)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import refmoe
from refmoe.config import CONVENTIONS
from refmoe.oracle.readers import read_dump
from refmoe.run.export import to_gguf

pytest.importorskip("gguf", reason="the gguf package is not installed")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "llamacpp"
EXPORTS = {"f32": ("f32", "f32", "f32"), "q8_0": ("q8_0", "f32", "q4_0")}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for name, kinds in EXPORTS.items():
        to_gguf(refmoe.load(), folder / f"{name}.gguf", *kinds)
    return {name: folder / f"{name}.gguf" for name in EXPORTS}


def recorded(name: str) -> tuple[list[int], np.ndarray]:
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as f:
        assert f.metadata()["engine"].startswith("llama.cpp")
        return json.loads(f.metadata()["tokens"]), f.get_tensor("lm_head")


@pytest.mark.parametrize("name", ["f32", "f32-ignored"])
def test_the_witness_agrees_in_float32(name, exports):
    """F32 weights and cache: 1e-5 of the largest logit, under its conventions (asked 1e-5)."""
    tokens, theirs = recorded(name)
    sides = CONVENTIONS["llama.cpp"]  # whose betas are 32 and 1 where nobody gives them
    if name == "f32":
        sides = replace(sides, yarn_betas=None)
    truth = refmoe.load(exports["f32"], "float64", reference=True, conventions=sides).logits(tokens)
    assert np.sqrt(((theirs - truth) ** 2).mean() / (truth**2).mean()) <= 1e-5
    fast = refmoe.load(exports["f32"], conventions=sides).logits(tokens)
    assert np.sqrt(((theirs - fast) ** 2).mean() / (truth**2).mean()) <= 1e-5


def test_as_people_run_it_it_is_within_its_profile(exports):
    """Q4_0 and Q8_0, 8-bit activations, f16 cache; betas given by hand."""
    model = refmoe.load(exports["q8_0"], "float64", reference=True)
    dump = read_dump(GOLDEN / "q8_0.safetensors")
    report = refmoe.check(model, dump, profile="llama.cpp")
    assert report.verdict == "pass", report.reason


def test_without_its_betas_it_is_caught_and_they_are_named(exports):
    model = refmoe.load(exports["q8_0"], "float64", reference=True)
    dump = read_dump(GOLDEN / "q8_0-ignored.safetensors")
    report = refmoe.check(model, dump, profile="llama.cpp")
    assert report.verdict == "fault"
    assert report.cause is not None
    assert report.cause.id == "yarn-betas"
    assert "ggml-org/llama.cpp#18013" in report.cause.references
    # held to llama.cpp's own conventions it is what it should be, and the side it takes is told
    report = refmoe.check(model, dump, engine="llama.cpp")
    assert report.verdict == "pass"
    assert "yarn_betas" in report.conventions
