"""No bit depends on the number of threads, ours or BLAS's, under any of BLAS's kernels."""

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from threadpoolctl import ThreadpoolController

from refmoe.fast import threads
from tests.conftest import ROOT


def blas_kernels() -> list[str]:
    """Return the kernels of OpenBLAS that run here: its own choice, and others that it has.

    Each of them adds in another order for another number of threads, for one shape or another.
    """
    if platform.machine() != "x86_64":
        return ["own"]
    said = Path("/proc/cpuinfo")
    wide = said.exists() and "avx512dq" in said.read_text()
    return ["own", "Haswell", "Nehalem", "Prescott", *(["SkylakeX"] if wide else [])]


@pytest.mark.parametrize("kernels", blas_kernels())
def test_bits_do_not_depend_on_threads(kernels, random_bf16):
    """Two processes, one with one thread and one with two, make the same bytes."""
    running = []
    for count in ("1", "2"):
        own = {"OPENBLAS_NUM_THREADS": count, "REFMOE_THREADS": count}
        if kernels != "own":
            own["OPENBLAS_CORETYPE"] = kernels
        command = [sys.executable, "-m", "tests.same_bits", str(random_bf16)]
        running.append(
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE)
        )
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    one, two = map(json.loads, said)
    assert [name for name in one if one[name] != two[name]] == []


def blas_threads() -> set[int]:
    """Return the numbers of threads that the loaded BLAS libraries use."""
    return {
        lib.num_threads for lib in ThreadpoolController().select(user_api="blas").lib_controllers
    }


def test_the_limit_on_blas_lasts_until_the_last_has_left():
    """A thread that leaves does not give several threads to the products of one still inside."""
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = blas_threads()
        entered, leave = threading.Event(), threading.Event()

        def first() -> None:
            with threads.single_blas_thread():
                entered.set()
                leave.wait()

        other = threading.Thread(target=first)
        other.start()
        entered.wait()
        with threads.single_blas_thread(), threads.single_blas_thread():
            leave.set()
            other.join()
            assert blas_threads() <= {1}
        assert blas_threads() == before
