"""Dump every tensor of a running vLLM that hooks can see, for `refmoe check --engine vllm`.

    python examples/dump_vllm.py DIR OUT.safetensors --tokens FILE.json [--dtype bfloat16]

This needs vLLM, its CPU build or a GPU. The prompt must go through in one piece: eager mode, no
chunks and no cache hits, as `main` sets it up. Tensors have the names of vLLM's own modules;
`refmoe check` splits what vLLM fuses (q_a with kv_a, gate with up, a norm with its residual). To
dump from a process of your own, call the function `watch` there.
"""

import argparse
import json
import os

import safetensors.torch
import torch

SEEN: dict[str, torch.Tensor] = {}


def keep(name: str, t: object) -> None:
    if isinstance(t, torch.Tensor):
        SEEN[name] = t.detach().clone().contiguous()  # norms and rotation go on in place


def watch(model: torch.nn.Module) -> None:
    """Put forward hooks on every module, and wrap the routers, which are no modules."""

    def hook(name: str):  # type: ignore[no-untyped-def]
        def after(_module, args, output) -> None:  # type: ignore[no-untyped-def]
            first, *more = output if isinstance(output, tuple) else (output,)
            keep(name, first)
            if name.endswith("norm") and more:  # (norm(x + residual), x + residual)
                keep(name + "#residual", more[0])
            if name.endswith("mla_attn.mla_attn"):  # rotated query, latent, rotated key
                for end, t in zip(("#q", "#kv_c", "#k_pe"), args, strict=False):
                    keep(name + end, t)
            elif name == "model.norm":
                keep("lm_head", model.compute_logits(first))

        return after

    def routing(name: str, select):  # type: ignore[no-untyped-def]
        def select_experts(*args, **kwargs):  # type: ignore[no-untyped-def]
            weights, experts = select(*args, **kwargs)[:2]
            keep(name + "#weights", weights)
            keep(name + "#experts", experts)
            return weights, experts

        return select_experts

    for name, module in model.named_modules():
        if ".layers." in name or name in ("model.embed_tokens", "model.norm"):
            module.register_forward_hook(hook(name))
        if hasattr(module, "router"):
            gate = name.removesuffix(".experts") + ".gate"
            module.router.select_experts = routing(gate, module.router.select_experts)


def main() -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    parser = argparse.ArgumentParser(description="Dump a running vLLM's tensors.")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", required=True, help="JSON: a list of ids")
    args = parser.parse_args()
    with open(args.tokens) as file:
        tokens = json.load(file)
    settings = {"enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 4096}
    llm = vllm.LLM(args.model, dtype=args.dtype, **settings)
    llm.apply_model(watch)
    once = vllm.SamplingParams(max_tokens=1, detokenize=False)
    llm.generate({"prompt_token_ids": tokens}, once)
    metadata = {"tokens": json.dumps(tokens), "engine": f"vllm {vllm.__version__}"}
    safetensors.torch.save_file(SEEN, args.out, metadata)


if __name__ == "__main__":
    main()
