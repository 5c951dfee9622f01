"""Folders that SGLang's own dumpers wrote: golden/make_sglang.py."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.oracle.check import check
from refmoe.oracle.readers.dump import read_dump
from refmoe.weights.synthetic.random import write_random

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "sglang"
ABOUT = json.loads((GOLDEN / "about.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "bf16"
    write_random(folder, "bf16", seed=5)
    return refmoe.load(folder, "float64", reference=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    for archive in GOLDEN.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def test_the_default_mode_holds_no_tensor_and_the_fuller_one_is_named(folders):
    with pytest.raises(InputError, match=r"input_ids, position_ids and nothing else.*MODE=all"):
        read_dump(folders / "dumper-core")


def test_a_prompt_in_chunks_and_decoded_is_one_sequence(folders, model):
    dump = read_dump(folders / "dumper-all")
    assert dump.tokens == ABOUT["tokens"]
    assert dump.notes == ("3 steps are read as one sequence",)
    report = check(model, dump, engine="transformers", keep=False)
    assert report.verdict == "pass", report.reason
    assert report.profile == "float32"
    compared = {p.name for p in report.points}
    # the whole cache's keys and values are made anew in every step; gates return three tensors
    for end in ("self_attn.kv_b_proj", "mlp.gate", "mlp.gate#weights", "mlp.experts", "mlp"):
        assert f"model.layers.1.{end}" in compared
    assert "model.layers.1.mlp.gate#experts" in dump.arrays
    assert "lm_head" in compared
    assert not any("act_fn" not in name for name in report.unmatched), report.unmatched


@pytest.mark.parametrize("row", [0, 6, 10])  # of each step
def test_a_fault_in_any_step_is_found(folders, model, row):
    dump = read_dump(folders / "dumper-all")
    x = dump.arrays["model.layers.1.self_attn.o_proj"]
    x[:, row] = x[:, row, ::-1].copy()
    report = check(model, dump, engine="transformers", keep=False)
    assert (report.verdict, report.point) == ("fault", "model.layers.1.self_attn.o_proj")


def test_two_prompts_are_not_one(folders, model):
    dump = read_dump(folders / "dumper-two")
    assert dump.tokens is None
    assert list(dump.prompts) == ABOUT["two"]
    assert dump.notes == ("2 steps are read as 2 prompts",)
    report = check(model, dump, engine="transformers", keep=False)
    assert report.verdict == "pass", report.reason
    assert [(p.label, p.verdict) for p in report.prompts] == [
        ("prompt 1 of 2", "pass"),
        ("prompt 2 of 2", "pass"),
    ]
    assert "lm_head" in {p.name for p in report.points}
    x = dump.arrays["model.layers.2.self_attn.o_proj"]
    x[:, 6] = x[:, 6, ::-1].copy()  # of the second
    report = check(model, dump, engine="transformers", keep=False)
    assert (report.verdict, report.point) == ("fault", "model.layers.2.self_attn.o_proj")
    assert [p.verdict for p in report.prompts] == ["pass", "fault"]


def put(source: Path, step: int, folder: Path, at: int) -> None:
    """Copy one step's files into a folder, as another step's."""
    folder.mkdir(exist_ok=True)
    for file in source.glob(f"step={step}___*"):
        shutil.copy(file, folder / file.name.replace(f"step={step}___", f"step={at}___", 1))


def test_two_prompts_that_take_turns_are_told_apart(folders, model, tmp_path):
    one, two = folders / "dumper-all", folders / "dumper-two"
    for at, (source, step) in enumerate([(one, 0), (two, 0), (one, 1), (two, 1), (one, 2)]):
        put(source, step, tmp_path / "d", at)
    dump = read_dump(tmp_path / "d")
    assert list(dump.prompts) == [ABOUT["tokens"], *ABOUT["two"]]
    assert "5 steps are read as 3 prompts" in dump.notes
    # only the first prompt's steps have the first layers
    assert "model.layers.0.self_attn.o_proj" in dump.arrays
    assert check(model, dump, engine="transformers", keep=False).verdict == "pass"


def test_a_step_that_may_go_on_with_two_prompts_is_refused(folders, tmp_path):
    for at, step in enumerate([0, 0, 1]):
        put(folders / "dumper-all", step, tmp_path / "d", at)
    with pytest.raises(InputError, match="step 2 begins at position 6 and may go on with any"):
        read_dump(tmp_path / "d")


def test_rows_that_were_computed_again_are_judged_too(folders, model, tmp_path):
    for at, step in enumerate([0, 1, 2, 1]):
        put(folders / "dumper-all", step, tmp_path / "d", at)
    dump = read_dump(tmp_path / "d")
    assert dump.tokens == ABOUT["tokens"]
    x = dump.arrays["model.layers.1.self_attn.o_proj"]
    assert x.shape[1] == 6 + 4 + 1 + 4
    assert check(model, dump, engine="transformers", keep=False).verdict == "pass"
    x[:, 13] = x[:, 13, ::-1].copy()
    report = check(model, dump, engine="transformers", keep=False)
    assert (report.verdict, report.point) == ("fault", "model.layers.1.self_attn.o_proj")
    assert "computed again" in report.reason


def test_files_of_whole_passes_are_read(folders, model):
    dump = read_dump(folders / "passes")
    assert dump.tokens == ABOUT["tokens"]
    assert "3 steps are read as one sequence" in dump.notes
    (rank,) = (folders / "passes").iterdir()
    assert read_dump(rank).arrays.keys() == dump.arrays.keys()
    # a pass' logits are in the file of the next one
    known = ~np.isnan(dump.arrays["lm_head"]).any(axis=1)
    assert known.nonzero()[0].tolist() == [5, 9]
    report = check(model, dump, engine="transformers", keep=False)
    assert report.verdict == "pass", report.reason
    assert {"lm_head", "model.norm", "model.layers.2.mlp.gate"} <= {p.name for p in report.points}
    dump.arrays["lm_head"][5] = dump.arrays["lm_head"][5, ::-1].copy()
    report = check(model, dump, engine="transformers", keep=False)
    assert (report.verdict, report.point) == ("fault", "lm_head")
