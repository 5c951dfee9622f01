"""A repro fails on a fault, and on nothing else; it is checked by running it."""

import subprocess
import sys

import numpy as np
import pytest

import refmoe
from refmoe import cli
from refmoe.files import InputError
from refmoe.oracle import repro
from refmoe.oracle.check import judge_dump
from refmoe.oracle.readers.base import Dump
from refmoe.weights.synthetic.members import write_member

TOKENS = [i * 7 % 500 for i in range(6)]


def run(script) -> subprocess.CompletedProcess:  # type: ignore[no-untyped-def]
    return subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True
    )


def in_this_process(script, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(script.parent)
    with pytest.raises(SystemExit) as done:
        exec(compile(script.read_text(), script.name, "exec"), {})
    assert done.value.code == 0, script.read_text()


@pytest.mark.parametrize("engine", ["refmoe", "vllm", "llama.cpp"])
@pytest.mark.parametrize("member", [None, "moonlight", "deepseek-v3"])
def test_of_a_healthy_engine_every_operation_is_reproduced(
    member, engine, random_int4, tmp_path, monkeypatch, capsys
):
    """Each recipe against model/, at every point: what the script expects is what refmoe has."""
    folder = random_int4
    if member:
        write_member(folder := tmp_path / member, member, seed=3)
    theirs = refmoe.load(folder, "float64", reference=True, conventions=engine)
    arrays = refmoe.trace(theirs, TOKENS)
    arrays = {n: x for n, x in arrays.items() if ".experts." not in n}
    dump = Dump(tmp_path, arrays, TOKENS, "float64")
    case = judge_dump(refmoe.load(folder), dump, engine=engine)
    assert case.report.verdict == "pass", case.report.reason
    left_out = ("embed_tokens", "#scores", "#probs")
    done = 0
    for point in case.exact.theirs:
        if not point.endswith(left_out):
            script, _ = repro.write(case, tmp_path / "r.py", point)
            in_this_process(script, monkeypatch)
            done += 1
    assert done > 50


@pytest.mark.parametrize("kept", ["#context", ".mlp", ".mlp.experts", "#experts", "#weights"])
def test_what_a_dump_lacks_is_computed_on_the_way(kept, random_bf16, tmp_path, monkeypatch):
    """As forward hooks see it: no rotated keys, no router logits, no sums in between."""
    model = refmoe.load(random_bf16, "float64", reference=True)
    hooks = ("norm", "_proj", "_with_mqa", "#experts", "#weights", kept)
    arrays = {n: x for n, x in refmoe.trace(model, TOKENS).items() if n.endswith(hooks)}
    arrays = {n: x for n, x in arrays.items() if ".experts." not in n and "shared" not in n}
    case = judge_dump(model, Dump(tmp_path, arrays, TOKENS, "float64"))
    point = next(n for n in arrays if n.endswith(kept) and ".1." in n)
    script, _ = repro.write(case, tmp_path / "r.py", point)
    in_this_process(script, monkeypatch)


def test_a_fault_is_reproduced_by_numpy_alone(random_bf16, tmp_path):
    model = refmoe.load(random_bf16, "float32")
    arrays = refmoe.trace(model, TOKENS)
    arrays["model.layers.1.mlp.gate#weights"] *= 2.827
    np.savez(tmp_path / "d.npz", tokens=np.array(TOKENS), **arrays)
    args = ["check", str(tmp_path / "d.npz"), "--model", str(random_bf16)]
    assert cli.main([*args, "--repro", str(tmp_path / "out.py")]) == 1
    text = (tmp_path / "out.py").read_text()
    assert {line.split()[1] for line in text.splitlines() if line.startswith("import")} == {"numpy"}
    assert len(text.splitlines()) < 30
    done = run(tmp_path / "out.py")
    assert done.returncode == 1
    assert done.stderr == ""
    assert "relative error 1.83e+00" in done.stdout  # 2.827 - 1


def test_a_wrong_choice_is_reproduced(random_bf16, tmp_path):
    model = refmoe.load(random_bf16, "float32")
    arrays = refmoe.trace(model, TOKENS)
    arrays["model.layers.1.mlp.gate#experts"][3, 0] = arrays["model.layers.1.mlp.gate"][3].argmin()
    case = judge_dump(model, Dump(tmp_path, arrays, TOKENS, "float32"))
    script, _ = repro.write(case, tmp_path / "r")
    assert "token 3" in script.read_text()
    assert run(script).returncode == 1


def test_what_cannot_be_reproduced_is_said(random_bf16, tmp_path):
    model = refmoe.load(random_bf16, "float32")
    arrays = refmoe.trace(model, TOKENS, ["lm_head"])
    healthy = judge_dump(model, Dump(tmp_path, arrays, TOKENS, "float32"))
    with pytest.raises(InputError, match="no fault to reproduce"):
        repro.write(healthy, tmp_path / "r")
    wrong = {"lm_head": arrays["lm_head"] * 1.01}
    case = judge_dump(model, Dump(tmp_path, wrong, TOKENS, "float32"))
    with pytest.raises(InputError, match=r"dump model\.norm as well"):
        repro.write(case, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
