"""Dump every tensor of a transformers model that forward hooks can see, for `refmoe check`.

    python examples/dump_transformers.py DIR OUT.safetensors --tokens FILE.json [--check]

This needs torch and transformers. DIR is a folder that transformers opens by itself, such as a
Moonlight; for INT4 and FP8 checkpoints see `golden/make.py`, which writes an exact copy without
quantisation. The hooks are in the function `watch`, which you can paste beside a model of your own.
With --check the dump is judged at once.
"""

import argparse
import json

import safetensors.torch
import torch


def watch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put forward hooks on every module. The dict that is returned fills when the model runs."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, t: torch.Tensor) -> None:
        seen[name] = t.detach().clone().contiguous()

    def hook(name: str):  # type: ignore[no-untyped-def]
        def after(_module, args, output) -> None:  # type: ignore[no-untyped-def]
            if name.endswith(".mlp.gate"):
                for end, t in zip(("", "#weights", "#experts"), output, strict=True):
                    keep(name + end, t)
            else:
                keep(name, output[0] if isinstance(output, tuple) else output)
            for end, point in INPUTS.items():
                if name.endswith(end):
                    keep(name.removesuffix(end) + point, args[0])

        return after

    for name, module in model.named_modules():
        inside = ".layers." in name and not name.endswith("act_fn")
        if inside or name in ("model.embed_tokens", "model.norm", "lm_head"):
            module.register_forward_hook(hook(name))
    return seen


INPUTS = {  # points that are the input of a module
    ".down_proj": ".act",
    ".o_proj": "#context",
    ".post_attention_layernorm": "#attn_residual",
}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description="Dump a transformers model's tensors.")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", help="JSON: a list of ids", required=True)
    parser.add_argument("--check", action="store_true", help="judge it as well")
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    )
    with open(args.tokens) as file:
        tokens = json.load(file)
    seen = watch(model)
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    metadata = {"tokens": json.dumps(tokens), "engine": "transformers"}
    safetensors.torch.save_file(seen, args.out, metadata)
    if args.check:
        import refmoe

        dump = refmoe.read_dump(args.out)
        report = refmoe.check(refmoe.load(args.model), dump, engine="transformers")
        cause = f": {report.cause.text}" if report.cause else ""
        print(f"{report.verdict}, {report.point or report.reason}{cause}")


if __name__ == "__main__":
    main()
