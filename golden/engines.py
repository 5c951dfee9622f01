"""Other engines, live: healthy, and with faults planted in them. `refmoe bench oracle` judges them.

needs the `peers` extra. transformers runs here, on exact twins of tiny-k2 and of a random bf16
checkpoint (golden/make.py), hooked by examples/dump_transformers.py; mlx-lm runs here on the same
files. vLLM ran elsewhere: its dumps are golden/vllm, remade by golden/make_vllm.py.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
import safetensors.torch
import torch
import transformers

import refmoe
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.dump import read_dump

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
import dump_transformers as dumper  # noqa: E402
import make  # noqa: E402
import planted  # noqa: E402

transformers.utils.logging.disable_progress_bar()
PRECISIONS = ("float32", "bfloat16")


class Run(NamedTuple):
    """One run of one engine, and what the oracle ought to say of it."""

    engine: str  # with its version
    conventions: str
    checkpoint: str
    precision: str
    fault: str | None
    model: refmoe.Model  # the folder that the engine was given
    dump: Dump
    points: tuple[str, ...] = ()  # where the fault begins, as patterns
    ids: tuple[str, ...] = ()  # what it is called in the dictionary


class Twins:
    """What the engines open: folders without quantisation, every value exact."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models: dict[str, refmoe.Model] = {}
        random = folder / "random-bf16"
        make.write_random(random, "bf16", seed=11)
        for name, source in (("tiny-k2", HERE / "tiny-k2"), ("random-bf16", random)):
            for precision in PRECISIONS:
                out = folder / f"{name}-{precision}"
                out.mkdir()
                make.twin(source, out, getattr(torch, precision))
                self.models[out.name] = refmoe.load(out, "float64", reference=True)
        tokens = make.Tokenizer.load(HERE / "tiny-k2").encode(make.TEXT)[:32]
        self.tokens = {"tiny-k2": tokens, "random-bf16": [i * 7 % 500 for i in range(24)]}

    def transformers(self, checkpoint: str, precision: str, attention: str) -> Any:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder / f"{checkpoint}-{precision}",
            dtype=getattr(torch, precision),
            attn_implementation=attention,
            output_loading_info=True,
        )
        problems = {k: v for k, v in info.items() if v}
        if problems:
            raise SystemExit(f"{checkpoint}: transformers did not read it whole: {problems}")
        model.config._experts_implementation = "eager"
        return model.eval()


def transformers_run(model: Any, seen: dict[str, torch.Tensor], tokens: list[int]) -> Dump:
    """What the hooks saw of one forward pass, through the file that a user would write."""
    seen.clear()
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    with make.tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "dump.safetensors"
        safetensors.torch.save_file(dict(seen), file, {"tokens": json.dumps(tokens)})
        return read_dump(file)


def healthy(twins: Twins, quick: bool) -> Iterator[Run]:
    for checkpoint in ("tiny-k2", "random-bf16"):
        tokens = twins.tokens[checkpoint]
        for precision in PRECISIONS:
            opened = twins.models[f"{checkpoint}-{precision}"]
            for attention in ("eager",) if quick else ("eager", "sdpa"):
                model = twins.transformers(checkpoint, precision, attention)
                dump = transformers_run(model, dumper.watch(model), tokens)
                name = f"transformers {transformers.__version__} {attention}"
                yield Run(name, "transformers", checkpoint, precision, None, opened, dump)
        opened = twins.models[f"{checkpoint}-float32"]
        dump = mlx_run(mlx_model(opened.checkpoint.path), tokens)
        yield Run(MLX, "mlx", checkpoint, "float32", None, opened, dump)
    for precision in PRECISIONS:
        yield vllm(twins, precision, "healthy")


def faulty(twins: Twins) -> Iterator[Run]:
    for precision in PRECISIONS:
        model = twins.transformers("tiny-k2", precision, "eager")
        seen, opened = dumper.watch(model), twins.models[f"tiny-k2-{precision}"]
        for fault in planted.FAULTS:
            with fault.plant(model):
                dump = transformers_run(model, seen, twins.tokens["tiny-k2"])
            name = f"transformers {transformers.__version__}"
            where = (opened, dump, fault.points, fault.ids)
            yield Run(name, "transformers", "tiny-k2", precision, fault.name, *where)
        for name, (point, id) in planted.VLLM.items():
            yield vllm(twins, precision, name, (point,), (id,))
    opened = twins.models["tiny-k2-float32"]
    live = mlx_model(opened.checkpoint.path)
    for fault in planted.MLX:
        with planted.set_in(fault.plant(live)):
            dump = mlx_run(live, twins.tokens["tiny-k2"])
        where = (opened, dump, fault.points, fault.ids)
        yield Run(MLX, "mlx", "tiny-k2", "float32", fault.name, *where)


MLX = f"mlx-lm {make.mlx_lm.__version__}"


def mlx_model(folder: Path) -> Any:
    mx.set_default_device(mx.cpu)
    model, _ = make.mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model


def mlx_run(model: Any, tokens: list[int]) -> Dump:
    """What every module of a running mlx-lm returns, by its path; rotation is called twice."""
    names = {id(m): name for name, m in model.named_modules()}
    seen: dict[str, Any] = {}

    def keep(name: str, x: Any) -> None:
        seen[name] = np.array(x.astype(mx.float32) if x.dtype != mx.uint32 else x)

    def watched(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            out, name = original(self, *args, **kwargs), names.get(id(self), "")
            at, _, last = name.rpartition(".")
            match last:
                case "gate":
                    for end, x in zip(("#experts", "#weights"), out, strict=True):
                        keep(name + end, x[0])
                case "rope":
                    keep(f"{at}#k_pe" if f"{at}#q_pe" in seen else f"{at}#q_pe", out)
                case "switch_mlp":
                    keep(f"{at}.experts.down_proj", out[0])
                case _ if name and "switch_mlp" not in name and isinstance(out, mx.array):
                    keep(name, out)
            inputs = {"o_proj": "#context", "down_proj": ".act"}
            inputs["post_attention_layernorm"] = "#attn_residual"
            if last in inputs and "switch_mlp" not in name:
                keep(at + inputs[last], args[0])
            return out

        return call

    kinds = {type(m) for m in model.modules()} - {type(model)}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if "__call__" in vars(kind):
                patch = mock.patch.object(kind, "__call__", watched(kind.__call__))
                stack.enter_context(patch)
        logits = model(mx.array([tokens]))
        keep("lm_head", logits)
    ends = ("embed_q", "unembed_out", ".mlp.gate", "model.embed_tokens.")
    arrays = {n: x for n, x in seen.items() if not n.endswith(ends) and n != "model"}
    return Dump(HERE, arrays, tokens, "float32")


def vllm(
    twins: Twins,
    precision: str,
    fault: str,
    points: tuple[str, ...] = (),
    ids: tuple[str, ...] = (),
) -> Run:
    """Recorded, not live: vLLM wants an environment of its own."""
    file = HERE / "vllm" / f"{precision}-{fault}.safetensors"
    with contextlib.closing(file.open("rb")) as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    engine = header["__metadata__"]["engine"].split(",")[0] + ", recorded"
    opened = twins.models[f"tiny-k2-{precision}"]
    named = None if fault == "healthy" else fault
    dump = read_dump(file)
    return Run(engine, "vllm", "tiny-k2", precision, named, opened, dump, points, ids)
