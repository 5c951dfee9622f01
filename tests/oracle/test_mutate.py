"""The oracle's power, reduced: every fault of the dictionary is planted, and found, and named."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from refmoe.engines import PROFILES
from refmoe.oracle.check import check
from refmoe.oracle.faults import dictionary
from refmoe.oracle.faults.base import written
from refmoe.oracle.faults.dictionary import BY_ID, FAULTS
from refmoe.oracle.selftest import mutate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return mutate.checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def document(models):
    """Each fault in one of the four checkpoints, in turn, or in the next in which it shows."""
    powers = [mutate.Mutator({name: model}, quick=True) for name, model in models.items()]
    scores = []
    for i, fault in enumerate(FAULTS):
        for k in range(len(powers)):
            score = powers[(i + k) % len(powers)].judge(fault, 1)
            if score.runs:
                break
        scores.append(score)
    return mutate.summary(scores)


@pytest.fixture(scope="module")
def quick():
    command = [sys.executable, "-m", "refmoe", "mutate", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def covers_every_fault(document):
    assert [row["id"] for row in document["faults"]] == [f.id for f in FAULTS]
    assert document["inert_everywhere"] == []


def finds_faults(document):
    missed = [line for row in document["faults"] for line in row["missed"]]
    assert document["detected"] == 1, missed
    assert document["placed"] >= 0.98, missed
    assert document["named"] >= 0.95, missed


def test_every_fault_of_the_dictionary_is_covered(document):
    covers_every_fault(document)
    assert document["runs"] == len(FAULTS)


def test_faults_are_detected_placed_and_named(document):
    finds_faults(document)


@pytest.mark.long
def test_the_quick_run_covers_every_fault_in_every_checkpoint(quick):
    covers_every_fault(quick)
    assert quick["runs"] > 350


@pytest.mark.long
def test_the_quick_run_finds_faults(quick):
    finds_faults(quick)


def test_the_document_of_some_faults():
    """Two processes share them."""
    ids = ["logits-shifted", "norm-gain-missing"]
    command = [sys.executable, "-m", "refmoe", "mutate", "--quick", "--json", "--jobs", "2", *ids]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert sorted(row["id"] for row in document["faults"]) == sorted(ids)
    assert document["runs"] == 8
    finds_faults(document)


def test_a_new_entry_is_planted_and_found(tmp_path, monkeypatch):
    """The ten lines of a reader who adds a fault: it is covered without another word."""
    mine = written(
        "logits-cubed", "logits are cubed", {"lm_head": lambda x, here: x**3}, "owner/repo#1"
    )
    monkeypatch.setattr(dictionary, "FAULTS", (*FAULTS, mine))
    ((fault, score),) = mutate.mutate(tmp_path, quick=True, ids=["logits-cubed"])
    assert fault is mine
    assert (score.detected, score.placed, score.named) == (4, 4, 4)


def test_a_fault_without_effect_is_listed_and_is_no_mutant(tmp_path):
    """Neither FP8 nor groups: nothing of fp8-fnuz on three of the four."""
    ((_, score),) = mutate.mutate(tmp_path, quick=True, ids=["fp8-fnuz"])
    assert score.runs == score.named == 1
    assert score.inert_on == {"tiny-k2, bfloat16", "int4, float32", "loud, float32"}


def test_the_loud_checkpoint_is_what_it_says(models):
    decoder = models["loud"].decoder
    bias = decoder.layers[1].mlp.gate.e_score_correction_bias
    assert (bias < -30).all()
    assert np.abs(decoder.logits([1, 2, 3])).max() < 65504


@pytest.mark.parametrize("id", ["scaling-dropped", "bias-ignored", "act-gelu", "scale-mscale-once"])
def test_where_logits_are_all_there_is_the_faults_of_layers_are_tried(id, models):
    """A whole engine with the fault in every layer, and nothing of it but its last numbers."""
    power = mutate.Mutator(models, quick=True)
    dump = power.dump("deepseek-v3", PROFILES["float32"], BY_ID[id])
    logits = replace(dump, arrays={"lm_head": dump.arrays["lm_head"]})
    report = check(models["deepseek-v3"], logits, profile="float32")
    assert report.point == "lm_head"
    assert id in (report.cause.id, *report.cause.equivalent)
