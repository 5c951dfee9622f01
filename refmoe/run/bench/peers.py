"""Measure refmoe beside transformers and llama.cpp on the same weights."""

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.files import InputError, read_object
from refmoe.model import matrix
from refmoe.model.matrix import bf16_bits, dequantize
from refmoe.run.bench.base import describe_machine, time_call
from refmoe.run.bench.decode import measure_decode
from refmoe.run.bench.model import random_tokens
from refmoe.run.bench.prefill import measure_prefill
from refmoe.run.export import to_gguf
from refmoe.run.generate import generation_decoder
from refmoe.run.load import Model, load
from refmoe.version import __version__ as refmoe_version
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.synthetic.random import SINGLE
from refmoe.weights.writer import Spec, write_stream

Row = tuple[str, str, float, float]  # engine, version, tok/s decoding and of a prompt


def measure_peers(
    folder: Path | None, scratch: Path | None = None, steps: int = 8, length: int = 128
) -> dict[str, Any]:
    """Measure refmoe, transformers and llama.cpp on one checkpoint, in one run.

    transformers computes in bf16, eager, cached; llama.cpp has experts in Q4_0 and the rest in
    Q8_0. Those that are not installed are left out.

    scratch  a folder for the files that the others need; None: the system's
    steps    tokens that are decoded; length: of the prompt
    Raises `InputError` if none of the others is installed.
    """
    rows: list[Row] = []
    for dense in ("exact", "q8"):
        model = load(folder, dense=dense)
        decoder = generation_decoder(model)
        one = measure_decode(model, decoder, 16, steps)
        many = measure_prefill(model, decoder, length)
        rows.append((f"refmoe, {dense}", refmoe_version, one["tok_s"], many["tok_s"]))
    ids = random_tokens(model, length)
    for engine, run in (("transformers", _measure_transformers), ("llama_cpp", _measure_llamacpp)):
        if importlib.util.find_spec(engine) is not None:
            rows.append(run(model, scratch, ids, steps))
    if len(rows) == 2:
        raise InputError("no peer is installed: pip install 'refmoe[peers]', or llama-cpp-python")
    (_, _, base_decode, base_prefill), *_ = rows
    return {
        "machine": describe_machine(),
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


def format_peers(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_peers` to people."""
    out = [f"{'engine':<14}{'version':<12}{'decode':>9}{'prefill':>9}{'ratios':>14}"]
    for r in document["rows"]:
        ratios = f"{r['ratio_decode']:.2f}, {r['ratio_prefill']:.2f}"
        speeds = f"{r['decode_tok_s']:>9.2f}{r['prefill_tok_s']:>9.1f}"
        out.append(f"{r['engine']:<14}{r['version']:<12}{speeds}{ratios:>14}")
    return out


def _measure_llamacpp(model: Model, scratch: Path | None, ids: list[int], steps: int) -> Row:
    """Measure llama.cpp on the exported checkpoint, with the cache and batch it comes with."""
    llama: Any = importlib.import_module("llama_cpp")
    with tempfile.TemporaryDirectory(dir=scratch) as tmp:
        file = Path(tmp) / "model.gguf"
        to_gguf(model, file)
        engine = llama.Llama(str(file), n_ctx=1024, n_threads=threads.available(), verbose=False)
        engine.eval(ids)
        engine.reset()
        first = []
        for _ in range(2):
            first.append(time_call(partial(engine.eval, ids)))
            engine.reset()
        engine.eval(ids[:16])
        each = [time_call(partial(engine.eval, [token])) for token in ids[16 : 16 + 2 * steps]]
        engine.close()
    return "llama.cpp", str(llama.__version__), 1 / min(each[steps:]), len(ids) / min(first)


def _measure_transformers(model: Model, scratch: Path | None, ids: list[int], steps: int) -> Row:
    """Measure transformers on the same values, routed experts in bf16: four times the bytes."""
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
            first = [time_call(lambda: peer(prompt, logits_to_keep=1)) for _ in range(2)]
            past = peer(prompt[:, :16], use_cache=True).past_key_values
            each = []
            for token in ids[16 : 16 + 2 * steps]:
                one = torch.tensor([[token]])
                each.append(time_call(partial(peer, one, past_key_values=past, use_cache=True)))
    return (
        "transformers",
        str(transformers.__version__),
        1 / min(each[steps:]),
        len(ids) / min(first),
    )


def _write_bf16(folder: Path, out: Path) -> None:
    """Write the checkpoint as `deepseek_v3`, without quantisation, every matrix in bf16."""
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
