"""Make a truth file."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import refmoe
from refmoe.config import Config
from refmoe.engines import PROFILES
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.model.decoder import check_tokens
from refmoe.oracle.statistics import RUNS
from refmoe.oracle.trace import write
from refmoe.oracle.truth.envelope import each_run, emulation, sample
from refmoe.oracle.truth.forward import Pass, Seen, forward
from refmoe.oracle.truth.layout import (
    COLUMNS,
    KEPT,
    KEY,
    LOGITS,
    TOTAL,
    VERSION,
    Values,
    layout,
    mixtures,
)
from refmoe.run.load import Model
from refmoe.weights.checkpoint import DTYPES


@single_blas_thread()
def make(
    model: Model,
    tokens: Sequence[int],
    out: str | Path,
    *,
    top: int = 64,
    profiles: Sequence[str] = KEPT,
    runs: int = RUNS,
    hash_shards: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the truth of these tokens, in the model's numerics and conventions.

    profiles     whose noise to sample: a forward pass of `runs` times the rows for each; all at
                 once, so that each weight is read once, with 4·8·D bytes for each of these rows
    hash_shards  also the sha256 of every shard; K2's are 594 GB
    progress     is told layers done, and of how many
    """
    cfg, out = model.cfg, Path(out)
    check_tokens(tokens, 0, cfg)
    unknown = [name for name in profiles if name not in PROFILES]
    if unknown:
        raise InputError(f"profile {unknown[0]!r}; known: {', '.join(PROFILES)}")
    if runs < 4 or top < 1 or cfg.n_routed_experts > 1 << 15:
        raise InputError(
            f"{runs} runs, top {top}, {cfg.n_routed_experts} experts; "
            "expected at least 4, at least 1, at most 32768"
        )
    done, todo, top = 0, cfg.num_hidden_layers * (1 + len(profiles)), min(top, cfg.vocab_size)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, todo)

    exact = Seen(model.decoder, top, tick)
    passes = [Pass(model.decoder.using(model.nx.watching(exact)), [tokens], exact)]
    decoder = model.decoder.using(reproducible_policy("float64", model.nx.conventions))
    for name in profiles:
        passes.append(emulation(decoder, PROFILES[name], tokens, exact, runs))
    forward(passes)
    truth = exact.values()
    whole = _columns(truth, cfg)
    for name, emulated_ in zip(profiles, passes[1:], strict=True):
        whole |= sample(PROFILES[name], each_run(emulated_.seen, runs), truth, cfg)
    wanted = layout(cfg, len(tokens), top, profiles)
    arrays = {n: whole[n].astype(DTYPES[d]).reshape(s) for n, (d, s) in wanted.items()}
    facts = _facts(model, hash_shards) | {
        "tokens": [int(t) for t in tokens],
        "top": top,
        "runs": runs,
        "profiles": [asdict(PROFILES[name]) for name in profiles],
    }
    write(out, arrays, {KEY: json.dumps(facts, sort_keys=True)})
    return out


def _columns(values: Values, cfg: Config) -> Values:
    """Return the tensors of the file from the values of points."""
    out = {"model.norm": values["model.norm"], "lm_head#ids": values["lm_head#ids"]}
    out |= {"lm_head#logprobs": values[LOGITS], "lm_head#logsumexp": values[TOTAL]}
    for name, end in COLUMNS.items():
        layers = mixtures(cfg) if "gate" in name else range(cfg.num_hidden_layers)
        parts = [values[f"model.layers.{i}{end}"] for i in layers]
        out[name] = np.stack(parts, axis=1) if parts else np.zeros(0)
    return out


def _facts(model: Model, hash_shards: bool) -> dict[str, Any]:
    """Return what a truth says of where it comes from."""
    config = (model.checkpoint.path / "config.json").read_text("utf-8")
    shards: list[dict[str, Any]] = []
    for file in sorted({t.file for t in model.checkpoint.tensors.values()}):
        shards.append({"name": file.name, "size": file.stat().st_size})
        if hash_shards:
            with file.open("rb") as raw:
                shards[-1]["sha256"] = hashlib.file_digest(raw, "sha256").hexdigest()
    return {
        "version": VERSION,
        "producer": "refmoe golden make",
        "refmoe": refmoe.__version__,
        "numpy": np.__version__,
        "numerics": model.nx.name,
        "conventions": asdict(model.nx.conventions),
        "config": config,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "shards": shards,
    }
