"""A card, its kernels and its budget, without one; `pytest -m gpu` runs what needs one.

Without a card everything but CuPy's own calls is the real thing: `tests/standin.py` compiles the
CUDA source as C++ and runs it, thread by thread, on memory that is as strict as a card's.
"""

import ctypes
import ctypes.util
import glob
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe import cli
from refmoe.fast.gpu import card as gpu_card
from refmoe.fast.gpu import device as gpu_device
from refmoe.fast.gpu import operations, placement
from refmoe.fast.gpu import operations as gpu_operations
from refmoe.fast.gpu import placement as gpu_placement
from refmoe.fast.gpu.card import Card
from refmoe.fast.gpu.kernels import FEW, FORMS, depth, source
from refmoe.fast.gpu.placement import Request
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.decoder import Decoder
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import dequantize
from refmoe.model.mla import Segment
from refmoe.model.numerics import NonFinite
from refmoe.oracle.selftest import golden
from refmoe.run.bench import gpu as bench_gpu
from refmoe.run.bench.kernels import draw
from refmoe.run.export import to_gguf
from refmoe.run.generate import generate_tokens, generation_decoder, prefill, step
from refmoe.run.load import Model, load
from refmoe.run.plan import measure as plan_measure
from refmoe.run.plan import time as plan_time
from refmoe.run.plan import units as plan_units
from refmoe.run.sweep.sweep import sweep
from refmoe.weights.open import open_checkpoint
from refmoe.weights.placement import CARD_RESERVE, Parts, count_parts, on_card
from refmoe.weights.streaming import layout
from refmoe.weights.streaming.store import Store
from refmoe.weights.synthetic.random import write_random
from tests import standin
from tests.networks import envelope, gamma
from tests.standin import Emulated

