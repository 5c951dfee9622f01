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

import safetensors.torch
import torch
import transformers

import refmoe
from refmoe.oracle.readers import Dump, read_dump

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
    points: tuple[str, ...]  # where the fault begins


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
                yield Run(name, "transformers", checkpoint, precision, None, opened, dump, ())
        opened = twins.models[f"{checkpoint}-float32"]
        points = make.mlx_run(opened.checkpoint.path, tokens)
        arrays = {n: t.numpy() for n, t in points.items()}
        dump = Dump(opened.checkpoint.path, arrays, tokens, "float32")
        name = f"mlx-lm {make.mlx_lm.__version__}"
        yield Run(name, "mlx", checkpoint, "float32", None, opened, dump, ())
    for precision in PRECISIONS:
        yield vllm(twins, precision, "healthy", ())


def faulty(twins: Twins, quick: bool) -> Iterator[Run]:
    for precision in PRECISIONS:
        model = twins.transformers("tiny-k2", precision, "eager")
        seen, opened = dumper.watch(model), twins.models[f"tiny-k2-{precision}"]
        for fault in planted.FAULTS:
            with fault.plant(model):
                dump = transformers_run(model, seen, twins.tokens["tiny-k2"])
            name = f"transformers {transformers.__version__}"
            where = (opened, dump, fault.points)
            yield Run(name, "transformers", "tiny-k2", precision, fault.name, *where)
        for name, points in planted.VLLM.items():
            yield vllm(twins, precision, name, points)


def vllm(twins: Twins, precision: str, fault: str, points: tuple[str, ...]) -> Run:
    """Recorded, not live: vLLM wants an environment of its own."""
    file = HERE / "vllm" / f"{precision}-{fault}.safetensors"
    with contextlib.closing(file.open("rb")) as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    engine = header["__metadata__"]["engine"].split(",")[0] + ", recorded"
    opened = twins.models[f"tiny-k2-{precision}"]
    named = None if fault == "healthy" else fault
    return Run(engine, "vllm", "tiny-k2", precision, named, opened, read_dump(file), points)
