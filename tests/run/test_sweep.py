"""A sweep is generation, whatever cuts it up, and nothing that interrupts it loses anything."""

import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file

import refmoe
from refmoe import cli
from refmoe.files import InputError
from refmoe.model.matrix import dequantize
from refmoe.model.norm import rms_norm
from refmoe.model.points import points as points_of
from refmoe.oracle.readers.dump import read_dump
from refmoe.run.generate import generation_decoder, prefill
from refmoe.run.sweep import run as sweep_run
from refmoe.run.sweep.sweep import sweep
from refmoe.weights.streaming.reader import WAYS
from refmoe.weights.streaming.store import Store
from refmoe.weights.synthetic.random import write_random
from tests.conftest import ROOT
from tests.networks import envelope, gamma

LENGTHS = (5, 40, 1, 23, 8)
PROMPTS = [[(17 * n + 31 * i * i + 7 * i) % 500 for i in range(k)] for n, k in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Groups of experts, no q_lora, two shared experts, prompts that are longer than a chunk."""
    folder = tmp_path_factory.mktemp("sweep") / "grouped"
    shape = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "q_lora_rank": None}
    write_random(folder, "bf16", seed=5, shape={**shape, "n_shared_experts": 2})
    return folder


def folder_of(which, tiny_k2, grouped, random_int4):
    return {"tiny-k2": tiny_k2, "grouped": grouped, "int4": random_int4}[which]


@cache
def bound_of(folder, numerics, n):
    definition = refmoe.load(folder, numerics, reference=True).decoder
    return envelope(definition, PROMPTS[n], runs=2)


# --- the same numbers


@pytest.mark.parametrize("chunk", [512, 16])
@pytest.mark.parametrize("which", ["tiny-k2", "grouped"])
@pytest.mark.parametrize("numerics", ["float64", "float32"])
def test_a_sweep_is_generation(which, numerics, chunk, tiny_k2, grouped, random_int4, tmp_path):
    """Within what any order of sums explains: twice the widest of disturbed runs, networks.py."""
    folder = folder_of(which, tiny_k2, grouped, random_int4)
    model = refmoe.load(folder, numerics)
    sweep(model, PROMPTS, tmp_path / "s", logits="all", chunk=chunk)
    made = load_file(tmp_path / "s")
    for n in (0, 1) if which == "grouped" else (1,):
        logits, whole = made[f"{n}/lm_head"], model.logits(PROMPTS[n])
        bound = bound_of(folder, numerics, n)
        assert np.abs(logits - whole).max() <= bound
        if numerics == "float64":  # 2⁻⁵³ a rounding, of which 10⁴ lie one behind another at most
            assert np.abs(logits - whole).max() <= 1e-12 * np.abs(whole).max()
        decoder = generation_decoder(model, "exact")
        last = prefill(decoder, PROMPTS[n], decoder.caches())
        assert np.abs(logits[-1] - last).max() <= bound


@pytest.mark.parametrize("which", ["grouped", "int4"])
def test_all_points_are_those_of_a_trace(which, tiny_k2, grouped, random_int4, tmp_path):
    model = refmoe.load(folder_of(which, tiny_k2, grouped, random_int4), "float64")
    sweep(model, PROMPTS, tmp_path / "s", logits="all", points=["*"])
    made = load_file(tmp_path / "s")
    for n, tokens in enumerate(PROMPTS):
        seen = refmoe.trace(model, tokens)
        mine = {k.removeprefix(f"{n}/"): x for k, x in made.items() if k.startswith(f"{n}/")}
        assert {k for k in mine if not k.endswith("margin")} == set(seen)
        for name, x in seen.items():  # 1e-12: as above
            assert mine[name].shape == x.shape
            if x.dtype.kind == "i":
                np.testing.assert_array_equal(mine[name], x)
            else:
                np.testing.assert_allclose(mine[name], x, rtol=0, atol=1e-12 * np.abs(x).max())
        if n == 0:
            names = [k for k in points_of(model.cfg) if ".experts." not in k]
            assert names == [k for k in seen if ".experts." not in k]


def test_one_prompt_reads_as_a_trace(random_int4, tmp_path):
    model = refmoe.load(random_int4)
    sweep(model, [PROMPTS[1]], tmp_path / "s.safetensors", logits="all", points=["model.norm"])
    dump = read_dump(tmp_path / "s.safetensors")
    assert dump.tokens == PROMPTS[1]
    report = refmoe.check(refmoe.load(random_int4, "float64", reference=True), dump)
    assert report.verdict == "pass"
    assert report.compared >= 4


def test_rounded_numerics_sweep_too(random_bf16, tmp_path):
    """Every point of bfloat16 is rounded, in a sweep as well; nearly all values are the same."""
    model = refmoe.load(random_bf16, "bfloat16", reference=True)
    sweep(model, PROMPTS[:2], tmp_path / "s", logits="all", points=["model.layers.0"])
    made = load_file(tmp_path / "s")
    assert not (made["1/model.layers.0"].view(np.uint32) & 0xFFFF).any()
    whole = refmoe.trace(model, PROMPTS[1], ["model.layers.0"])["model.layers.0"]
    assert (made["1/model.layers.0"] != whole).mean() < 1e-2
    assert np.abs(made["1/model.layers.0"] - whole).max() <= 2.0**-6 * np.abs(whole).max()


@pytest.mark.parametrize("picked", ["last", [0, -1], [[0], [3, 39], [], [-2], [1, 1]]])
def test_logits_of_chosen_positions_and_of_the_likeliest_tokens(picked, random_int4, tmp_path):
    model = refmoe.load(random_int4)
    sweep(model, PROMPTS, tmp_path / "all", logits="all")
    sweep(model, PROMPTS, tmp_path / "some", logits="all", positions=picked)
    sweep(model, PROMPTS, tmp_path / "top", logits="top:7", positions=picked)
    sweep(model, PROMPTS, tmp_path / "none", logits="none")
    every, some, top = (load_file(tmp_path / name) for name in ("all", "some", "top"))
    none = load_file(tmp_path / "none")
    W, norm = (dequantize(m, np.float64) for m in (model.decoder.lm_head, model.decoder.norm))
    last, eps = f"model.layers.{model.cfg.num_hidden_layers - 1}", model.cfg.rms_norm_eps
    assert not [name for name in none if "lm_head" in name]
    for n, length in enumerate(LENGTHS):
        each = picked if isinstance(picked, list) else [-1]
        own = each[n] if isinstance(each[0], list) else each
        rows = sorted({p % length for p in own})
        logits = every[f"{n}/lm_head"].astype(np.float64)[rows]
        if not rows:
            assert f"{n}/lm_head" not in some
            continue
        assert some[f"{n}/lm_head#positions"].tolist() == rows
        # other rows beside them, so other sums of as many terms as the width, γ(D)·|W||x|
        x = rms_norm(every[f"{n}/{last}"][rows].astype(np.float64), norm, eps)
        sums = np.abs(x) @ np.abs(W).T
        bound = 2 * gamma(len(W[0]) + 8, np.float32) * sums
        assert (np.abs(some[f"{n}/lm_head"] - logits) <= bound).all()
        mine = some[f"{n}/lm_head"]
        ids = np.argsort(-mine, axis=1, kind="stable")[:, :7]
        np.testing.assert_array_equal(top[f"{n}/lm_head#ids"], ids)
        total = top[f"{n}/lm_head#logsumexp"]
        exact = np.log(np.exp(mine.astype(np.float64)).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(total, exact, rtol=1e-12)
        wanted = np.take_along_axis(mine, ids, axis=1) - exact
        # what is kept of them is float32, 2⁻²⁴ of itself at most
        np.testing.assert_allclose(top[f"{n}/lm_head#logprobs"], wanted, rtol=2.0**-23)
        np.testing.assert_array_equal(none[f"{n}/model.layers.2"], every[f"{n}/model.layers.2"])


def test_margins_are_the_routers(grouped, tmp_path):
    model = refmoe.load(grouped, "float64")
    sweep(model, PROMPTS[1:2], tmp_path / "s", points=["model.layers.1.mlp.gate"])
    made = load_file(tmp_path / "s")
    at = "model.layers.1.mlp.gate"
    bias = model.decoder.layers[1].mlp.gate.e_score_correction_bias
    score = 1 / (1 + np.exp(-made[at])) + bias
    groups = np.sort(np.sort(score.reshape(40, 4, 4), axis=2)[..., -2:].sum(axis=2), axis=1)
    np.testing.assert_allclose(made[f"{at}#group_margin"], groups[:, -2] - groups[:, -3])
    assert (made[f"{at}#margin"] >= 0).all()


# --- what it asks for


class Counted:
    """One layer's experts, counted; streamed ones three at a time, spoilt when the batch ends."""

    def __init__(self, layer, experts, streamed, asked):
        self.layer, self.experts, self.streamed, self.asked = layer, experts, streamed, asked

    def __call__(self, e):
        raise AssertionError("a sweep takes batches")

    def expert(self, e):
        self.asked.append((self.layer, e))
        return self.experts(e)

    def batches(self, chosen, x):
        assert len(x) == 0  # nothing to guess by
        if not self.streamed:
            yield {e: self.expert(e) for e in chosen}
            return
        for begin in range(0, len(chosen), 3):
            batch = {e: _copied(self.expert(e)) for e in chosen[begin : begin + 3]}
            yield batch
            for w in batch.values():
                for m in w:
                    for part in m:
                        part[...] = 0x7FC0 if part.dtype == np.uint16 else 0


def _copied(w):
    return w._make(m._make(map(np.array, m)) for m in w)


class Layers:
    def __init__(self, layers):
        self.layers, self.asked = layers, []

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.layers[i]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_weights_are_asked_for_once_and_unchosen_experts_never(
    streamed, reference, random_int4, tmp_path
):
    model = refmoe.load(random_int4, reference=reference)
    asked = []
    experts = [Counted(i, own, streamed, asked) for i, own in enumerate(model.decoder.experts)]
    layers = Layers(model.decoder.layers)
    counted = replace(model, decoder=replace(model.decoder, experts=experts, layers=layers))
    prompts = [[3], [5, 3]]  # few, so that many experts are nobody's choice
    done = sweep(counted, prompts, tmp_path / "s", chunk=2)
    made = load_file(tmp_path / "s")
    chosen = []
    for i in range(model.cfg.first_k_dense_replace, model.cfg.num_hidden_layers):
        each = [made[f"{n}/model.layers.{i}.mlp.gate#experts"] for n in range(2)]
        chosen += [(i, e) for e in np.unique(np.concatenate(each))]
    assert asked == chosen
    assert len(chosen) < 2 * model.cfg.n_routed_experts
    assert layers.asked == list(range(model.cfg.num_hidden_layers))
    sizes = [sum(m.nbytes for m in model.decoder.experts[i](e)) for i, e in chosen]
    assert done.bytes_read > sum(sizes)
    sweep(model, prompts, tmp_path / "plain", chunk=2)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.system
@pytest.mark.parametrize("more", [1.0, 1.4])
@pytest.mark.parametrize("way", WAYS)
def test_under_a_budget_the_bits_are_the_same_and_each_expert_is_read_once(
    more, way, random_int4, tmp_path
):
    model = refmoe.load(random_int4)
    sizes = Store(model.checkpoint, 10**12, "cached")
    try:
        store = Store(model.checkpoint, int(more * sizes.least), way)
    except OSError:
        pytest.skip(f"no {way} reads here")
    lent = replace(model, decoder=store.decoder(model.nx), store=store)
    sweep(lent, PROMPTS, tmp_path / "s", chunk=16)
    sweep(model, PROMPTS, tmp_path / "mapped", chunk=16)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "mapped").read_bytes()
    made = load_file(tmp_path / "s")
    chosen = 0
    for i in range(model.cfg.first_k_dense_replace, model.cfg.num_hidden_layers):
        each = [made[f"{n}/model.layers.{i}.mlp.gate#experts"] for n in range(len(PROMPTS))]
        chosen += len(np.unique(np.concatenate(each)))
    assert store.counters.asked == store.counters.missed == chosen
    assert store.counters.guessed == 0
    store.close()
    sizes.close()