K2 = plan_time.model_config()
Q8_PARTS = Parts.of(K2, "q8")
PROMPT = [40, 7, 300, 22, 9, 1024, 5, 77, 8]
MEMORY = CARD_RESERVE  # beside it, budgets of tiny models are a few MB


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if standin.compiler() is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def device(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    there = Emulated(built)
    monkeypatch.setattr(gpu_device, "open_device", lambda: there)
    yield there
    standin.pool.limit = None


def real_card() -> Card:
    try:
        there = gpu_device.open_device()
    except InputError as e:
        pytest.skip(str(e))
    return Card(there, gpu_placement.budget_of(None, there))


# --- kernels


def bound(name: str, m: matrix.Matrix, x: np.ndarray) -> np.ndarray:
    """γ(depth)·|x||W|ᵀ, as derived in gpu_kernels.py: [T, O]."""
    size = np.abs(x.astype(np.float64)) @ np.abs(dequantize(m, np.float64)).T
    return gamma(depth(FORMS[name], m.shape[1]), np.float32) * size


def truth(m: matrix.Matrix, x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ dequantize(m, np.float64).T


SIZES = [(17, 256), (61, 7168), (150, 512), (9, 4096 + 640), (1, 128)]


def multiplied(card: Card, name: str, rng: np.random.Generator, sizes: Any = SIZES) -> None:
    for O, I in sizes:
        m = draw(name, O, I, rng)
        there = card.matrix(m)
        for T in range(1, FEW + 1):
            x = rng.standard_normal((T, I)).astype(np.float32)
            y = card.fetch(card.linear(card.send(x), there))[0]
            assert (np.abs(y - truth(m, x)) <= bound(name, m, x)).all()
        known = card.view(there)
        assert known is not None
        begin, end = O // 3, O
        wide = card.fetch(card.decoded(known, begin, end))[0]
        assert np.array_equal(wide, dequantize(m, np.float32)[begin:end])


@pytest.mark.parametrize("processors", [1, 100])  # two rows to a warp, and one
@pytest.mark.parametrize("name", FORMS)
def test_kernels_multiply_as_the_twin_within_the_derived_bound(device, name, processors):
    device.processors = processors
    multiplied(Card(device), name, np.random.default_rng(3))
    made = {kernel.split()[1] for kind, kernel in device.log if kind == "launch"}
    assert made >= {f"rows_{2 if processors == 1 else 1}_{t}" for t in (1, 2, 4)}


@pytest.mark.parametrize("blocks", [1, 5, 7])
@pytest.mark.parametrize("name", ["q8", "q4"])
def test_blocks_at_any_even_address_are_read_whole(device, name, blocks):
    """Rows of 34 or 18 bytes times an odd number begin between whole words every second time."""
    multiplied(Card(device), name, np.random.default_rng(4), [(6, 32 * blocks)])


@pytest.mark.parametrize("name", FORMS)
def test_many_tokens_go_through_decoded_tiles(device, name, monkeypatch):
    monkeypatch.setattr(gpu_card, "TILE", 1000)  # several tiles, the last not whole
    rng, card = np.random.default_rng(5), Card(device)
    m, x = draw(name, 37, 128, rng), rng.standard_normal((FEW + 3, 128)).astype(np.float32)
    y = card.fetch(card.linear(card.send(x), card.matrix(m)))[0]
    size = np.abs(x.astype(np.float64)) @ np.abs(dequantize(m, np.float64)).T
    assert (np.abs(y - truth(m, x)) <= gamma(128 + 1, np.float32) * size).all()  # any order


def test_sizes_that_are_no_whole_chunks_are_decoded(device):
    rng, card = np.random.default_rng(6), Card(device)
    m, x = draw("bf16", 5, 90, rng), rng.standard_normal((1, 90)).astype(np.float32)
    y = card.fetch(card.linear(card.send(x), card.matrix(m)))[0]
    size = np.abs(x.astype(np.float64)) @ np.abs(dequantize(m, np.float64)).T
    assert (np.abs(y - truth(m, x)) <= gamma(91, np.float32) * size).all()
    assert [kernel for kind, kernel in device.log if kind == "launch"] == ["bf16 decode"]


def test_every_code_of_every_small_format_comes_out_exact(device):
    """One weight at a time: x is a unit vector, so nothing is rounded but the scaled weight."""
    card = Card(device)
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scale = np.array([[0.37]], np.float32)
    fp8 = Fp8Block(codes, scale, (128, 128))
    y = card.fetch(card.decoded(_known(card, fp8), 0, 2))[0]
    assert np.array_equal(y, dequantize(fp8, np.float32), equal_nan=True)
    finite = codes.copy()
    finite[np.isnan(E4M3[finite])] = 0
    fp8 = Fp8Block(finite, scale, (128, 128))
    blocks = np.zeros((8, 1, 34), np.uint8)
    blocks[..., :2] = np.float16(0.123).reshape(1).view(np.uint8)
    blocks[..., 2:] = np.arange(256, dtype=np.uint8).reshape(8, 1, 32)
    for m in (fp8, Q8(blocks)):
        there, I = card.matrix(m), m.shape[1]
        for start in range(0, I, FEW):
            x = np.eye(I, dtype=np.float32)[start : start + FEW]
            y = card.fetch(card.linear(card.send(x), there))[0]
            assert np.array_equal(y, dequantize(m, np.float32)[:, start : start + FEW].T)


def test_a_weight_that_is_no_number_makes_its_row_none(device):
    card, m = Card(device), draw("fp8", 20, 256, np.random.default_rng(7))
    assert isinstance(m, Fp8Block)
    m.bits[3, 200] = 0x7F
    m.bits[19, 0] = 0xFF
    y = card.fetch(card.linear(card.send(np.zeros((1, 256), np.float32)), card.matrix(m)))[0]
    assert np.flatnonzero(np.isnan(y[0])).tolist() == [3, 19]


def test_float16_comes_out_as_it_is(device):
    """All 65,536 of them, subnormal numbers, infinities and NaN too."""
    card = Card(device)
    m = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    y = card.fetch(card.decoded(_known(card, m), 0, 256))[0]
    assert np.array_equal(y, m.astype(np.float32), equal_nan=True)


def _known(card: Card, m: Any) -> gpu_card.GpuMatrix:
    known = card.view(card.matrix(m))
    assert known is not None
    return known


@pytest.mark.parametrize("name", FORMS)
def test_heads_have_rows_and_inputs_of_their_own(device, name):
    by_head(Card(device), name)


def by_head(card: Card, name: str) -> None:
    """kv_b_proj's two halves, [H(N+V), C]: N = 128 as FP8's blocks want it."""
    T, H, N, V, C = 2, 3, 128, 20 if name != "fp8" else 128, 256
    rng = np.random.default_rng(8)
    m = draw(name, H * (N + V), C, rng)
    known, w = _known(card, m), dequantize(m, np.float64).reshape(H, N + V, C)
    x = rng.standard_normal((T, H, C)).astype(np.float32)
    y = card.fetch(card.by_head(card.send(x), known, N, V, N + V))[0]
    size = np.einsum("thc,hvc->thv", np.abs(x), np.abs(w[:, N:]))
    error = np.abs(y - np.einsum("thc,hvc->thv", x.astype(np.float64), w[:, N:]))
    assert (error <= gamma(depth(FORMS[name], C), np.float32) * size).all()
    q = rng.standard_normal((T, H, N)).astype(np.float32)
    y = card.fetch(card.latent(card.send(q), known, N + V))[0]
    size = np.einsum("thn,hnc->thc", np.abs(q), np.abs(w[:, :N]))
    error = np.abs(y - np.einsum("thn,hnc->thc", q.astype(np.float64), w[:, :N]))
    assert (error <= gamma(N + 2, np.float32) * size).all()


def nvrtc() -> Any:
    """NVIDIA's compiler as a library: a wheel's, a toolkit's or the system's; None without one."""
    found = [ctypes.util.find_library("nvrtc")]
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        found += glob.glob(f"{place}/**/libnvrtc.so*", recursive=True)
    found += sorted(glob.glob("/usr/local/cuda*/**/libnvrtc.so*", recursive=True))
    for name in filter(None, found):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def by_nvrtc(library: Any, code: str, architecture: str) -> str:
    program, options = ctypes.c_void_p(), [f"--gpu-architecture={architecture}", "--std=c++17"]
    at = ctypes.byref(program)
    assert library.nvrtcCreateProgram(at, code.encode(), b"k.cu", 0, None, None) == 0
    texts = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = library.nvrtcCompileProgram(program, len(options), texts)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    library.nvrtcDestroyProgram(at)
    return ptx.value.decode()


def by_nvcc(code: str, architecture: str, folder: Path) -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("neither NVRTC nor nvcc: pip install nvidia-cuda-nvrtc-cu12, or a toolkit")
    (folder / "k.cu").write_text(code)
    command = [nvcc, "-ptx", f"-arch={architecture}", "-std=c++17", "-o", folder / "k.ptx"]
    done = subprocess.run([*command, folder / "k.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "k.ptx").read_text()


@pytest.mark.cuda_compiler
@pytest.mark.parametrize("architecture", ["compute_86", "compute_90"])
@pytest.mark.parametrize("name", FORMS)
def test_the_source_compiles(name, architecture, tmp_path):
    library, code = nvrtc(), source(FORMS[name])
    if library is not None:
        text = by_nvrtc(library, code, architecture)
    else:
        text = by_nvcc(code, architecture, tmp_path)
    entries = {f"rows_{r}_{t}" for r in (1, 2) for t in (1, 2, 4)} | {"decode", "latent"}
    assert all(f".entry {entry}(" in text for entry in entries)
    assert ".f64" not in text  # a constant without its f would be slow, and no one would see it


@pytest.mark.cupy
def test_the_stand_in_offers_nothing_that_cupy_has_not():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    for name in standin.NAMES:
        assert hasattr(cupy, name), name
    for name in (*standin.METHODS, *(f"__{o}__" for o in standin.OPERATORS), "T", "strides"):
        assert hasattr(cupy.ndarray, name), name


# --- placement and budget


def test_generate_and_plan_agree_on_a_card_of_12_gb():
    """The preset's card and what `--gpu --vram 12GB --dense q8 --cache bf16` asks for."""
    preset = plan_measure.load_preset("rtx3060-optane768")
    assert (preset.dense, preset.cache, preset.context) == ("q8", "bf16", gpu_placement.CONTEXT)
    for experts in (0, 5, None):
        case = plan_time.Placed.of(
            Q8_PARTS, preset, None, plan_units.NUMBER_BYTES[preset.cache], None, experts
        )
        theirs = case.placement.on("vram")
        count = theirs.experts if experts is None else experts
        ours = on_card(Q8_PARTS, 12e9, gpu_placement.CONTEXT, 2, count)
        assert theirs is not None
        assert (ours.parts, ours.caches, ours.cache, ours.experts) == (
            theirs.parts,
            theirs.caches,
            theirs.cache,
            theirs.experts,
        )
        assert ours.nbytes == theirs.nbytes <= 12e9 - CARD_RESERVE
    exact = on_card(Parts.of(K2), 12e9, gpu_placement.CONTEXT, 2, 0)
    theirs = plan_time.Placed.of(Parts.of(K2), preset, None, 2, None, 0).placement.on("vram")
    assert theirs is not None
    assert exact.parts == theirs.parts


class Paper:
    """A card of which only the size is known."""

    name, processors, xp = "RTX 3060", 28, np

    def __init__(self, total: float, free: float | None = None):
        self.total, self.room = int(total), int(free or total)

    def free(self) -> int:
        return self.room

    def limit(self, nbytes: int) -> None:
        self.limited = nbytes


def test_k2_on_an_rtx_3060_is_planned_within_its_budget():
    """12 GiB; the budget is 12 GB, all of it accounted for."""
    device: Any = Paper(12 * 2**30)
    found = gpu_placement.plan_gpu(K2, Q8_PARTS, Request(None, 0, 4096, "bf16"), device)
    assert found.card.budget == device.limited == gpu_card.VRAM
    assert len(found.share.layers("attention")) == 61
    assert found.share.has("lm_head")
    assert found.card.rows >= 128
    used = (
        found.share.nbytes
        + gpu_placement.beside(K2, found.share)
        + gpu_placement.scratch(K2, found.card.rows)
    )
    assert used <= found.card.budget
    assert "attention of 61 of 61 layers" in found.card.said


@pytest.mark.parametrize(
    ("request_", "free", "said"),
    [
        (Request(vram=16 * 10**9), 12.9e9, ["16.00 GB", "12.90 GB", "12.77 GB of them free"]),
        (Request(vram=3 * 10**8), 12.9e9, ["0.30 GB", "holds no layer", "0.27 GB"]),
        (Request(vram=12 * 10**9, experts=5000), 12.9e9, ["5000", "room for", "of 24.8 MB each"]),
        (Request(vram=12 * 10**9, context=1 << 17), 12.9e9, ["GB"]),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_with_the_numbers(request_, free, said):
    device: Any = Paper(12.9e9, free)
    if request_.context == 1 << 17:  # not refused: fewer layers fit beside longer caches
        share = gpu_placement.plan_gpu(K2, Q8_PARTS, request_, device).share
        assert 0 < len(share.layers("attention")) < 61
        return
    with pytest.raises(InputError) as e:
        gpu_placement.plan_gpu(K2, Q8_PARTS, request_, device)
    for part in said:
        assert part in str(e.value)


def test_what_is_refused_has_loaded_nothing(device):
    device.total = 10**9
    for request_ in (Request(vram=2 * 10**9), Request(vram=10**8), Request(experts=10**6)):
        with pytest.raises(InputError):
            load(gpu=request_)
    assert device.log == []


@pytest.mark.parametrize("rows", [1, 3, 40, 200])
@pytest.mark.parametrize("cache", ["float32", "bf16"])
def test_what_is_computed_stays_within_what_is_planned_for_it(device, rows, cache, monkeypatch):
    """The stand-in's high-water mark beside what the share holds; a prompt after a longer one.

    With blocks and tiles so small that what grows with the model and the rows is seen.
    """
    for name, small in (("SCORES", 1 << 10), ("BLOCK", 32), ("TILE", 1 << 12)):
        for module in (gpu_card, operations, placement):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, small)
    model = load(gpu=Request(10**9, 0, 512, cache))
    assert model.card is not None
    decoder = generation_decoder(model, cache=cache)
    memory = decoder.caches()
    share = on_card(count_parts(model.checkpoint), 10**9, 512, 2 if cache == "bf16" else 4, 0)
    rng = np.random.default_rng(9)
    prefill(decoder, rng.integers(0, 2000, 64).tolist(), memory)
    held = share.nbytes + gpu_placement.beside(model.cfg, share)
    standin.pool.most = 0
    prefill(decoder, rng.integers(0, 2000, rows).tolist(), memory)
    planned = gpu_placement.scratch(model.cfg, rows)
    assert device.peak() <= held + planned


def test_more_than_the_planned_context_is_refused_and_loses_nothing(device):
    decoder = generation_decoder(load(gpu=Request(10**9, 0, 12)))
    memory = decoder.caches()
    prefill(decoder, PROMPT, memory)
    with pytest.raises(InputError, match=r"13 tokens.*room for 12"):
        prefill(decoder, PROMPT[:4], memory)
    assert [c.length for c in memory] == [9] * 4
    assert np.isfinite(step(decoder, 5, memory)).all()


def test_generation_ends_where_the_planned_context_does(device):
    decoder = generation_decoder(load(gpu=Request(10**9, 0, 12)))
    assert len(list(generate_tokens(decoder, PROMPT))) == 12 - len(PROMPT) + 1


# --- a model on the card


def budgets(model: Model) -> dict[str, int]:
    """Of tiny-k2: everything, and such as leave some parts in memory."""
    parts = count_parts(model.checkpoint)
    attention = sum(p.nbytes for p in parts.always if p.kind == "attention")
    one = next(p.nbytes for p in parts.always if p.kind == "attention")
    head = next(p.nbytes for p in parts.always if p.kind == "head")
    cache = parts.cache_bytes(64)
    return {
        "all": 10**9,
        "attention alone": MEMORY + attention + 4 * cache + 1000,
        "no shared expert": MEMORY + attention + 4 * cache + head + 1000,
        "one layer": MEMORY + one + cache + head + 1000,
    }


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    """The definition's logits for the prompt, and by how much correct runs may differ."""
    out = {}
    for dense in ("exact", "q8"):
        decoder = load(reference=True, dense=dense).decoder
        out[dense] = decoder.logits(PROMPT)[-1], envelope(decoder, PROMPT)
    return out


@pytest.mark.parametrize("what", ["all", "attention alone", "no shared expert", "one layer"])
@pytest.mark.parametrize("dense", ["exact", "q8"])
def test_any_placement_is_the_same_network(device, exact, what, dense):
    """Within the measured spread of runs whose every operation is as wrong as it may be."""
    vram = budgets(load())[what]
    decoder = generation_decoder(load(dense=dense, gpu=Request(vram, 0, 64)), int4="exact")
    logits, bound_ = exact[dense]
    whole = prefill(decoder, PROMPT, decoder.caches())
    assert np.abs(whole - logits).max() <= bound_
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-3], memory)
    for token in PROMPT[-3:]:
        alone = step(decoder, token, memory)
    assert np.abs(alone - logits).max() <= bound_


def test_some_experts_on_the_card_are_the_same_network(device, exact):
    model = load(gpu=Request(10**9, 47, 64))
    decoder = generation_decoder(model, int4="exact")
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-3], memory)
    device.log.clear()
    for token in PROMPT[-3:]:
        logits = step(decoder, token, memory)
    right, bound_ = exact["exact"]
    assert np.abs(logits - right).max() <= bound_
    assert any(kind == "launch" and name.startswith("int4 rows") for kind, name in device.log)


def test_all_experts_on_the_card_send_nothing_up_but_the_token(device, exact):
    model = load(gpu=Request(10**9, 120, 64))
    decoder = generation_decoder(model, int4="exact")
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-1], memory)
    device.log.clear()
    logits = step(decoder, PROMPT[-1], memory)
    right, bound_ = exact["exact"]
    assert np.abs(logits - right).max() <= bound_
    ups = [n for kind, n in device.log if kind == "up"]
    assert ups == [4 * 256, 4 * 32, 4 * 32]  # the embedded token, cos and sin


