"""Open the model that a command line asks for, and say what is worth knowing of it."""

import argparse
from typing import TYPE_CHECKING, Any

from refmoe.cli.options import check_memory
from refmoe.cli.show import remark
from refmoe.files import InputError
from refmoe.run.load import Model, load

if TYPE_CHECKING:
    from refmoe.fast.gpu.placement import Request


def open_model(args: argparse.Namespace, passing: bool = False) -> Model:
    """Open the model with the options of precision and memory that the verb has.

    passing: layers go through the card one after another, as in a sweep.
    """
    check_memory(args)
    if getattr(args, "threads", None) is not None:
        set_threads(args.threads)
    model = load(
        args.model,
        args.numerics,
        args.reference,
        args.conventions,
        dense=getattr(args, "dense", "exact"),
        ram=args.ram,
        reads=args.reads,
        gpu=gpu_request(args, passing),
    )
    if model.card is not None:
        remark(model.card.said)
    for line in model.checkpoint.warnings:
        remark(f"warning: {line}")
    if not args.reference:
        announce_compilation()
    return model


def set_threads(count: int) -> None:
    """Let so many threads compute from now on."""
    from refmoe.fast.threads import use

    use(count)


def gpu_request(args: argparse.Namespace, passing: bool = False) -> "Request | None":
    """Return what --gpu asks for; None without it."""
    if not getattr(args, "gpu", False):
        return None
    from refmoe.fast.gpu.placement import CONTEXT, Request
    from refmoe.run.plan.units import parse_count

    experts = getattr(args, "gpu_experts", None) or 0
    if experts < 0:
        raise InputError(f"--gpu-experts {experts}, expected a number from 0")
    context = parse_count(args.ctx, "--ctx") if getattr(args, "ctx", None) else CONTEXT
    return Request(args.vram, experts, context, getattr(args, "cache", "float32"), passing)


def gpu_facts(model: Model) -> dict[str, Any]:
    """Return what is on a card, as `{"gpu": …}`; nothing without one."""
    if model.card is None:
        return {}
    from refmoe.fast.gpu.placement import facts

    return {"gpu": facts(model.card)}


def announce_compilation() -> None:
    """Say it when kernels are compiled for the first time, which takes seconds."""
    from refmoe.fast.compiling import announce

    announce(remark)
