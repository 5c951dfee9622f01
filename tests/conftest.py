"""Checkpoints and networks for the tests: random, small, and with no two axes alike."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from refmoe.run.load import golden_folder
from refmoe.weights.synthetic import k2_slice
from refmoe.weights.synthetic.random import write_random

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

ROOT = Path(__file__).resolve().parents[1]

# What a test may need beyond `.[test]`; pyproject.toml says what each marker means.
NEEDS = {"peers", "kimi", "gpu", "cupy", "cuda_compiler", "compiler", "browser", "system"}
PEERS = ("torch", "transformers", "compressed_tensors", "mlx_lm")
BY_FIXTURE = {"kimi": "kimi", "built": "compiler", "device": "compiler", "holes": "system"}


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of a parallel run one BLAS thread.

    Threads of several processes that wait for each other by spinning take the processors from
    those that work. Tests of threads set their own numbers in processes of their own.
    """
    if getattr(config.option, "numprocesses", None):
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(name, "1")  # before the workers start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use."""
    for item in items:
        for name in getattr(item, "fixturenames", ()):
            if name in BY_FIXTURE:
                item.add_marker(BY_FIXTURE[name])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose witnesses are not installed."""
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing and item.get_closest_marker("peers"):
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[test,peers]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that skips itself and carries no marker that says what it needs."""
    report = yield
    marked = any(mark.name in NEEDS for mark in item.iter_markers())
    if report.skipped and not marked and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped without a marker of {sorted(NEEDS)}: {report.longrepr}"
    return report


def heed_ctrl_c() -> None:
    """In a child: a test run in the background of a script inherits SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor leave anything in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_k2() -> Path:
    return golden_folder() / "tiny-k2"


@pytest.fixture(scope="session")
def random_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "bf16"
    write_random(folder, "bf16", seed=1)
    return folder


@pytest.fixture(scope="session")
def random_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "int4"
    write_random(folder, "int4", seed=2, shards=3)
    return folder


@pytest.fixture(scope="session")
def kimi() -> Path:
    """Published vocabulary, configs and chat vectors; they are no part of this repository."""
    folder = os.environ.get("REFMOE_KIMI_DIR")
    if not folder:
        pytest.skip("REFMOE_KIMI_DIR names no folder with the published Kimi files")
    return Path(folder)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A checkpoint whose dense matrices have whole groups, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shape = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 96, "intermediate_size": 224}
    shape |= {"num_attention_heads": 4, "v_head_dim": 32, "moe_intermediate_size": 64}
    write_random(tmp_path / "model", "int4", seed=3, shape=shape)
    return tmp_path / "model"


SLICE = {  # of the slice of K2, instead of K2's
    "hidden_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
}


@pytest.fixture
def sliced(tmp_path, monkeypatch):
    """The slice of K2 in small."""
    monkeypatch.setattr("refmoe.weights.synthetic.k2_slice.SHAPE", {**k2_slice.SHAPE, **SLICE})
    return k2_slice.k2_slice(tmp_path / "slices", 12, 4096)