def test_hottest_experts_are_those_that_were_used_most():
    parts = count_parts(load().checkpoint)
    use = np.zeros((4, 40), np.float32)
    use[1, 7], use[3, 2], use[3, 39], use[2, 0] = 9, 8, 7, 1
    assert gpu_placement.most_used_experts(use, parts, 3) == {1: [7], 3: [2, 39]}
    assert gpu_placement.most_used_experts(None, parts, 7) == {1: [0, 1, 2], 2: [0, 1], 3: [0, 1]}
    assert gpu_placement.most_used_experts(use, parts, 0) == {}


def test_each_weight_goes_up_once_and_x_once_each_way(device):
    model = load(gpu=Request(10**9, 0, 64))
    cfg, parts = model.cfg, count_parts(model.checkpoint)
    weights = sum(p.nbytes for p in parts.always if p.kind != "embedding")
    biases = 3 * 4 * cfg.n_routed_experts  # stay in memory, with the choice
    gains = 4 * (2 * cfg.hidden_size + cfg.q_lora_rank + cfg.kv_lora_rank) + cfg.hidden_size
    assert sum(n for kind, n in device.log if kind == "up") == weights - biases + 2 * gains
    decoder = generation_decoder(model)
    memory = decoder.caches()
    prefill(decoder, PROMPT, memory)
    device.log.clear()
    step(decoder, 3, memory)
    x, logits, row = 4 * cfg.hidden_size, 4 * cfg.n_routed_experts, 4 * cfg.vocab_size
    angles = 4 * cfg.qk_rope_head_dim // 2
    start = [("up", x), ("wait", None), ("up", angles), ("wait", None), ("up", angles)]
    layer = [("down", x), ("down", logits), ("wait", None), ("up", x)]
    end = [("down", row), ("wait", None)]
    assert [entry for entry in device.log if entry[0] != "launch"] == start + 3 * layer + end


