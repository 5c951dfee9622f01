"""Checkpoints and networks for the tests: random, small, and with no two axes alike."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from refmoe.run.load import golden_folder
from refmoe.weights.synthetic.random import write_random

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")

ROOT = Path(__file__).resolve().parents[1]


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
