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
from refmoe.model.matrix import (
    bf16_bits,
    dequantize,
)
from refmoe.run.bench.base import machine, timed
from refmoe.run.bench.decode import decode, random_tokens
from refmoe.run.bench.prefill import prompt
from refmoe.run.export import to_gguf
from refmoe.run.generate import working
from refmoe.run.load import Model, load
from refmoe.version import __version__ as refmoe_version
from refmoe.weights.checkpoint import Checkpoint, expected
from refmoe.weights.synthetic.random import SINGLE
from refmoe.weights.writer import Spec, write_stream


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