@pytest.mark.parametrize("what", ["attention alone", "one layer"])
def test_x_crosses_once_each_way_where_the_shared_expert_is_in_memory(device, what):
    """In a layer with attention on the card; one in memory asks for nothing but its router's."""
    model = load(gpu=Request(budgets(load())[what], 0, 64))
    decoder = generation_decoder(model)
    memory = decoder.caches()
    prefill(decoder, PROMPT, memory)
    x = 4 * model.cfg.hidden_size
    norms = [decoder.layers[i].input_layernorm for i in range(4)]
    device.log.clear()
    step(decoder, 3, memory)
    count = {way: sum(entry == (way, x) for entry in device.log) for way in ("up", "down")}
    here = [model.card.has(norm) for norm in norms]
    assert here == ([True] * 4 if what == "attention alone" else [True] + 3 * [False])
    layers = decoder.layers
    shared = [model.card.has(layers[i].mlp[1]) for i in (1, 2, 3)]
    if what == "attention alone":
        assert not any(shared)
        # the token, and each layer's sum; the dense layer's x, each layer's, and the last one's
        assert count == {"up": 1 + 4, "down": 1 + 3 + 1}


def test_the_shared_expert_is_launched_before_the_processor_begins(device):
    model = load(gpu=Request(10**9, 0, 64))
    decoder = generation_decoder(model)
    seams = decoder.nx.experts.__self__
    base = seams.base

    def experts(*args: Any) -> np.ndarray:
        device.log.append(("routed", None))
        return base.experts(*args)

    seams.base = replace(base, experts=experts)
    memory = decoder.caches()
    prefill(decoder, PROMPT, memory)
    device.log.clear()
    step(decoder, 3, memory)
    marks = [i for i, entry in enumerate(device.log) if entry[0] == "routed"]
    assert len(marks) == 3
    for i in marks:
        down = max(n for n in range(i) if device.log[n][0] == "down")
        between = device.log[down + 1 : i]
        assert [kind for kind, _ in between] == ["wait", "launch", "launch", "launch"]