def test_the_bench_has_the_promised_fields(tiny_k2, tmp_path, capsys):
    total = sum(t.nbytes for t in refmoe.load(tiny_k2).checkpoint.tensors.values())
    for ram in ([], ["--ram", str(int(0.8 * total))]):
        how = ["--prompt", "9", "--folder", tmp_path, "--json", *ram]
        assert cli.main([*map(str, ["bench", "sweep", *how])]) == 0
        told = json.loads(capsys.readouterr().out)
        keys = ["bytes_read", "checkpoint_bytes", "seconds", "disk_gbs", "ratio", "max_rss"]
        assert list(told) == keys
        assert told["checkpoint_bytes"] == total
        assert 0 < told["bytes_read"] <= 1.5 * total
        ratio = told["bytes_read"] / told["seconds"] / told["disk_gbs"] / 1e9
        assert told["ratio"] == pytest.approx(ratio)
    assert list(tmp_path.iterdir()) == []


# --- interrupted


SWEEP = [sys.executable, "-m", "refmoe", "sweep"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


def test_killed_at_random_moments_it_goes_on_to_the_same_bits(tmp_path):
    rng = random.Random(int(os.environ.get("REFMOE_KILL_SEED", "0")))
    tokens = tmp_path / "t.json"
    tokens.write_text(json.dumps([[i * i % 2000 for i in range(n)] for n in (200, 5, 100)]))
    how = ["--reference", "--tokens", tokens, "--points", "*.mlp", "*experts.3.act"]
    began = time.monotonic()
    subprocess.run([*SWEEP, *how, "--out", tmp_path / "whole"], check=True, env=ENVIRONMENT)
    length = time.monotonic() - began
    out, part = tmp_path / "killed", tmp_path / "killed.part"
    kills = 0
    while kills < 3:  # of a machine that is busy now and then, not all need come in time
        states = [-1]
        while not out.exists():
            child = subprocess.Popen([*SWEEP, *how, "--out", out], env=ENVIRONMENT)
            try:
                child.wait(timeout=rng.uniform(0.3, 1.1) * length if len(states) < 8 else None)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
            if child.wait() == 0:
                break
            assert child.returncode == -signal.SIGKILL
            kills += 1
            if not out.exists():
                state = part / "state.json"
                states.append(json.loads(state.read_text())["done"] if state.exists() else -1)
        assert states == sorted(states)  # what is done stays done
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()
        if part.exists():  # killed while it tidied up
            shutil.rmtree(part)
        out.unlink()


@contextmanager
def full_disk():
    try:
        yield
    except InputError as e:
        says = r"no room left.*takes \d+\.\d+ GB.*same command goes on"
        if not re.search(says, str(e)):
            raise


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_any_write_costs_one_layer_at_most(
    call, random_bf16, tmp_path, monkeypatch
):
    model = refmoe.load(random_bf16, reference=True)
    how = {"points": ["model.layers.*.mlp"], "chunk": 16}
    sweep(model, PROMPTS[:2], tmp_path / "whole", **how)
    real, left = getattr(os, call), [0]

    def failing(*args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    states, n = [], 0
    while not states or not (tmp_path / "s").exists() or (tmp_path / "s.part").exists():
        n += 1
        left[0] = n
        with full_disk():
            sweep(model, PROMPTS[:2], tmp_path / "s", **how)
        state = tmp_path / "s.part" / "state.json"
        states.append(json.loads(state.read_text())["done"] if state.exists() else -1)
    assert states[:-1] == sorted(states[:-1])
    assert n > 1
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "s.part").exists()


def test_a_file_that_may_not_grow_is_a_clear_error(random_bf16, tmp_path):
    """A real limit of the system's, met when the hidden states are laid out or the result is."""
    tokens = tmp_path / "t.json"
    tokens.write_text(json.dumps(PROMPTS))
    model = refmoe.load(random_bf16, reference=True)
    sweep(model, PROMPTS, tmp_path / "whole", logits="top:3", positions="last")
    hidden = sum(LENGTHS) * model.cfg.hidden_size * 4
    how = ["--model", random_bf16, "--reference", "--tokens", tokens, "--logits", "top:3"]
    how += ["--positions", "last", "--out", tmp_path / "s"]
    for limit, done in ((hidden - 1, None), (hidden + 4096, model.cfg.num_hidden_layers + 1)):

        def limited(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ran = subprocess.run(
            [*SWEEP, *how],
            preexec_fn=limited,
            env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2, ran.stderr
        assert "no room left on the disk" in ran.stderr
        assert "the same command goes on" in ran.stderr
        state = tmp_path / "s.part" / "state.json"
        assert (json.loads(state.read_text())["done"] if state.exists() else None) == done
    subprocess.run([*SWEEP, *how], check=True, env=ENVIRONMENT)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_too_little_room_is_said_before_anything_is_computed(random_bf16, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(sweep_run.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0\.000 GB are free there, this sweep of 77 rows takes"):
        sweep(refmoe.load(random_bf16, reference=True), PROMPTS, tmp_path / "s")


def interrupted(model, out, at=2, **how):
    """A sweep that Ctrl-C ends in this layer."""

    class Stops(Layers):
        def __getitem__(self, i):
            if i == at:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    stops = replace(model.decoder, layers=Stops(model.decoder.layers))
    with pytest.raises(KeyboardInterrupt):
        sweep(replace(model, decoder=stops), PROMPTS, out, **how)


def test_another_sweep_is_not_gone_on_with(random_bf16, random_int4, tmp_path):
    model, out = refmoe.load(random_bf16, reference=True), tmp_path / "s"
    interrupted(model, out)
    for what, prompts, other, how in (
        ("tokens", [*PROMPTS[:4], [1, 2]], model, {}),
        ("logits", PROMPTS, model, {"logits": "all"}),
        ("positions", PROMPTS, model, {"positions": "last"}),
        ("points", PROMPTS, model, {"points": ["model.norm"]}),
        ("chunk", PROMPTS, model, {"chunk": 100}),
        ("checkpoint, model", PROMPTS, refmoe.load(random_int4, reference=True), {}),
        ("numerics", PROMPTS, refmoe.load(random_bf16, "float64", reference=True), {}),
        ("conventions", PROMPTS, refmoe.load(random_bf16, "float32", True, "vllm"), {}),
    ):
        says = f"2 layers of another sweep: its {what} differ; --restart"
        with pytest.raises(InputError, match=says):
            sweep(other, prompts, out, **how)
    assert sweep(model, PROMPTS, out).begun_at == 2
    interrupted(model, out, 1)
    assert sweep(model, PROMPTS[:2], out, restart=True).begun_at == 0
    assert len(load_file(out)) == 2 * (1 + 3 * 2 + 3)
    (tmp_path / "s.part").mkdir()
    (tmp_path / "s.part" / "mine").write_text("")
    with pytest.raises(InputError, match="no sweep's; move it away"):
        sweep(model, PROMPTS, out, restart=True)


def test_two_at_once_are_refused(random_bf16, tmp_path):
    model, out = refmoe.load(random_bf16, reference=True), tmp_path / "s"
    interrupted(model, out)
    with (tmp_path / "s.part" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for restart in (False, True):
            with pytest.raises(InputError, match="another process is at work"):
                sweep(model, PROMPTS, out, restart=restart)
    assert sweep(model, PROMPTS, out).begun_at == 2


def test_a_shard_that_vanishes_loses_nothing(random_int4, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "s"
    shutil.copytree(random_int4, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    model = refmoe.load(folder, reference=True)

    class Vanishes(Layers):
        def __getitem__(self, i):
            if i == 1:
                shard.rename(tmp_path / "away")
            return super().__getitem__(i)

    vanishes = replace(model.decoder, layers=Vanishes(model.decoder.layers))
    with pytest.raises(InputError, match=f"{shard.name}.*what is done is kept"):
        sweep(replace(model, decoder=vanishes), PROMPTS, out)
    (tmp_path / "away").rename(shard)
    assert sweep(refmoe.load(folder, reference=True), PROMPTS, out).begun_at == 2
    sweep(model, PROMPTS, tmp_path / "whole")
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    interrupted(model, out, restart=True)
    os.utime(shard, ns=(0, 0))
    with pytest.raises(InputError, match="checkpoint differ"):
        sweep(model, PROMPTS, out)


# --- bounded


GROWTH = """
import sys
import refmoe
from refmoe.run.sweep.sweep import sweep
from refmoe.weights.streaming.reader import high_water
folder, count, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
prompts = [[(n + 7 * i) % 500 for i in range(128)] for n in range(count)]
sweep(refmoe.load(folder, reference=True), prompts, out, chunk=128)
print(high_water())
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    shape = {"hidden_size": 1024, "num_hidden_layers": 2, "n_routed_experts": 6}
    shape |= {"num_attention_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 16}
    write_random(tmp_path / "wide", "f32", seed=0, shape=shape)
    peaks = []
    for count in (4, 16):
        ran = subprocess.run(
            [sys.executable, "-c", GROWTH, tmp_path / "wide", str(count), tmp_path / "s"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout))
    more = (16 - 4) * 128
    maps = more * 1024 * 4 * 3  # what the files of hidden states grow by: 19 MB
    # an id is an int in a list, in an array and in JSON, 64 bytes; the rest is the allocator's
    assert peaks[1] - peaks[0] <= 64 * more + maps / 8


# --- the verb


def test_the_verb_tells_what_it_wrote(random_int4, tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps(PROMPTS))
    how = ["--model", random_int4, "--tokens", tmp_path / "t.json", "--out", tmp_path / "s"]
    assert cli.main([*map(str, ["sweep", *how, "--positions", "0,-1", "--json"])]) == 0
    told = json.loads(capsys.readouterr().out)
    made = load_file(tmp_path / "s")
    assert {n: t["shape"] for n, t in told["tensors"].items()} == {
        n: list(x.shape) for n, x in made.items()
    }
    assert told["rows"] == sum(LENGTHS)
    assert made["2/lm_head#ids"].shape == (1, 64)
    assert made["4/lm_head#positions"].tolist() == [0, 7]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"logits": "top:0"}, "all, none or top:K"),
        ({"logits": "best"}, "all, none or top:K"),
        ({"positions": [5]}, "position 5 of prompt 0, which has 5 tokens"),
        ({"positions": [[0]]}, "positions for 1 prompts, there are 5"),
        ({"positions": "first"}, "all, last, or a list"),
        ({"points": ["nothing"]}, "no point matches 'nothing'"),
        ({"points": ["lm_head"]}, "logits are asked for by themselves"),
        ({"points": ["*#probs"], "chunk": 39}, "probs is not of single rows.* 40 tokens"),
        ({"chunk": 0}, "chunk = 0"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1: the prompt is empty"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(changed, says, random_bf16, tmp_path):
    how = {"prompts": PROMPTS, **changed}
    with pytest.raises(InputError, match=says):
        sweep(refmoe.load(random_bf16, reference=True), out=tmp_path / "s", **how)
    assert list(tmp_path.iterdir()) == []
