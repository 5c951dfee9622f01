"""Sweep: compute many prompts layer by layer; each weight is asked for once.

    x  = embed(tokens)                                       rows of all prompts      [T, D]
    for each layer
        h, choice = attend(x), route(norm(h))                prompt by prompt         [T, D], [T, K]
        y  = Σ_e g · E_e(norm(h))                            expert by expert         [T, D]
        x' = mix(h, y)                                       rows in any order        [T, D]
    logits = norm(x) lm_headᵀ                                tile by tile of the head [T, Z]

The order is that of `run/layerwise.py`, and the formulas are those of model/. Rows go through in
chunks of `chunk`, a long prompt in several, over the latent cache of this layer, which then is
dropped. The routed sum is added up in index order of the experts, as the definition of
`nx.experts` has it: what the chunks are, and whether a sweep was interrupted, changes no bit but
those that BLAS makes depend on how many rows it multiplies.

Hidden states lie in files, mapped where they are worked on. Beside the weights, which are the
decoder's affair, and the tokens, memory is bounded whatever T is. With b bytes a number, c rows a
chunk, S positions of the longest prompt, W the widest of a layer's activations:

    b·(8·c·W  +  S·(C+R) + S·H·(N+V)  +  4·2²⁴  +  2²²)  +  64 MiB
       a chunk   a prompt's latents and keys   scores   tile of the head

`OUT.part/` beside the result holds what a second run goes on from. A layer's hidden states are
written beside those they are made of, and count once all is on the disk and `state.json` has been
replaced; a sweep killed at any moment does the layer again that it was in.

    OUT.part/lock            held by the process at work
    OUT.part/state.json      what is computed, of what; layers done
    OUT.part/x0, x1          hidden states after even and odd layers; h, chosen, weight: of this one
    OUT.part/points/         what the result is made of
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.run.generate import CHUNK
from refmoe.run.load import Model
from refmoe.run.sweep.files import explain_errors, lock_folder, remove_folder
from refmoe.run.sweep.head import sweep_head
from refmoe.run.sweep.layers import embed_rows, sweep_layer
from refmoe.run.sweep.plan import plan_sweep
from refmoe.run.sweep.result import write_result
from refmoe.run.sweep.run import begin_run


class Swept(NamedTuple):
    """The outcome of a sweep: its result, and the bytes and seconds it took."""

    out: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors spells it, shape
    rows: int
    begun_at: int  # layers that an earlier run had done
    bytes_read: int  # of weights that this run asked for
    seconds: float


def sweep(
    model: Model,
    prompts: Sequence[Sequence[int]],
    out: str | Path,
    *,
    logits: str = "top:64",
    positions: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
    points: Sequence[str] = (),
    chunk: int = CHUNK,
    restart: bool = False,
    how: Mapping[str, Any] | None = None,
) -> Swept:
    """Write the logits and points of a forward pass over each prompt, as `refmoe trace` names them.

    logits     all: `lm_head` [T, Z]; top:K: `lm_head#ids` and `#logprobs` [T, K], likeliest first,
               `#logsumexp` [T, 1], logit = log-probability + this; none
    positions  whose logits are written: all; last; one list for every prompt, where negative
               numbers count from the end; or a list for each. Other than all, the result also has
               `lm_head#positions`
    points     names or patterns of points to write as well. The last layer's output, and of every
               layer `gate#experts`, `gate#weights` and `gate#margin`, are always written; `lm_head`
               is asked for by `logits`
    chunk      rows at a time. A point that is not of single rows (`#scores`, `#probs`, `kv_b_proj`)
               needs prompts no longer than it
    restart    forget what an earlier run left
    how        what else two runs must have in common for the second to go on from the first

    Names begin with `0/`, `1/` … where prompts are several. Raises `InputError` for a second run
    that is not of the same computation, for a disk that is or becomes too full, for a checkpoint
    that changes, and where another process sweeps to the same file.
    """
    out = Path(out)
    plan = plan_sweep(model, prompts, out, logits, positions, points, chunk, how or {})
    folder = out.with_name(out.name + ".part")
    with lock_folder(folder, restart), explain_errors(plan, folder), np.errstate(over="ignore"):
        began = time.perf_counter()
        # points name what is not finite
        with np.errstate(invalid="ignore"), single_blas_thread():
            run = begin_run(plan, folder)
            before, read = run.state["done"], run.state["bytes_read"]
            with run.bar:
                embed_rows(run)
                while run.state["done"] < plan.cfg.num_hidden_layers:
                    sweep_layer(run, run.state["done"])
                if run.state["done"] == plan.cfg.num_hidden_layers:
                    sweep_head(run)
        tensors = write_result(run, out)
        remove_folder(folder)
    seconds = time.perf_counter() - began
    return Swept(out, tensors, plan.T, max(0, before), run.state["bytes_read"] - read, seconds)
