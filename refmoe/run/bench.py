"""How fast, beside what the memory gives: every figure is a ratio to a rate of the same run.

    kernels    each format's rows times tokens, GB/s of weights over the rate of plain reading
    decode     one token after another: tok/s, and bytes a token times tok/s over the same rate
    prefill    a prompt: tok/s
    peers      the small slice of K2 through transformers and llama.cpp beside refmoe

Rates of a shared machine change by half from one second to the next. So reading and measuring take
turns, a ratio is of neighbours, and the middle one of all ratios counts; rates are the middle ones
too, and the best is given beside them. Reading adds up 64-bit words, which the compiler makes as
wide as the machine.
"""

import importlib
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from refmoe.fast import threads
from refmoe.fast.kernels import VNNI, kernel
from refmoe.fast.linear import Inputs, multiply, stored
from refmoe.files import InputError, read_object
from refmoe.model import matrix
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MoeWeights
from refmoe.model.matrix import (
    BF16,
    E4M3,
    Fp8Block,
    Int4,
    Matrix,
    bf16_bits,
    dequantize,
    quantize_q8,
)
from refmoe.run.export import q4_of, to_gguf
from refmoe.run.generate import prefill, step, working
from refmoe.run.model import Model, load
from refmoe.version import __version__ as refmoe_version
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.random import SINGLE
from refmoe.weights.stream import Spec, write_stream

READ = 1 << 29  # bytes: far beyond any cache
ROUNDS = 15
NAMES = ("bf16", "q8", "int4-fast", "int4-exact", "q4-fast", "q4", "fp8", "f16", "f32")
SHAPES = ((2048, 7168), (7168, 2048))  # K2's experts: gate and up, down
EIGHT = 8  # matrices at once, as many as a token has experts


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    form = "AVX-512 VNNI" if VNNI else "plain vectors"
    return f"{model}, {threads.pool().threads} threads, {form}, Numba {numba.__version__}"


@kernel
def _read(words):  # type: ignore
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