def test_the_same_text_comes_out(device):
    model, there = load(), load(gpu=Request(10**9, 0, 64))
    ids = model.tokenizer.encode("ROMEO:")
    texts = [
        list(generate_tokens(generation_decoder(m, "exact"), ids, max_new_tokens=12))
        for m in (model, there)
    ]
    assert texts[0] == texts[1]


def test_watchers_see_the_same_points_and_what_they_return_goes_on(device):
    def seen(decoder: Decoder, spoil: bool = False) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}

        def watch(path: str, x: np.ndarray) -> np.ndarray:
            assert isinstance(x, np.ndarray)
            out[path] = x.copy()
            return 0 * x if spoil and path == "model.layers.1.self_attn" else x

        nx = replace(decoder.nx, attention="absorbed", watch=watch)
        decoder.using(nx).logits(PROMPT)
        return out

    host, card = load(), load(gpu=Request(10**9, 0, 64))
    a, b = seen(host.decoder), seen(card.decoder)
    assert set(a) == set(b)
    reference = load(reference=True).decoder
    limit = envelope(reference, PROMPT)
    assert np.abs(a["lm_head"] - b["lm_head"]).max() <= 2 * limit
    spoiled = seen(card.decoder, True)["lm_head"]
    assert np.abs(spoiled - seen(host.decoder, True)["lm_head"]).max() <= 2 * limit
    assert np.abs(spoiled - b["lm_head"]).max() > 2 * limit


