"""The slice of K2: a checkpoint of its shape, written once, or refused."""

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic.k2_slice import k2_slice


def test_the_slice_is_a_checkpoint_of_k2s_shape_and_is_written_once(sliced):
    checkpoint = Checkpoint.open(sliced)
    assert not checkpoint.missing
    assert not checkpoint.unread
    assert checkpoint.cfg.n_routed_experts == 12
    assert checkpoint.cfg.vocab_size == 4096
    stamp = (sliced / "model.safetensors").stat().st_mtime_ns
    assert k2_slice(sliced.parent, 12, 4096) == sliced
    assert (sliced / "model.safetensors").stat().st_mtime_ns == stamp
    hidden = refmoe.trace(refmoe.load(sliced), [1, 2, 3], ["model.layers.1"])["model.layers.1"]
    assert 0.1 < np.sqrt((hidden**2).mean()) < 100  # no activation runs away


def test_a_slice_that_does_not_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("refmoe.weights.synthetic.k2_slice.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the slice takes 15\.5 GB, 1\.0 GB are free"):
        k2_slice(tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())