class Stream:
    """The rate at which this many threads read memory, in GB/s."""

    def __init__(self) -> None:
        words = np.ones(READ // 8, np.uint64)
        read: Any = _read
        self.nbytes, self.rates = words.nbytes, [0.0]
        self.pieces = [partial(read, part) for part in np.split(words, 64)]
        threads.pool().run(self.pieces[:1])  # compiled
        self.rates = [self.measure()]

    def measure(self) -> float:
        rate = self.nbytes / timed(partial(threads.pool().run, self.pieces)) / 1e9
        self.rates.append(rate)
        return rate

    def beside(self, run: Callable[[], float]) -> float:
        """`run`'s rate over that of reading before and after it."""
        before = self.rates[-1]
        rate = run()
        return 2 * rate / (before + self.measure())

    @property
    def rate(self) -> float:
        return float(np.median(self.rates))


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def draw(name: str, O: int, I: int, rng: np.random.Generator) -> Matrix:
    """A random matrix in this format."""
    if name.startswith("q4"):
        m = draw("int4", O, I, rng)
        assert isinstance(m, Int4)
        return q4_of(m)
    if name.startswith("int4"):
        packed = rng.integers(-(2**31), 2**31, (O, I // 8), np.int32)
        scale = rng.uniform(0.5, 1, (O, I // 32)).astype(np.float32).view(np.uint32) >> 16
        return Int4(packed, scale.astype(np.uint16))
    if name == "fp8":
        finite = np.flatnonzero(np.isfinite(E4M3)).astype(np.uint8)
        scale = rng.uniform(0.5, 1, (-(-O // 128), -(-I // 128))).astype(np.float32)
        return Fp8Block(finite[rng.integers(0, len(finite), (O, I), np.uint8)], scale, (128, 128))
    w = rng.standard_normal((O, I), np.float32)
    if name == "bf16":
        return BF16((w.view(np.uint32) >> 16).astype(np.uint16))
    if name == "q8":
        return quantize_q8(w)
    return w.astype(np.float16) if name == "f16" else w


def kernels(
    names: Sequence[str] = NAMES,
    counts: Sequence[int] = (),
    tokens: Sequence[int] = (1, 4),
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> dict[str, Any]:
    """A row for each format, shape, number of threads and of tokens."""
    counts = list(counts) or sorted({1, threads.available()})
    rng = np.random.default_rng(0)
    streams: dict[int, Stream] = {}
    for count in counts:
        threads.use(count)
        streams[count] = Stream()
    rows: list[dict[str, Any]] = []
    for name in names:
        for O, I in shapes:
            each = [draw(name, O, I, rng) for _ in range(EIGHT)]
            for T in tokens:
                x = rng.standard_normal((T, I)).astype(np.float32)
                error = _relative_error(name, each[0], x)
                for count in counts:
                    threads.use(count)
                    rates, ratios = _rates(name, each, x, streams[count])
                    shape = {"rows": O, "cols": I, "tokens": T}
                    row: dict[str, Any] = {"name": name, "format": _format(each[0])}
                    row |= {"threads": count, **shape}
                    middle, best = float(np.median(rates)), max(rates)
                    row |= {"gbs": middle, "gbs_best": best, "ratio": float(np.median(ratios))}
                    rows.append({**row, "rel_error": error})
    threads.use(threads.available())
    reading = {str(count): s.rate for count, s in streams.items()}
    return {"machine": machine(), "stream_gbs": reading, "kernels": rows}


def _format(m: Matrix) -> str:
    return m.dtype.name if isinstance(m, np.ndarray) else type(m).__name__


def _rates(
    name: str, each: Sequence[Matrix], x: np.ndarray, stream: Stream
) -> tuple[list[float], list[float]]:
    """GB/s of weights, and its ratios to reading."""
    known = [stored(m, fast=name.endswith("-fast")) for m in each]
    here = [m for m in known if m is not None]
    nbytes = sum(m.nbytes for m in each)
    rates: list[float] = []

    def run() -> float:
        inputs = Inputs(x)
        rates.append(nbytes / timed(lambda: multiply([(inputs, m) for m in here])) / 1e9)
        return rates[-1]

    run()
    stream.measure()
    rates.clear()
    return rates, [stream.beside(run) for _ in range(ROUNDS)]


def _relative_error(name: str, m: Matrix, x: np.ndarray) -> float:
    """RMS against float64 over 128 rows."""
    few = matrix.rows(m, slice(0, 128))
    known = stored(few, fast=name.endswith("-fast"))
    assert known is not None
    (y,) = multiply([(Inputs(x), known)])
    truth = x.astype(np.float64) @ dequantize(few, np.float64).T
    return float(np.sqrt(((y - truth) ** 2).mean() / (truth**2).mean()))


# --- a whole model


class Clock:
    """A watcher that gives the time since the last mark to the part that ended there."""

    PARTS = (
        ("self_attn", "attention"),
        ("mlp.gate_proj", "dense mlp"),
        ("mlp.gate", "router"),
        ("mlp.experts", "experts"),
        ("mlp.shared_experts", "shared experts"),
        ("mlp.", "dense mlp"),
        ("lm_head", "head"),
        ("", "other"),  # norms, residuals, the embedding
    )
    INSIDE = ("kv_b_proj", "#q_latent", "#scores", "#probs", "#context_latent", "#rows")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def wants(self, path: str) -> bool:
        """Not what would take a quicker form of the same away."""
        return ".experts." not in path and not path.endswith(self.INSIDE)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        now = time.perf_counter()
        part = next(part for mark, part in self.PARTS if mark in path)
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        return x


def bytes_per_token(decoder: Decoder, positions: int) -> int:
    """Weights that one token reads, as they are held, and its latents at so many positions."""
    cfg = decoder.cfg
    total = decoder.lm_head.nbytes + decoder.norm.nbytes
    total += decoder.embed_tokens.nbytes // decoder.embed_tokens.shape[0]
    for i, w in enumerate(decoder.layers):
        total += w.input_layernorm.nbytes + w.post_attention_layernorm.nbytes
        total += sum(m.nbytes for m in w.self_attn if m is not None)
        if isinstance(w.mlp, MoeWeights):
            total += sum(m.nbytes for m in w.mlp.gate)
            total += sum(m.nbytes for m in w.mlp.shared_experts or ())
            total += cfg.num_experts_per_tok * sum(m.nbytes for m in decoder.experts(i, 0))
        else:
            total += sum(m.nbytes for m in w.mlp)
    number = 2 if decoder.nx.cache == "bf16" else np.dtype(decoder.nx.dtype).itemsize
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return total + number * latent * positions * cfg.num_hidden_layers


def random_tokens(model: Model, count: int) -> list[int]:
    rng = np.random.default_rng(1)
    return rng.integers(0, min(model.cfg.vocab_size, 2000), count).tolist()


def decode(model: Model, decoder: Decoder, prompt: int = 16, steps: int = 24) -> dict[str, Any]:
    """One token at a time after a prompt, with the tokens of a seed: the best and middle step."""
    stream, memory = Stream(), decoder.caches()
    ids = random_tokens(model, prompt + 2 * steps)
    prefill(decoder, ids[:prompt], memory)
    for token in ids[prompt : prompt + steps]:  # pages and caches as they will be
        step(decoder, token, memory)
    nbytes = bytes_per_token(decoder, prompt + steps + steps // 2)
    rates: list[float] = []

    def one(token: int) -> float:
        rates.append(1 / timed(partial(step, decoder, token, memory)))
        return nbytes * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.beside(partial(one, token)) for token in ids[prompt + steps :]]
    clock = Clock()
    watched = decoder.using(replace(decoder.nx, watch=clock))
    clock.last = time.perf_counter()
    for token in ids[prompt : prompt + steps]:
        step(watched, token, memory)
    rate = float(np.median(rates))
    return {
        "tok_s": rate,
        "tok_s_best": max(rates),
        "bytes_per_token": nbytes,
        "gbs": nbytes * rate / 1e9,
        "stream_gbs": stream.rate,
        "ratio": float(np.median(ratios)),
        "threads": threads.pool().threads,
        "parts": {part: s / steps for part, s in clock.seconds.items()},
    }


def prompt(model: Model, decoder: Decoder, count: int = 128, runs: int = 5) -> dict[str, Any]:
    """A whole prompt at once; the head of its last token alone."""
    stream, ids = Stream(), random_tokens(model, count)
    prefill(decoder, ids, decoder.caches())
    nbytes = sum(t.nbytes for n, t in model.checkpoint.tensors.items() if "embed_tokens" not in n)
    rates: list[float] = []

    def once() -> float:
        rates.append(count / timed(lambda: prefill(decoder, ids, decoder.caches())))
        return nbytes / count * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.beside(once) for _ in range(runs)]
    clock = Clock()
    watched = decoder.using(replace(decoder.nx, watch=clock))
    clock.last = time.perf_counter()
    prefill(watched, ids, watched.caches())
    rate = float(np.median(rates))
    return {
        "tok_s": rate,
        "tok_s_best": max(rates),
        "bytes_per_token": nbytes // count,
        "gbs": nbytes / count * rate / 1e9,
        "stream_gbs": stream.rate,
        "ratio": float(np.median(ratios)),
        "threads": threads.pool().threads,
        "parts": {part: s / count for part, s in clock.seconds.items()},
    }


def peers(
    folder: Path | None, scratch: Path | None = None, steps: int = 8, length: int = 128
) -> dict[str, Any]:
    """refmoe, transformers (bf16, eager, cached) and llama.cpp (Q4_0 experts, the rest Q8_0) on one
    checkpoint, in one run: those of them that are installed."""
    rows: list[Row] = []
    for dense in ("exact", "q8"):
        model = load(folder, dense=dense)
        decoder = working(model)
        one, many = decode(model, decoder, 16, steps), prompt(model, decoder, length)
        rows.append((f"refmoe, {dense}", refmoe_version, one["tok_s"], many["tok_s"]))
    ids = random_tokens(model, length)
    for engine, run in (("transformers", _transformers), ("llama_cpp", _llamacpp)):
        if importlib.util.find_spec(engine) is not None:
            rows.append(run(model, scratch, ids, steps))
    if len(rows) == 2:
        raise InputError("no peer is installed: pip install 'refmoe[peers]', or llama-cpp-python")
    (_, _, base_decode, base_prefill), *_ = rows
    return {
        "machine": machine(),
        "rows": [
            {
                "engine": engine,
                "version": which,
                "decode_tok_s": one_,
                "prefill_tok_s": many_,
                "ratio_decode": base_decode / one_,
                "ratio_prefill": base_prefill / many_,
            }
            for engine, which, one_, many_ in rows
        ],
    }


Row = tuple[str, str, float, float]  # engine, version, tok/s decoding and of a prompt


def _llamacpp(model: Model, scratch: Path | None, ids: list[int], steps: int) -> Row:
    """Exported, and with the cache and batch it comes with."""
    llama: Any = importlib.import_module("llama_cpp")
    with tempfile.TemporaryDirectory(dir=scratch) as tmp:
        file = Path(tmp) / "model.gguf"
        to_gguf(model, file)
        engine = llama.Llama(str(file), n_ctx=1024, n_threads=threads.available(), verbose=False)
        engine.eval(ids)
        engine.reset()
        first = []
        for _ in range(2):
            first.append(timed(partial(engine.eval, ids)))
            engine.reset()
        engine.eval(ids[:16])
        each = [timed(partial(engine.eval, [token])) for token in ids[16 : 16 + 2 * steps]]
        engine.close()
    return "llama.cpp", str(llama.__version__), 1 / min(each[steps:]), len(ids) / min(first)


def _transformers(model: Model, scratch: Path | None, ids: list[int], steps: int) -> Row:
    """On the same values, routed experts dequantised to bf16: four times the bytes."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory(dir=scratch) as tmp:
        _write_bf16(model.checkpoint.path, Path(tmp))
        transformers.utils.logging.disable_progress_bar()
        peer, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
        )
        problems = {k: v for k, v in info.items() if v}
        if problems:
            raise InputError(f"transformers did not read the checkpoint whole: {problems}")
        torch.set_num_threads(threads.available())
        with torch.inference_mode():
            prompt = torch.tensor([ids])
            peer(prompt, logits_to_keep=1)
            first = [timed(lambda: peer(prompt, logits_to_keep=1)) for _ in range(2)]
            past = peer(prompt[:, :16], use_cache=True).past_key_values
            each = []
            for token in ids[16 : 16 + 2 * steps]:
                one = torch.tensor([[token]])
                each.append(timed(partial(peer, one, past_key_values=past, use_cache=True)))
    return (
        "transformers",
        str(transformers.__version__),
        1 / min(each[steps:]),
        len(ids) / min(first),
    )


def _write_bf16(folder: Path, out: Path) -> None:
    """The checkpoint without quantisation, every matrix rounded to bf16, as `deepseek_v3`."""
    checkpoint = Checkpoint.open(folder)
    raw = read_object(folder / "config.json")
    raw = {k: v for k, v in raw.items() if k != "quantization_config"}
    raw |= {"model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(raw), "utf-8")
    plain = [
        (name, shape) for name, shape, _ in expected(replace(checkpoint.cfg, quantization=None))
    ]

    def rows() -> Iterator[np.ndarray]:
        for name, _ in plain:
            if name.endswith("_bias"):
                yield checkpoint.array(name).astype(np.float32)
                continue
            m = checkpoint.matrix(name.removesuffix(".weight"))
            for _, tile in matrix.tiles(m, 1 << 22) if len(m.shape) == 2 else [(0, m)]:
                yield bf16_bits(dequantize(tile))

    specs = [Spec(n, "F32" if n.endswith("_bias") else "BF16", shape) for n, shape in plain]
    write_stream(out / SINGLE, specs, rows())


def table(what: str, document: dict[str, Any]) -> list[str]:
    """For people."""
    if what == "peers":
        out = [f"{'engine':<14}{'version':<12}{'decode':>9}{'prefill':>9}{'ratios':>14}"]
        for r in document["rows"]:
            ratios = f"{r['ratio_decode']:.2f}, {r['ratio_prefill']:.2f}"
            speeds = f"{r['decode_tok_s']:>9.2f}{r['prefill_tok_s']:>9.1f}"
            out.append(f"{r['engine']:<14}{r['version']:<12}{speeds}{ratios:>14}")
        return out
    out = [document["machine"]]
    if what == "kernels":
        for threads_, rate in document["stream_gbs"].items():
            out.append(f"{threads_} threads read {rate:.1f} GB/s")
        out.append(f"{'kernel':<12}{'rows':>6}{'cols':>6}{'tokens':>8}{'threads':>8}")
        out[-1] += f"{'GB/s':>8}{'ratio':>7}  rel error"
        for r in document["kernels"]:
            shape = f"{r['rows']:>6}{r['cols']:>6}{r['tokens']:>8}{r['threads']:>8}"
            rest = f"{r['gbs']:>8.1f}{r['ratio']:>7.2f}  {r['rel_error']:.1e}"
            out.append(f"{r['name']:<12}{shape}{rest}")
        return out
    d = document
    size, unit = (
        (d["bytes_per_token"] / 1e9, "GB")
        if d["bytes_per_token"] > 1e8
        else (d["bytes_per_token"] / 1e6, "MB")
    )
    out += [
        f"{d['tok_s']:.2f} tok/s, at best {d['tok_s_best']:.2f} "
        f"(dense {d['dense']}, INT4 {d['int4']}, cache {d['cache']}, {d['threads']} threads)",
        f"{size:.3f} {unit} a token: {d['gbs']:.1f} GB/s, {d['ratio']:.2f} of what reading alone "
        f"gives at the same time (in the middle {d['stream_gbs']:.1f} GB/s)",
    ]
    for part, seconds in sorted(d["parts"].items(), key=lambda p: -p[1]):
        out.append(f"{part:<16}{1e3 * seconds:>9.3f} ms a token")
    return out
