"""The oracle's own figures, reduced: real engines, planted faults, false alarms."""

import json
import subprocess
import sys

import numpy as np
import pytest

from refmoe.model.formats.fp8_block import E4M3
from refmoe.oracle.selftest import power as bench

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def document():
    """What `bench oracle --json` prints, in a process of its own: it patches live engines."""
    command = [
        sys.executable,
        "-m",
        "refmoe",
        "bench",
        "oracle",
        "--quick",
        "--runs",
        "12",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_healthy_engines_pass_under_their_own_conventions(document):
    assert len(document["healthy"]) == 8
    for row in document["healthy"]:
        assert row["verdict"] == "pass", row
    sides = {row["engine"].split()[0]: row["conventions"] for row in document["healthy"]}
    assert "latent_norm_eps" in sides["vllm"]
    assert sides["transformers"] == ["rope_layout"]


def test_planted_faults_are_found_where_they_begin(document):
    assert len(document["planted"]) == 99
    missed = [row for row in document["planted"] if not row["placed"]]
    assert missed == []


@pytest.mark.parametrize(("precision", "share"), [("float32", 0.9), ("bfloat16", 0.8)])
def test_planted_faults_are_named(document, precision, share):
    rows = [row for row in document["planted"] if row["precision"] == precision]
    unnamed = [row for row in rows if not row["named"]]
    assert len(unnamed) <= (1 - share) * len(rows), unnamed


def test_engines_that_really_round_raise_no_alarm(document):
    found = document["false_alarms"]
    assert len(found) == 8
    assert {row["runs"] for row in found.values()} == {12}
    assert {p: row["points"] for p, row in found.items() if row["alarms"]} == {}
    assert found["float32"]["interval"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 12))]


def test_the_interval_is_clopper_and_pearsons():
    """Against their closed forms at the ends, and the published table at 5 of 20."""
    assert bench.interval(0, 200)[1] == pytest.approx(1 - 0.025 ** (1 / 200))
    assert bench.interval(200, 200) == (pytest.approx(0.025 ** (1 / 200)), 1.0)
    assert bench.interval(5, 20) == (
        pytest.approx(0.0866, abs=5e-5),
        pytest.approx(0.4910, abs=5e-5),
    )


def test_quantisers_take_the_nearest_code():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 256))
    scale = np.abs(x.reshape(3, 2, 128)).max(axis=-1, keepdims=True) / 448
    y = (bench._nearest_e4m3(x).reshape(3, 2, 128) / scale)[..., None]
    best = np.abs(E4M3[:127] - np.abs(x.reshape(3, 2, 128) / scale)[..., None]).min(axis=-1)
    np.testing.assert_allclose(
        np.abs(np.abs(y[..., 0]) - np.abs(x.reshape(3, 2, 128) / scale)), best, atol=1e-12
    )
    step = np.abs(x.reshape(3, 8, 32)).max(axis=-1) / 127
    error = np.abs(bench._nearest_int8(x) - x).reshape(3, 8, 32).max(axis=-1)
    assert (error <= step * (0.5 + 127 * 2.0**-11)).all()