def test_what_is_not_finite_is_found_when_it_comes_down(device):
    decoder = load(gpu=Request(10**9, 0, 64)).decoder
    memory = decoder.caches()
    decoder.logits(PROMPT, memory)

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        return x * np.inf if path == "model.layers.2.self_attn.q_b_proj" else x

    watch.wants = lambda path: path.endswith("q_b_proj")  # type: ignore[attr-defined]
    with pytest.raises(NonFinite, match=r"model\.layers\.2\.mlp#input.*row 0.*Without --gpu"):
        decoder.using(decoder.nx.watching(watch)).logits([5], memory)
    assert [c.length for c in memory] == [9] * 4


def test_a_layer_goes_up_computes_and_is_freed(device):
    """As a sweep does it with a model whose dense part is larger than the card."""
    host = load(reference=True)
    card = Card(device, 10**9)
    nx = replace(gpu_operations.engine(card), attention="absorbed").within("model.layers.1.")
    before = standin.pool.used
    rng = np.random.default_rng(10)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    weights, experts = host.decoder.layers[1], host.decoder.experts[1]

    def through(w: Any, nx: Any) -> np.ndarray:
        from refmoe.model.cache import LatentCache
        from refmoe.model.decoder import layer

        segment = Segment(slice(0, 3), LatentCache(host.cfg, np.float32))
        return layer(x, w, experts, [segment], host.cfg, nx)

    there = card.layer(weights)
    assert standin.pool.used > before
    y = card.bring(through(there, nx), None)
    right = through(weights, host.nx.within("model.layers.1."))
    # a layer is a part of the network whose last row envelope() bounds; here the exact sums are
    # small, and 40 products of at most 896 terms in a row err by γ of all of them
    assert np.abs(y - right).max() <= gamma(40 * 896, np.float32) * np.abs(right).max()
    del there
    card.forget()
    card._same.clear()
    assert standin.pool.used == before


@pytest.mark.parametrize("ram", [None, 1.4])
def test_a_sweep_passes_each_layer_through_the_card_once(device, tiny_k2, tmp_path, ram):
    """The numbers of a sweep without a card, and never more than one layer there."""
    prompts = [PROMPT, PROMPT[:1], PROMPT[2:7]]
    options: Any = {"logits": "all", "points": ["*self_attn"]}
    there = Store(open_checkpoint(tiny_k2), 10**12, "cached")
    there.close()
    budget = None if ram is None else int(ram * there.least)
    host = sweep(load(tiny_k2), prompts, tmp_path / "a", **options)
    parts = count_parts(open_checkpoint(tiny_k2))
    layers = [sum(p.nbytes for p in parts.always if p.layer == i) for i in range(4)]
    request_ = Request(10**8, 0, 64, passing=True)
    model = load(tiny_k2, ram=budget, gpu=request_)
    before = standin.pool.used
    card = sweep(model, prompts, tmp_path / "b", **options)
    if model.store is not None:
        model.store.close()
    assert host.tensors == card.tensors
    a, b = load_file(host.out), load_file(card.out)
    for name in a:
        if a[name].dtype == np.float32 and "margin" not in name:
            limit = 2 * envelope(load(reference=True).decoder, prompts[int(name[0])], runs=2)
            assert np.abs(a[name] - b[name]).max() <= limit, name
        elif "experts" in name:
            assert np.array_equal(a[name], b[name])
    ups = [n for kind, n in device.log if kind == "up"]
    assert sum(ups) >= sum(layers) - 3 * 160  # routers' biases stay
    largest = [n for n in ups if n == 256 * 896 * 2]  # the dense layer's three matrices
    assert len(largest) == 3
    assert device.peak() < sum(layers)
    model.card.forget()
    assert standin.pool.used - before <= 8 * gpu_card.SMALL


def test_a_sweep_that_the_card_cannot_hold_is_refused(device, tmp_path):
    with pytest.raises(InputError, match=r"largest layer takes .* GB"):
        load(gpu=Request(10**6, passing=True))
    model = load(gpu=Request(10**8, 0, 8, passing=True))
    with pytest.raises(InputError, match=r"prompt of 9 tokens.*room for 8"):
        sweep(model, [PROMPT], tmp_path / "x")
    assert "up" not in {kind for kind, _ in device.log}


