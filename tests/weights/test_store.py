"""Weights under a budget: the same bits, never over it, and nothing lost when a disk fails."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.cli import main
from refmoe.fast.engine import engine
from refmoe.files import InputError, parse_size
from refmoe.run.export import to_gguf
from refmoe.run.generate import generate_tokens, prefill, step
from refmoe.run.load import load
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.open import open_checkpoint
from refmoe.weights.streaming import reader
from refmoe.weights.streaming.budget import divide, least
from refmoe.weights.streaming.layout import expert_tensors
from refmoe.weights.streaming.reader import MAYBE, PAGE, PIECE, URGENT, Extent, Reader
from refmoe.weights.streaming.store import Store, open_store
from refmoe.weights.synthetic.k2_full import k2_full
from refmoe.weights.synthetic.random import write_random

PROMPT = [5, 17, 30, 44, 9, 7, 12, 8, 41, 22, 3, 11, 60, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_k2):
    """One checkpoint of each format, by name."""
    at = tmp_path_factory.mktemp("streamed")
    for name in ("bf16", "int4", "fp8"):
        write_random(at / name, name, seed=3, shards=2)
    to_gguf(load(tiny_k2), at / "tiny.gguf")
    return {"tiny-k2": tiny_k2, **{n: at / n for n in ("bf16", "int4", "fp8", "tiny.gguf")}}


def smallest(path):
    s = Store(open_checkpoint(path), 10**12, "cached")
    s.close()
    return s.least


@pytest.mark.system
@pytest.mark.parametrize("way", reader.WAYS)
@pytest.mark.parametrize("more", [1.0, 1.4, 2.5])
@pytest.mark.parametrize("name", ["tiny-k2", "bf16", "int4", "fp8", "tiny.gguf"])
def test_streamed_and_resident_weights_give_the_same_bits(folders, name, more, way):
    model = load(folders[name])
    try:
        streamed = Store(model.checkpoint, int(more * smallest(folders[name])), way)
    except OSError:
        pytest.skip(f"no {way} reads here")
    there, here = streamed.decoder(model.nx), model.decoder
    for chunk in (512, 5):  # a prompt in one piece, and in several
        a, b = (replace(d, nx=replace(d.nx, attention="auto")) for d in (here, there))
        memory = a.caches(), b.caches()
        first = [prefill(d, PROMPT, m, chunk) for d, m in zip((a, b), memory, strict=True)]
        assert np.array_equal(*first)
        for token in (4, 19, 33):
            assert np.array_equal(step(a, token, memory[0]), step(b, token, memory[1]))
    few = PROMPT[:7]  # so few that the head, too, is by kernels
    assert np.array_equal(here.logits(few), there.logits(few))
    streamed.close()


def test_with_places_for_one_choice_every_expert_is_read_anew(tiny_k2):
    """Eviction on every access, and still the same bits (the test above, 1.0)."""
    checkpoint = Checkpoint.open(tiny_k2)
    streamed = Store(checkpoint, smallest(tiny_k2), "cached")
    assert streamed.budget.slots == checkpoint.cfg.num_experts_per_tok
    decoder = streamed.decoder(engine("float32"))
    memory = decoder.caches()
    prefill(decoder, PROMPT[:1], memory)
    streamed.reset()
    step(decoder, 7, memory)
    read = streamed.counters
    layers = checkpoint.cfg.num_hidden_layers - checkpoint.cfg.first_k_dense_replace
    assert read.asked == layers * checkpoint.cfg.num_experts_per_tok
    assert read.expert_bytes >= read.asked * sum(t.nbytes for t in expert_tensors(checkpoint, 1, 0))
    assert read.dense_bytes > 0
    streamed.close()


@pytest.mark.parametrize("numerics", ["float64", "bfloat16"])
def test_the_definition_takes_batches_too(tiny_k2, numerics):
    model = load(tiny_k2, numerics, reference=True)
    streamed = Store(model.checkpoint, int(1.2 * smallest(tiny_k2)), "cached")
    decoder = streamed.decoder(model.nx)
    assert np.array_equal(model.decoder.hidden([PROMPT], [model.decoder.caches()]),
                          decoder.hidden([PROMPT], [decoder.caches()]))  # fmt: skip
    streamed.close()


def test_eight_bit_dense_weights_are_streamed_from_their_file(tiny_k2):
    ram = 7_000_000
    a, b = load(tiny_k2, dense="q8"), load(tiny_k2, dense="q8", ram=ram)
    assert b.store is not None
    assert np.array_equal(a.logits(PROMPT[:6]), b.logits(PROMPT[:6]))
    b.store.close()


def test_a_place_is_not_given_away_while_it_is_lent(tiny_k2):
    checkpoint = Checkpoint.open(tiny_k2)
    streamed = Store(checkpoint, int(1.1 * smallest(tiny_k2)), "cached")
    experts = streamed.decoder(engine("float32")).experts[1]
    x = np.zeros((9, checkpoint.cfg.hidden_size), np.float32)
    chosen = list(range(checkpoint.cfg.n_routed_experts))
    seen = []
    for batch in experts.batches(chosen, x):
        key = (2, len(seen) % checkpoint.cfg.n_routed_experts)
        for e in range(checkpoint.cfg.n_routed_experts):  # all that would push it out
            if streamed.arena.ask((3, e)):
                streamed.arena.wait((3, e))
                streamed.arena.release([(3, e)])
        streamed.arena.guess(*key[:1], [key[1]])
        for e, w in batch.items():
            mine = checkpoint.expert(1, e)
            for lent, mapped in zip(w, mine, strict=True):
                assert all(np.array_equal(p, q) for p, q in zip(lent, mapped, strict=True))
            seen.append(e)
    assert seen == chosen
    streamed.close()


def test_a_read_that_ends_while_a_batch_is_chosen_loses_no_expert(tiny_k2, monkeypatch):
    """The second expert is not there when it is looked at, and all are a moment later."""
    streamed = Store(Checkpoint.open(tiny_k2), 2 * smallest(tiny_k2), "cached")
    experts = streamed.decoder(engine("float32")).experts[1]
    looked = []

    def late(key):
        looked.append(key)
        streamed.arena.wait(key)
        return key != (1, 1) or looked.count(key) > 1

    monkeypatch.setattr(streamed.arena, "is_there", late)
    chosen = list(range(8))
    batches = list(experts.batches(chosen, np.zeros((9, 256), np.float32)))
    assert [e for batch in batches for e in batch] == chosen
    assert not streamed.arena.held
    streamed.close()


def test_a_batch_that_is_broken_off_leaves_every_place_free(tiny_k2):
    streamed = Store(Checkpoint.open(tiny_k2), smallest(tiny_k2), "cached")
    experts = streamed.decoder(engine("float32")).experts[1]
    batches = experts.batches(list(range(12)), np.zeros((9, 256), np.float32))
    next(batches)
    batches.close()
    assert not streamed.arena.held
    assert experts(3).gate_proj.shape == (128, 256)
    streamed.close()


def test_what_was_used_is_kept_for_the_next_run(tiny_k2, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load(tiny_k2)
    ram = int(1.5 * smallest(tiny_k2))
    first = Store(model.checkpoint, ram, "cached")
    list(generate_tokens(first.decoder(model.nx), PROMPT, max_new_tokens=9))
    use, file = first.arena.use.copy(), first.arena.file
    assert use.sum() > 0
    first.close()
    second = Store(model.checkpoint, ram, "cached")
    assert np.array_equal(second.arena.use, use)
    second.close()
    file.write_bytes(file.read_bytes()[:50])  # a damaged file only costs reads
    third = Store(model.checkpoint, ram, "cached")
    assert not third.arena.use.any()
    third.close()


def test_guesses_are_better_than_chance(tiny_k2):
    """The next layer's router on this layer's input names more of its choice than K/E would.

    Chance would be right p = K/E of the time, within √(p(1-p)/n) of it in n guesses; six of these.
    """
    model = load(tiny_k2)
    streamed = Store(model.checkpoint, 3 * smallest(tiny_k2), "cached")
    list(generate_tokens(streamed.decoder(model.nx), PROMPT, max_new_tokens=40))
    c, cfg = streamed.counters, model.cfg
    p = cfg.num_experts_per_tok / cfg.n_routed_experts
    assert c.guessed > 200
    assert c.guess_rate > p + 6 * (p * (1 - p) / c.guessed) ** 0.5
    streamed.close()


@given(
    items=st.lists(st.integers(1, 9000), min_size=1, max_size=9),
    expert=st.integers(1, 3000),
    chosen=st.integers(1, 8),
    spare=st.integers(0, 60_000),
)
def test_a_division_keeps_the_budget_and_least_is_the_least(items, expert, chosen, spare):
    smallest = least(items, expert, chosen)
    ram = smallest + spare
    b = divide(items, expert, 1000, chosen, ram)
    streams = len(b.resident) < len(items)
    held = sum(items[i] for i in b.resident) + 2 * b.buffer * streams + b.slots * expert
    assert held <= ram
    assert b.slots >= min(chosen, 1000)
    assert all(size <= b.buffer for i, size in enumerate(items) if i not in b.resident)
    with pytest.raises(InputError, match=f"{chosen} experts"):
        divide(items, expert, 1000, chosen, smallest - 1)


def test_a_budget_too_small_is_refused_with_the_figure(tiny_k2, capsys):
    assert main(["generate", "My", "--ram", "1MB", "--model", str(tiny_k2)]) == 2
    assert "budget of 0.00 GB is too small: 0.01 GB" in capsys.readouterr().err


@pytest.mark.system
def test_where_all_fits_or_lies_in_memory_nothing_is_streamed(tiny_k2):
    assert load(tiny_k2, ram=10**9).store is None
    shm = Path("/dev/shm")
    if not shm.is_dir() or not reader.in_memory(shm):
        pytest.skip("no /dev/shm in memory")
    copy = shm / f"refmoe-test-{os.getpid()}"
    try:
        shutil.copytree(tiny_k2, copy)
        assert open_store(Checkpoint.open(copy), 8_000_000) is None
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    assert not reader.in_memory(tiny_k2) or "shm" in str(tiny_k2)


# --- failing disks


@pytest.fixture
def own_copy(tmp_path, tiny_k2):
    folder = tmp_path / "tiny-k2"
    shutil.copytree(tiny_k2, folder)
    return folder


def streaming(folder):
    model = load(folder)
    streamed = Store(Checkpoint.open(folder), smallest(folder), "cached")
    return model, streamed, streamed.decoder(model.nx)


def test_a_shard_that_vanishes_is_named_and_nothing_is_lost(own_copy):
    model, streamed, decoder = streaming(own_copy)
    memory, right = decoder.caches(), model.decoder.caches()
    assert np.array_equal(prefill(decoder, PROMPT, memory), prefill(model.decoder, PROMPT, right))
    shard = next(own_copy.glob("*.safetensors"))
    for fd in streamed.reader._files.values():
        os.close(fd)
    streamed.reader._files.clear()
    shard.rename(shard.with_suffix(".away"))
    with pytest.raises(InputError, match=shard.name + ".*put it back"):
        step(decoder, 7, memory)
    assert memory[0].length == len(PROMPT)
    shard.with_suffix(".away").rename(shard)
    assert np.array_equal(step(decoder, 7, memory), step(model.decoder, 7, right))
    streamed.close()


def test_a_shard_that_is_cut_short_is_named(own_copy):
    _, streamed, decoder = streaming(own_copy)
    shard = next(own_copy.glob("*.safetensors"))
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    with pytest.raises(InputError, match=rf"ends at {size // 2} bytes"):
        prefill(decoder, PROMPT, decoder.caches())
    streamed.close()


# --- the reader


@pytest.mark.system
@pytest.mark.parametrize("way", reader.WAYS)
def test_what_is_read_is_what_is_there(tmp_path, way):
    file = tmp_path / "bytes"
    data = np.random.default_rng(0).integers(0, 256, 3 * PIECE + 1234, np.uint8)
    data.tofile(file)
    try:
        os.close(reader.open_for_reading(file, way))
    except OSError:
        pytest.skip(f"no {way} reads here")
    r = Reader(way)
    for start, nbytes in ((0, PAGE), (PAGE, 2 * PIECE), (2 * PIECE, PIECE + 1234)):
        whole = -(-nbytes // PAGE) * PAGE
        memory = reader.allocate(whole)
        r.read([(Extent(file, start, whole, nbytes), memory)]).wait()
        assert np.array_equal(memory[:nbytes], data[start : start + nbytes])
    assert r.bytes_read == PAGE + 2 * PIECE + PIECE + 1234
    r.close()


def test_what_has_not_begun_can_be_called_off(tmp_path):
    file = tmp_path / "bytes"
    np.zeros(8 * PIECE, np.uint8).tofile(file)
    r = Reader("cached", threads=1)
    memory = reader.allocate(8 * PIECE)
    first = r.read([(Extent(file, 0, 8 * PIECE, 8 * PIECE), memory)], URGENT)
    guess = r.read([(Extent(file, 0, 2 * PIECE, 2 * PIECE), reader.allocate(2 * PIECE))], MAYBE)
    off = r.cancel(guess)
    first.wait()
    guess.event.wait()
    assert off in (0, PIECE, 2 * PIECE)
    assert (guess.error is not None) == bool(off)
    assert r.bytes_read == 10 * PIECE - off
    assert not r.cancel(first)
    r.close()


def test_the_way_is_chosen_among_those_that_work(tmp_path):
    file = tmp_path / "bytes"
    np.zeros(1 << 20, np.uint8).tofile(file)
    way, rates = reader.choose_way(file)
    assert rates[way] == max(rates.values()) > 0
    assert "cached" in rates
    empty = tmp_path / "empty"
    empty.touch()
    assert reader.choose_way(empty)[0] in reader.WAYS


def test_sizes_have_units():
    assert parse_size("4GB") == 4 * 10**9
    assert parse_size("512 MiB") == 512 << 20
    assert parse_size("1.5e9") == 1_500_000_000
    for bad in ("", "GB", "-1GB", "4XB", "1.2.3", "0GB", "3iB"):
        with pytest.raises(InputError, match="expected bytes like"):
            parse_size(bad)


# --- the verbs


def test_generate_says_what_was_read(tiny_k2, capsys):
    argv = ["generate", "My lord", "--ram", "9MB", "--max-new-tokens", "6"]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(argv[:2] + argv[4:] + ["--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert document["tokens"] == plain["tokens"]
    assert plain["store"] is None
    told = document["store"]
    assert told["budget"] == 9_000_000
    assert told["asked"] > 0
    assert 0 <= told["hit_rate"] <= 1
    assert told["dense_bytes"] > 0
    assert main(argv) == 0
    assert "experts there when asked for" in capsys.readouterr().err


def test_bench_store_prints_its_document(capsys):
    argv = ["bench", "store", "--ram", "9MB", "--tokens", "3"]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    keys = ("budget", "max_rss", "disk_gbs", "tok_s", "hit_rate", "missed_bytes_per_token", "ratio")
    assert all(document[key] is not None for key in keys)
    assert document["ratio"] > 0
    assert main(argv) == 0
    assert "of what the disk gives alone" in capsys.readouterr().out
    assert main(["bench", "store", "--ram", "1GB"]) == 2
    assert main(["bench", "store"]) == 2


BUDGET = """
import sys
from refmoe.run import generate
from refmoe.run.load import load
from refmoe.run.generate import generation_decoder, prefill, step
from refmoe.weights.streaming.reader import high_water
def start(model):
    decoder = generation_decoder(model)
    memory = decoder.caches()
    prefill(decoder, [1], memory)
    return decoder, memory
