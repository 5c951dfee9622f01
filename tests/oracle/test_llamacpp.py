"""llama.cpp itself on refmoe's exports of tiny-k2: golden/make_llamacpp.py, make_perplexity.py."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import refmoe
from refmoe.engines import CONVENTIONS
from refmoe.fast.engine import engine
from refmoe.oracle.base_logits import divergence, read_base, write_base
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.words import report_lines
from refmoe.run.export import to_gguf

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "llamacpp"
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


@pytest.mark.parametrize("name", ["f32", "f32-ignored", "q8_0", "q8_0-ignored"])
def test_with_betas_by_hand_or_without_it_is_right_and_what_was_seen_is_told(name, exports):
    """Its own 32 and 1 depart from the model's: those of config.json are as good."""
    file = exports[name.removesuffix("-ignored")]
    model = refmoe.load(file, "float64", reference=True)
    dump = read_dump(GOLDEN / f"{name}.safetensors")
    report = refmoe.check(model, dump, engine="llama.cpp")
    assert report.verdict == "pass", report.reason
    by_hand = not name.endswith("-ignored")
    assert report.seen == ({"yarn_betas": "config"} if by_hand else {})
    told = "  convention: yarn_betas of config.json seen (llama.cpp: 32/1)"
    assert (told in report_lines(report)) == by_hand
    if by_hand:  # said beforehand, it is judged at once
        sides = ["yarn_betas=config"]
        report = refmoe.check(model, dump, engine="llama.cpp", conventions=sides)
        assert (report.verdict, report.seen) == ("pass", {})


@pytest.fixture(scope="module")
def perplexity() -> dict[str, Any]:
    """llama-perplexity's own run (golden/make_perplexity.py)."""
    document: dict[str, Any] = json.loads((GOLDEN / "perplexity.json").read_text("utf-8"))
    raw = (GOLDEN / "perplexity.base").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == document["base_sha256"]
    return document


def shift(model: refmoe.Model, chunks: list[list[int]], wide: np.ndarray) -> float:
    """How far float32 moves a logit: by refmoe's own, four times as much for another's order."""
    narrow = model.using(engine("float32", model.nx.conventions))
    off = float(np.abs(np.array([narrow.logits(c) for c in chunks]) - wide).max())
    assert off > 0
    return 4 * off


@pytest.mark.parametrize("name", ["f32", "f32-ignored"])
def test_its_divergence_is_what_llama_perplexity_prints(name, exports, perplexity):
    """Of one model from llama.cpp's own file of base logits, in five printed decimals.

    Logits off by δ move Σ p·(ln p - ln q) by at most 2δ, for ln q and its normaliser; llama.cpp's
    sums of it are of float32: 4 roundings of at most 16 + |z|. Its likeliest token is the same
    where the second is more than 2δ below.
    """
    base = read_base(GOLDEN / "perplexity.base")
    assert base.tokens.shape == (2, 64)
    sides = CONVENTIONS["llama.cpp"]
    if name == "f32":
        sides = replace(sides, yarn_betas=None)
    model = refmoe.load(exports["f32"], "float64", conventions=sides)
    chunks = base.tokens.tolist()
    wide = np.array([model.logits(c) for c in chunks])
    delta, z = shift(model, chunks, wide), wide[:, 32:63]
    second, first = np.moveaxis(np.sort(z, axis=-1)[..., -2:], -1, 0)
    assert (first - second).min() > 2 * delta
    kl, same = divergence(model, base)
    printed = perplexity["printed"][name]
    bound = 2 * delta + 4 * 2.0**-24 * (16 + np.abs(z).max()) + 0.5e-5
    assert abs(kl.mean() - float(printed["kl_mean"])) <= bound
    assert f"{100 * same:.3f}" == printed["same_top_percent"]
    assert bound < 1e-3 < float(perplexity["printed"]["f32-ignored"]["kl_mean"])


def test_a_base_file_is_llama_perplexitys_but_for_float32(exports, perplexity, tmp_path):
    """Header and tokens, its own of the text, byte for byte; the rest as float32 leaves logits."""
    theirs = read_base(GOLDEN / "perplexity.base")
    sides = replace(CONVENTIONS["llama.cpp"], yarn_betas=None)
    model = refmoe.load(exports["f32"], "float64", conventions=sides)
    ids = model.tokenizer.encode(perplexity["text"])
    assert write_base(model, ids[:128], 64, tmp_path / "x.base") == 2
    head = 20 + 4 * 128
    file = (tmp_path / "x.base").read_bytes()
    assert file[:head] == (GOLDEN / "perplexity.base").read_bytes()[:head]
    ours, chunks = read_base(tmp_path / "x.base"), theirs.tokens.tolist()
    delta = shift(model, chunks, np.array([model.logits(c) for c in chunks]))
    (a, b) = (np.ascontiguousarray(base.stored[..., :8]).view("<f4") for base in (ours, theirs))
    # float32 of numbers up to 32, a few times
    assert np.abs(a[..., 0] - b[..., 0]).max() <= (2 * delta + 4 * 32 * 2.0**-24) / 65535
    assert np.abs(a[..., 1] - b[..., 1]).max() <= 2 * delta + 4 * 32 * 2.0**-24
    step = float(a[..., 0].min())
    assert 2 * delta < step  # then two codes, each rounded, are at most one apart
    (p, q) = (np.ascontiguousarray(base.stored[..., 8:]).view("<u2") for base in (ours, theirs))
    assert np.abs(p.astype(int) - q).max() <= 1
