"""`refmoe inspect`: tensors, formats, bytes and parameters of a checkpoint."""

import json
from argparse import Namespace
from typing import Any

from refmoe.cli.options import add_json, add_model
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.run.load import golden_folder
from refmoe.weights.checkpoint import Checkpoint, summary, tensor_class
from refmoe.weights.dense import sizes as dense_sizes
from refmoe.weights.gguf import Gguf
from refmoe.weights.open import open_checkpoint

SHOWN = 20  # names of missing, unread and stray tensors; --json lists all


def add(parser: Parser) -> None:
    """Add the options of `refmoe inspect` to its parser."""
    describe(
        parser,
        "Show what a checkpoint holds: configuration, parameters, bytes and formats by class of "
        "tensor, missing and unread tensors. Exit code 1 if tensors are missing.",
        ["refmoe inspect", "refmoe inspect --model Kimi-K2-Thinking --json"],
    )
    add_model(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe inspect` and return its exit code."""
    checkpoint = open_checkpoint(args.model or golden_folder() / "tiny-k2")
    if args.json:
        print_json(_document(checkpoint))
    else:
        _show(checkpoint)
    return 1 if checkpoint.missing else 0


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    config = (
        {k: v for k, v in checkpoint.metadata.items() if not isinstance(v, list)}
        if isinstance(checkpoint, Gguf)
        else json.loads((checkpoint.path / "config.json").read_text("utf-8"))
    )
    tensors = {
        t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.file.name}
        for t in checkpoint.tensors.values()
    }
    exact, q8 = dense_sizes(checkpoint)
    return {
        "config": config,
        "tensors": tensors,
        **summary(checkpoint),
        "dense": {"exact": exact, "q8": q8},
        "missing": checkpoint.missing,
        "unread": checkpoint.unread,
    }


def _show(checkpoint: Checkpoint) -> None:
    cfg, facts = checkpoint.cfg, summary(checkpoint)
    print(f"{checkpoint.path}")
    print(
        f"{cfg.model_type}: {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, "
        f"{cfg.num_attention_heads} heads, {cfg.n_routed_experts} experts, "
        f"{cfg.num_experts_per_tok} a token, context {cfg.max_position_embeddings}"
    )
    counts = facts["parameters"]
    print(f"parameters: {counts['total']:,} in total, {counts['active']:,} active in a token")
    formats: dict[str, dict[str, int]] = {}
    for name, t in checkpoint.tensors.items():
        kind = formats.setdefault(tensor_class(name, cfg), {})
        kind[t.dtype] = kind.get(t.dtype, 0) + 1
    print(f"\n{'class':<16}{'bytes':>18}  tensors by dtype")
    for kind_, size in sorted(facts["bytes"].items(), key=lambda row: -row[1]):
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in sorted(formats[kind_].items()))
        print(f"{kind_:<16}{size:>18,}  {dtypes}")
    print(f"{'total':<16}{sum(facts['bytes'].values()):>18,}")
    exact, q8 = dense_sizes(checkpoint)
    print(f"attention, shared experts, dense mlp, head: {exact:,}, with --dense q8 {q8:,}")
    lists = {name: getattr(checkpoint, name) for name in ("missing", "unread", "stray")}
    for what, names in lists.items():
        print(f"{what}: {len(names) or 'none'}")
        for name in names[:SHOWN]:
            print(f"  {name}")
        if len(names) > SHOWN:
            print(f"  … and {len(names) - SHOWN} more (--json lists all)")