@pytest.mark.parametrize("dense", ["exact", "q8"])
def test_under_a_budget_of_ram_the_bits_are_the_same(device, tiny_k2, monkeypatch, dense):
    """Experts are lent from the store, layers go up from its buffers, the head in its tiles."""
    monkeypatch.setattr(layout, "TILE", 1 << 18)
    monkeypatch.setattr(layout, "ROWS", 1 << 12)
    there = Store(open_checkpoint(tiny_k2), 10**12, "cached")
    there.close()
    model = load(tiny_k2, dense=dense, ram=int(1.4 * there.least), gpu=Request(10**9, 0, 64))
    assert model.store is not None
    try:
        mapped = generation_decoder(load(tiny_k2, dense=dense, gpu=Request(10**9, 0, 64)))
        streamed = generation_decoder(model)
        if dense == "exact":
            assert isinstance(streamed.lm_head, gpu_card.Pieces)
            assert len(streamed.lm_head.parts) > 1
        memory = mapped.caches(), streamed.caches()
        a, b = (prefill(d, PROMPT[:4], m) for d, m in zip((mapped, streamed), memory, strict=True))
        assert np.array_equal(a, b)
        model.store.reset()
        a, b = (step(d, 9, m) for d, m in zip((mapped, streamed), memory, strict=True))
        assert np.array_equal(a, b)
        assert model.store.counters.dense_bytes == 0  # all of it is on the card
    finally:
        model.store.close()


@pytest.mark.parametrize("format", ["bf16", "f16", "f32", "int4", "fp8"])
def test_every_format_of_a_checkpoint_goes_up(device, tmp_path, format):
    shape = {"q_lora_rank": None} if format == "f16" else {}
    write_random(tmp_path / "m", format, seed=3, shape=shape)
    reference = load(tmp_path / "m", reference=True).decoder
    prompt = [3, 99, 7, 250, 12, 8]
    decoder = generation_decoder(load(tmp_path / "m", gpu=Request(10**9, 0, 64)), int4="exact")
    limit = envelope(reference, prompt)
    right = reference.logits(prompt)
    memory = decoder.caches()
    assert np.abs(prefill(decoder, prompt[:-1], memory) - right[-2]).max() <= limit
    assert np.abs(step(decoder, prompt[-1], memory) - right[-1]).max() <= limit


def test_a_gguf_goes_up_with_its_own_kv_b(device, tmp_path):
    to_gguf(load(), tmp_path / "m.gguf")
    reference = load(tmp_path / "m.gguf", reference=True).decoder
    decoder = generation_decoder(load(tmp_path / "m.gguf", gpu=Request(10**9, 0, 64)), int4="exact")
    limit = envelope(reference, PROMPT)
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-1], memory)
    assert np.abs(step(decoder, PROMPT[-1], memory) - reference.logits(PROMPT)[-1]).max() <= limit


def test_goldens_pass(device, monkeypatch):
    """Other engines' tensors, of every member's layout; greedy continuations need a real card."""
    manifest = golden.read_manifest(golden.golden_folder() / "vectors")
    for case in manifest["cases"]:
        case.pop("greedy", None)
    monkeypatch.setattr(golden, "read_manifest", lambda folder: manifest)
    rows = list(golden.verify(gpu=Request(4 * 10**9)))
    assert len({row.model for row in rows}) == len(
        {(c["model"], c["sequence"]) for c in manifest["cases"]}
    )
    assert [row for row in rows if not row.ok] == []


def test_what_no_kernel_reads_is_refused_before_anything_goes_up(device):
    """A K-quant in the last place that is looked at."""
    model = load()
    blocks = np.zeros((2304, 144), np.uint8)
    odd = replace(model.decoder, lm_head=Coded(blocks, 256, lambda b: b.astype(np.float32), "Q4_K"))
    found = gpu_placement.plan_gpu(
        model.cfg, count_parts(model.checkpoint), Request(10**9, 0, 64), device
    )
    with pytest.raises(InputError, match="no kernel for Q4_K; it reads bf16"):
        gpu_placement.upload(odd, found, {}, "refmoe")
    assert device.log == []
    assert device.peak() == 0


# --- without a card


def test_without_cupy_it_fails_at_once_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for argv in (["generate", "ROMEO:", "--gpu"], ["bench", "gpu"], ["bench", "decode", "--gpu"]):
        assert cli.main(argv) == 2
        told = capsys.readouterr()
        assert "pip install 'refmoe[gpu]'" in told.err
        assert "refmoe[gpu13]" in told.err
        assert told.out == ""


def test_a_library_without_a_device_fails_at_once(monkeypatch, capsys):
    class Runtime:
        @staticmethod
        def getDeviceCount() -> int:
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    fake: Any = type(sys)("cupy")
    fake.__version__ = "14.2.0"
    fake.cuda = type(sys)("cupy.cuda")
    fake.cuda.runtime = Runtime
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert cli.main(["generate", "ROMEO:", "--gpu"]) == 2
    told = capsys.readouterr().err
    assert "no CUDA-capable device" in told
    assert "pip install" in told


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu", "--numerics", "float64"], "float32"),
        (["--gpu", "--reference"], "reference"),
        (["--vram", "12GB"], "--vram is for --gpu"),
        (["--gpu-experts", "3"], "--gpu-experts is for --gpu"),
        (["--gpu", "--gpu-experts", "-1"], "from 0"),
        (["--gpu", "--vram", "40GB"], "40.00 GB"),
    ],
)
def test_bad_use_is_told(device, argv, said, capsys):
    assert cli.main(["generate", "ROMEO:", "--max-new-tokens", "1", *argv]) == 2
    assert said in capsys.readouterr().err