generate.TINY = 0  # tiny-k2 needs kernels, too, which are loaded here
start(load())
model = load(sys.argv[1], ram=int(sys.argv[2]))
before = high_water()
decoder, memory = start(model)
for token in range(2, 4):
    step(decoder, token, memory)
print(before, high_water(), model.store is not None)
"""


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no high-water mark to read")
@pytest.mark.parametrize("more", [1.0, 1.2])
def test_no_more_is_resident_than_the_budget(tmp_path, more):
    """At K2's widths: what the interpreter had with its kernels loaded, the budget, and one token.

    A token's activations, of which no more than 64 are alive at once, are at most as wide as the
    dense MLP or the vocabulary.
    """
    shape = {"num_hidden_layers": 3, "n_routed_experts": 160, "vocab_size": 16384}
    shape |= {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    try:
        k2_full(tmp_path / "k2", shape, seed=0)
    except InputError as e:
        pytest.skip(str(e))  # a file system without holes
    ram = int(more * smallest(tmp_path / "k2"))
    total = sum(t.nbytes for t in Checkpoint.open(tmp_path / "k2").tensors.values())
    assert total > 4 * ram / more
    ran = subprocess.run(
        [sys.executable, "-c", BUDGET, tmp_path / "k2", str(ram)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after, streamed = ran.stdout.split()
    assert streamed == "True"
    token = 64 * 4 * 18432  # bytes; the vocabulary has 16,384
    assert int(after) - int(before) <= ram + token
