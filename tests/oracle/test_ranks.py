"""Dumps of a parallel engine's ranks: one rank's alone, and all of them in a folder.

A real vLLM run of tiny-k2 on one rank (golden/vllm) is split as two and four ranks hold it; partial
sums are computed from its own contexts and activations, and rounded as it rounds.
"""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

import refmoe
from refmoe.model.matrix import dequantize
from refmoe.oracle.check import check
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump
from tests.conftest import ROOT

HEALTHY = ROOT / "golden" / "vllm" / "bfloat16-healthy.safetensors"
HEADS = ("q_b_proj", "#context", "#q_pe", "kv_b_proj", "gate_proj", "up_proj", "act", "lm_head")


@pytest.fixture(scope="module")
def model(tiny_k2):
    return refmoe.load(tiny_k2, "float64", reference=True)


@pytest.fixture(scope="module")
def whole(model):
    dump = read_dump(HEALTHY)
    return replace(dump, arrays=adapt(dump.arrays, model.cfg))


def of_rank(model, whole: Dump, rank: int, of: int, summed: bool = True) -> Dump:
    """Return what one rank of several has; its attention's sum before the all-reduce, or after."""
    arrays = {}
    for name, x in whole.arrays.items():
        split = name.endswith(HEADS)
        arrays[name] = np.array_split(x, of, axis=1)[rank] if split else x
    if not summed:
        for i, layer in enumerate(model.decoder.layers):
            context = whole.arrays[f"model.layers.{i}.self_attn#context"].astype(np.float64)
            w = dequantize(layer.self_attn.o_proj, np.float64)
            part = np.split(context, of, 1)[rank] @ np.split(w, of, 1)[rank].T
            for end in ("self_attn.o_proj", "self_attn"):
                arrays[f"model.layers.{i}.{end}"] = rounded(part)
    return replace(whole, arrays=arrays)


def rounded(x: np.ndarray) -> np.ndarray:
    """Return x rounded to bfloat16, half up."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(("rank", "of"), [(0, 2), (1, 2), (2, 4)])
def test_one_rank_is_judged_at_its_place(model, whole, rank, of):
    dump = of_rank(model, whole, rank, of)
    report = check(model, dump, engine="vllm")
    assert report.verdict == "pass", report.reason
    assert any(f"rank {rank}'s columns of {of} ranks" in n for n in report.notes)
    name = "model.layers.1.self_attn.q_b_proj"
    assert "columns" in report.coverage.parts[name]
    for damage in (np.zeros_like, lambda x: x[:, ::-1], lambda x: np.roll(x, 1, 1)):
        arrays = dump.arrays | {name: damage(dump.arrays[name])}
        report = check(model, replace(dump, arrays=arrays), engine="vllm")
        assert (report.verdict, report.point) == ("fault", name)


def test_nothing_of_a_rank_passes_unjudged(model, whole):
    """All its columns set to zero: nothing tells the rank, and nothing is passed."""
    dump = of_rank(model, whole, 1, 2)
    arrays = {n: 0 * x if n.endswith(HEADS) else x for n, x in dump.arrays.items()}
    report = check(model, replace(dump, arrays=arrays), engine="vllm")
    assert report.verdict == "undecidable"
    assert len(report.coverage.unfitted) == sum(n.endswith(HEADS) for n in dump.arrays)


def test_a_partial_sum_is_recognised_as_such(model, whole):
    report = check(model, of_rank(model, whole, 1, 2, summed=False), engine="vllm")
    assert report.verdict == "undecidable", report.reason
    for i in range(model.cfg.num_hidden_layers):
        said = report.coverage.unfitted[f"model.layers.{i}.self_attn.o_proj"]
        assert "rank 1's part of the sum, before the all-reduce" in said


def folder_of(path, dumps: list[Dump], suffix=".safetensors") -> None:
    path.mkdir()
    for rank, dump in enumerate(dumps):
        arrays = {n: np.ascontiguousarray(x) for n, x in dump.arrays.items()}
        arrays["input_ids"] = np.array(dump.tokens)
        if suffix == ".npz":
            np.savez(path / f"dump_tp{rank}.npz", **arrays)
        else:
            (path / f"rank_{rank}").mkdir()
            safetensors.numpy.save_file(arrays, path / f"rank_{rank}" / "dump.safetensors")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_all_ranks_are_put_together(model, whole, tmp_path, suffix):
    ranks = [of_rank(model, whole, r, 2, summed=False) for r in range(2)]
    folder_of(tmp_path / "good", ranks, suffix)
    report = check(model, read_dump(tmp_path / "good"), engine="vllm", profile="vllm")
    assert report.verdict == "pass", report.reason
    assert report.coverage.parts == {}
    assert any("2 ranks are put together" in n and "partial sums" in n for n in report.notes)
    name = "model.layers.0.self_attn.q_b_proj"
    ranks[1].arrays[name] = ranks[1].arrays[name][:, ::-1]
    folder_of(tmp_path / "bad", ranks, suffix)
    report = check(model, read_dump(tmp_path / "bad"), engine="vllm", profile="vllm")
    assert (report.verdict, report.point) == ("fault", name)
    assert "the wrong columns are those of rank 1" in report.notes


def test_copies_that_differ_are_judged_each(model, whole, tmp_path):
    ranks = [of_rank(model, whole, r, 2) for r in range(2)]
    name = "model.layers.1.input_layernorm"
    ranks[1].arrays[name] = ranks[1].arrays[name] * np.float32(1.25)
    folder_of(tmp_path / "d", ranks)
    report = check(model, read_dump(tmp_path / "d"), engine="vllm", profile="vllm")
    assert (report.verdict, report.point) == ("fault", name)
    assert "rank 1's copies of 1 tensors" in report.reason


def test_half_of_a_copy_is_blamed_on_no_rank(model, whole, tmp_path):
    """A norm is on every rank whole: which half of it is wrong says nothing of ranks."""
    name = "model.layers.1.input_layernorm"
    x = whole.arrays[name].copy()
    x[:, x.shape[1] // 2 :] *= 2
    ranks = [of_rank(model, replace(whole, arrays=whole.arrays | {name: x}), r, 2) for r in (0, 1)]
    folder_of(tmp_path / "d", ranks)
    report = check(model, read_dump(tmp_path / "d"), engine="vllm", profile="vllm")
    assert (report.verdict, report.point) == ("fault", name)
    assert not any("wrong columns" in n for n in report.notes)


def test_files_of_steps_are_no_ranks(whole, tmp_path):
    for i in range(2):
        np.savez(tmp_path / f"step{i}.npz", lm_head=whole.arrays["lm_head"])
    with pytest.raises(refmoe.InputError):
        read_dump(tmp_path)


def test_ranks_that_miss_or_name_other_tokens_are_refused(model, whole, tmp_path):
    ranks = [of_rank(model, whole, r, 2) for r in range(2)]
    folder_of(tmp_path / "d", [ranks[0], replace(ranks[1], tokens=[1, 2])])
    with pytest.raises(refmoe.InputError, match="its tokens are others"):
        read_dump(tmp_path / "d")
    (tmp_path / "d" / "rank_1").rename(tmp_path / "d" / "rank_2")
    with pytest.raises(refmoe.InputError, match="numbered from 0"):
        read_dump(tmp_path / "d")
