"""Measure a card: kernels beside a copy on the device, and tokens a second by placement.

A kernel multiplies one token with eight matrices of K2's experts, which lie together as one, in
four places one after another, so that no cache holds them; launches follow each other without
waiting. Its rate is of weights. A copy reads and writes, and both count. Copy and kernel take
turns, and the middle ratio of neighbours counts.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.fast.gpu import device as gpu_device
from refmoe.fast.gpu import placement as gpu_placement
from refmoe.fast.gpu.card import Card
from refmoe.fast.gpu.kernels import FORMS
from refmoe.fast.gpu.placement import Request
from refmoe.model import matrix
from refmoe.run.bench.base import relative_error
from refmoe.run.bench.kernels import EIGHT, SHAPES, draw
from refmoe.run.generate import generation_decoder, prefill, step
from refmoe.run.load import Model, load
from refmoe.weights.placement import count_parts, on_card

COPIED = 1 << 28  # bytes of a copy: far beyond the card's cache
PLACES = 4  # copies of a matrix, so that no cache holds what comes next
TIMES = 5  # that each place is used in one measurement
ROUNDS = 11  # measurements whose middle one counts
ROWS = 128  # of which the error is measured
PROMPT, WARM, STEPS = 16, 4, 16  # tokens: of the prompt, then not counted, then counted


def _time_on_card(card: Card, run: Callable[[], Any]) -> float:
    """Return the seconds until the card has done what a function asks of it."""
    card.device.wait()
    began = time.perf_counter()
    run()
    card.device.wait()
    return time.perf_counter() - began


def measure_kernels(card: Card, names: tuple[str, ...] = tuple(FORMS)) -> dict[str, Any]:
    """Measure GB/s of one token's products, over those of a copy just before and after."""
    xp, rng = card.device.xp, np.random.default_rng(0)
    a, b = (xp.empty(COPIED // 4, np.float32) for _ in range(2))

    def copy() -> None:
        b[...] = a

    def rate() -> float:
        return 2 * COPIED / _time_on_card(card, copy) / 1e9

    rate()
    copies, rows = [rate()], []
    for name in names:
        for O, I in SHAPES:
            eight = draw(name, EIGHT * O, I, rng)
            x = rng.standard_normal((1, I), np.float32)
            places = [card.matrix(eight) for _ in range(PLACES)]
            there = card.send(x)

            def all_places(places: list[Any] = places, there: Any = there) -> None:
                for _ in range(TIMES):
                    for m in places:
                        card.linear(there, m)

            _time_on_card(card, all_places)  # compiled
            rates, ratios = [], []
            for _ in range(ROUNDS):
                seconds = _time_on_card(card, all_places)
                rates.append(TIMES * PLACES * eight.nbytes / seconds / 1e9)
                copies.append(rate())
                ratios.append(2 * rates[-1] / (copies[-2] + copies[-1]))
            rows.append(
                {
                    "name": name,
                    "rows": O,
                    "cols": I,
                    "gbs": float(np.median(rates)),
                    "ratio": float(np.median(ratios)),
                    "rel_error": _error(card, there, places[0], x, eight),
                }
            )
            card.forget()
            del places
    return {"copy_gbs": float(np.median(copies)), "kernels": rows}


def _error(card: Card, there: Any, m: Any, x: np.ndarray, host: Any) -> float:
    """Return the relative error of the card's product over the first rows."""
    y = card.fetch(card.linear(there, m))[0][:, :ROWS]
    return relative_error(y, x, matrix.rows(host, slice(0, ROWS)))


def decode_rate(model: Model) -> float:
    """Return tokens a second, the middle of the steps after a prompt."""
    decoder = generation_decoder(model)
    memory = decoder.caches()
    rng = np.random.default_rng(1)
    count = PROMPT + WARM + STEPS
    ids = rng.integers(0, min(model.cfg.vocab_size, 2000), count).tolist()
    prefill(decoder, ids[:PROMPT], memory)
    seconds = []
    for token in ids[PROMPT:]:
        began = time.perf_counter()
        step(decoder, token, memory)  # its logits are here: nothing is under way
        seconds.append(time.perf_counter() - began)
    return 1 / float(np.median(seconds[WARM:]))


def measure_placements(folder: Path | None, dense: str, vram: int | None) -> list[dict[str, Any]]:
    """Measure decoding without the card; with what every token uses there; with experts as well.

    As many experts go there as fit in `vram` bytes.
    """
    model = load(folder, dense=dense)
    parts = count_parts(model.checkpoint, dense)
    rows = [{"placement": "CPU only", "tok_s": decode_rate(model), "vram_peak": None}]
    budget = gpu_placement.budget_of(vram, gpu_device.open_device())
    most = on_card(parts, budget, gpu_placement.CONTEXT, 4, parts.all_experts).experts
    del model
    for experts in (0, most):
        gc.collect()
        there = load(folder, dense=dense, gpu=Request(vram, experts))
        assert there.card is not None
        rate = decode_rate(there)
        name = "all on card" if experts == parts.all_experts else f"dense and {experts} experts"
        placement = name if experts else "dense on card"
        row = {"placement": placement, "tok_s": rate, "vram_peak": there.card.device.peak()}
        rows.append({**row, "holds": there.card.said})
        del there
    return rows


def measure_gpu(
    folder: Path | None, dense: str = "exact", vram: int | None = None
) -> dict[str, Any]:
    """Measure a card's kernels, and a checkpoint with nothing, much or all of it on the card.

    `vram` is the budget in bytes; None: what is free. Raises `InputError` without a card.
    """
    device = gpu_device.open_device()
    card = Card(device, gpu_placement.budget_of(vram, device))
    found = measure_kernels(card)
    del card
    gc.collect()
    return {"device": device.name, **found, "decode": measure_placements(folder, dense, vram)}


def format_gpu(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_gpu` to people."""
    out = [f"{document['device']}: a copy reads and writes {document['copy_gbs']:.1f} GB/s"]
    out.append(f"{'kernel':<8}{'rows':>6}{'cols':>6}{'GB/s':>9}{'ratio':>7}  rel error")
    for r in document["kernels"]:
        rate = f"{r['gbs']:>9.1f}{r['ratio']:>7.2f}  {r['rel_error']:.1e}"
        out.append(f"{r['name']:<8}{r['rows']:>6}{r['cols']:>6}{rate}")
    for r in document["decode"]:
        peak = f", at most {r['vram_peak'] / 1e9:.2f} GB" if r["vram_peak"] is not None else ""
        out.append(f"{r['placement']}: {r['tok_s']:.2f} tok/s{peak}")
    return out