def test_nothing_of_it_is_loaded_without_asking():
    code = (
        "import sys, refmoe; m = refmoe.load(); m.logits([5, 6]); "
        "print([n for n in ('cupy', 'refmoe.fast.gpu') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_bench_runs(device, capsys, monkeypatch):
    """With sizes for which an emulated card is quick enough; its rates mean nothing here."""
    small = {"SHAPES": ((64, 256), (40, 512)), "EIGHT": 1, "COPIED": 1 << 16, "PLACES": 2}
    small |= {"TIMES": 1, "ROUNDS": 3, "PROMPT": 6, "WARM": 1, "STEPS": 1}
    for name, value in small.items():
        monkeypatch.setattr(bench_gpu, name, value)
    assert cli.main(["bench", "gpu", "--vram", "1GB", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert set(d) == {"device", "copy_gbs", "kernels", "decode"}
    assert d["device"] == "stand-in"
    assert [(r["name"], r["cols"]) for r in d["kernels"][:2]] == [("f32", 256), ("f32", 512)]
    assert {r["name"] for r in d["kernels"]} == set(FORMS)
    for r in d["kernels"]:
        assert 0 < r["rel_error"] < 1e-6  # √depth·2⁻²⁴ as random signs add: 4e-7 at 7,168 columns
        assert r["ratio"] > 0
    placements = ["CPU only", "dense on card", "all on card"]
    assert [r["placement"] for r in d["decode"]] == placements
    assert d["decode"][0]["vram_peak"] is None
    assert all(0 < r["vram_peak"] <= 10**9 for r in d["decode"][1:])
    assert "tok/s" in bench_gpu.format_gpu(d)[-1]


def test_what_the_card_has_no_room_for_is_told(device, capsys, monkeypatch):
    """Where planning was wrong all the same, the limit holds and the error says so."""
    monkeypatch.setattr(gpu_placement, "scratch", lambda cfg, rows: 0)
    load_ = Request(MEMORY + 11_000_000, 0, 64)
    model = load(gpu=load_)
    standin.pool.limit = standin.pool.used + 1000
    with pytest.raises(MemoryError):
        prefill(generation_decoder(model), PROMPT, model.decoder.caches())
    full = MemoryError("5 of 4 bytes")
    monkeypatch.setattr("refmoe.cli.models.load", lambda *_, **__: (_ for _ in ()).throw(full))
    assert cli.main(["generate", "ROMEO:"]) == 2
    assert "out of memory: 5 of 4 bytes" in capsys.readouterr().err


def test_generate_says_what_is_where(device, capsys):
    argv = ["generate", "ROMEO:", "--max-new-tokens", "2", "--gpu", "--vram", "1GB", "--json"]
    assert cli.main([*argv, "--ctx", "64", "--dense", "q8", "--cache", "bf16"]) == 0
    told = capsys.readouterr()
    card = json.loads(told.out)["gpu"]
    assert card["budget"] == 10**9
    assert card["context"] == 64
    assert 0 < card["vram_peak"] <= 10**9
    assert "attention of 4 of 4 layers" in card["placement"]
    assert card["placement"] in told.err


# --- with a card


@pytest.fixture(scope="module")
def card() -> Card:
    return real_card()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_on_a_card_kernels_keep_their_bounds(card, name):
    multiplied(card, name, np.random.default_rng(3), [*SIZES, (2048, 7168), (7168, 2048)])
    by_head(card, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", ["exact", "q8"])
@pytest.mark.parametrize("what", ["all", "attention alone", "no shared expert", "one layer"])
def test_on_a_card_any_placement_is_the_same_network(card, exact, what, dense):
    vram = budgets(load())[what]
    model = load(dense=dense, gpu=Request(vram, 0, 64))
    assert model.card is not None
    decoder = generation_decoder(model, int4="exact")
    logits, bound_ = exact[dense]
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-3], memory)
    for token in PROMPT[-3:]:
        alone = step(decoder, token, memory)
    assert np.abs(alone - logits).max() <= bound_
    assert model.card.device.peak() <= vram


@pytest.mark.gpu
def test_on_a_card_all_experts_are_the_same_network(card, exact):
    decoder = generation_decoder(load(gpu=Request(10**9, 120, 64)), int4="exact")
    memory = decoder.caches()
    prefill(decoder, PROMPT[:-1], memory)
    logits, bound_ = exact["exact"]
    assert np.abs(step(decoder, PROMPT[-1], memory) - logits).max() <= bound_


@pytest.mark.gpu
def test_on_a_card_goldens_pass(card):
    assert [row for row in golden.verify(gpu=Request()) if not row.ok] == []


@pytest.mark.gpu
def test_on_a_card_it_benches(card, capsys):
    assert cli.main(["bench", "gpu", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["copy_gbs"] > 0
    assert {r["name"] for r in d["kernels"]} == set(FORMS)
    assert all(r["rel_error"] < 1e-6 for r in d["kernels"])  # √depth·2⁻²⁴, at most 4e-7
    assert [r["placement"] for r in d["decode"]] == ["CPU only", "dense on card", "all on card"]
