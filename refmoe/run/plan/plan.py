"""Plan: say what lives where, whether it fits, and how fast it will be, from sizes and rates alone.

Decoding one token, bytes as `weights/placement.py` places them,

    t = Σ bytes / (bandwidth · e)  +  exchanges · t_x  +  hand-overs · t_h               [seconds]

over the tiers, nothing overlapped. An exchange is a sum over machines that hold a layer together
(two a layer); a hand-over is a layer that a card begins and memory ends. Several machines read at
the same time if they split each layer (`tensor`), in turn if each has layers of its own
(`pipeline`). Bandwidths are those of data sheets; a measured one counts as 0.8 of such. The
bandwidth of a machine with two sockets counts with a factor s below 1.

A prompt of P tokens touches 1 − (1 − K/E)^P of the experts of a layer (a uniform router),

    t = Σ max(bytes touched / (bandwidth · e),  2 · P · numbers / (flops · c))

over the tiers, computed where the weights lie (what lies on disk: by the cores). A sweep reads
every byte once, from the disk if there is one, and then computes: the sum.

e, s, t_x and t_h are fitted to public reports, `reports.toml` (sources in the table), by least
squares of log(reported / predicted) on a grid; c likewise on those with a prompt's rate. The range
is the prediction times exp(±3σ), σ the residual's deviation, but at least ± 25 % and at most
hi/lo = 2; that of a prompt, which rests on few reports, always hi/lo = 2. `validate` judges each
report by constants that were fitted without any report of its source. What that cannot show: the
form of the law was chosen with the same reports in view, and half of them leave something unsaid
that had to be assumed (the table says what). No report of a K2 streamed from disk says its hit
rate, so a disk is taken to do as well as memory, e of its rate.

That experts are asked for evenly is an assumption: the real router has favourites, so a cache of
the most used ones does better; `--hit-rate` says how much.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from refmoe.run.plan.hardware import Hardware, Memory, check_range
from refmoe.run.plan.time import Constants, Placed
from refmoe.run.plan.units import MOST_TOKENS, format_bytes, format_range
from refmoe.run.plan.validate import fitted_constants
from refmoe.weights.placement import CARD_RESERVE, Parts, Share, smallest_budget


def plan(
    placed: Placed,
    eighths: Parts | None = None,
    prompt: int = 512,
    sweep: int = 10_000,
    constants: Constants | None = None,
) -> dict[str, Any]:
    """Return the document of `refmoe plan`; its rates are None where the model does not fit.

    eighths    the same model with 8-bit dense weights, if it has others
    prompt     tokens of the prompt whose rate is predicted
    sweep      tokens of the sweep whose time is predicted
    constants  of the time law; None: those fitted to all public reports
    """
    check_range("prompt", prompt, 1, MOST_TOKENS)
    check_range("sweep", sweep, 1, MOST_TOKENS)
    fits = placed.placement.fits
    c = constants or fitted_constants()
    times = placed.work().times(c)
    wide = c._replace(deviation=1.0)  # prompts: few reports
    tokens = placed.bytes_per_token()
    cache = placed.parts.cache_bytes(placed.context, placed.number) * placed.parts.layers
    binds = max(times, key=lambda name: times[name])  # the tier that takes most of the time
    advice, factor = best_change(placed, c, eighths)
    return {
        "fits": fits,
        "tiers": [
            {
                "name": s.tier.name,
                "kind": s.tier.kind,
                "holds": describe_holdings(s, placed.parts),
                "bytes": s.nbytes,
                "room": s.tier.room,
                "bytes_per_token": nbytes,
                "seconds_per_token": times[s.tier.name],
            }
            for s, nbytes in tokens
        ],
        "decode_tok_s": list(c.range(1 / sum(times.values()))) if fits else None,
        "prefill_tok_s": list(wide.range(prompt / placed.prompt(prompt, c))) if fits else None,
        "prefill_tokens": prompt,
        "binds": binds if fits else None,
        "advice": advice,
        "advice_factor": factor,
        "overhead_s": {k: v for k, v in times.items() if k in ("link", "hand-over")},
        "cache_bytes": cache,
        "context": placed.context,
        "sweep_tokens": sweep,
        "sweep_s": list(wide.range(placed.sweep(sweep, c))) if fits else None,
        "smallest_budget": smallest_budget(placed.parts) + cache,
        "missing_bytes": placed.placement.homeless + placed.placement.needed,
        "notes": list(placed.hardware.notes),
        "hardware": placed.hardware.name,
    }


def describe_holdings(s: Share, parts: Parts) -> list[str]:
    """Say in words what a tier holds."""
    out = []
    for kind in ("attention", "shared experts", "dense mlp", "router"):
        here, whole = len(s.layers(kind)), sum(p.kind == kind for p in parts.always)
        if here == whole == 1:
            out.append(f"{kind} of layer {s.layers(kind)[0]}")
        elif here:
            out.append(f"{kind} of {'all' if here == whole else f'{here} of'} {whole} layers")
    out += [p.kind for p in s.parts if p.layer is None]
    if s.caches:
        alone = len(s.caches) == parts.layers
        out.append(f"cache of {'all' if alone else f'{len(s.caches)} of'} {parts.layers} layers")
    if s.experts:
        share = s.experts / parts.all_experts
        out.append(f"{s.experts:,} of {parts.all_experts:,} routed experts ({share:.0%})")
    return out


def best_change(placed: Placed, c: Constants, eighths: Parts | None = None) -> tuple[str, float]:
    """Return the one change of a handful that makes decoding fastest, and how many times faster."""
    if not placed.placement.fits:
        lacking = format_bytes(placed.placement.homeless + placed.placement.needed)
        else_ = "" if placed.placement.on("disk") else ", or a disk to stream from"
        return f"{lacking} more memory{else_}: it does not fit", 1.0
    options, now = [], 1 / placed.work().total(c)
    for what, other in _changes(placed, eighths):
        if other.placement.fits:
            options.append((1 / other.work().total(c) / now, what))
    if not options or max(options)[0] <= 1.005:
        return "nothing that was tried helps", 1.0
    factor, what = max(options)
    lo, hi = c.range(now * factor)
    return (
        f"{what}: {lo:.3g} to {hi:.3g} tok/s, {factor:,.{1 if factor < 10 else 0}f} times as fast",
        factor,
    )


def _changes(placed: Placed, eighths: Parts | None) -> Iterator[tuple[str, Placed]]:
    """Yield changes that somebody might make, in words, and the model placed after each."""
    hw, parts = placed.hardware, placed.parts
    again = partial(
        Placed.of, context=placed.context, number=placed.number, hit_rate=placed.hit_rate
    )
    kinds = {t.kind: t for m in hw.machines for t in m.tiers}

    def with_tier(kind: str, change: Callable[[Memory], Memory]) -> Hardware:
        machines = []
        for m in hw.machines:
            tiers = tuple(change(t) if t.kind == kind else t for t in m.tiers)
            machines.append(replace(m, tiers=tiers))
        return replace(hw, machines=tuple(machines))

    for kind, t in kinds.items():
        twice = with_tier(kind, lambda t: t._replace(bandwidth=2 * t.bandwidth))
        text = f"{t.name} of twice the bandwidth ({2 * t.bandwidth / 1e9:.0f} GB/s)"
        yield text, again(parts, twice)
    below = sum(s.nbytes for s in placed.placement.shares if s.tier.kind in ("pmem", "disk"))
    if below and "ram" in kinds:
        more = below / hw.boxes + 1e9
        larger = with_tier("ram", lambda t: t._replace(capacity=t.capacity + more))
        text = f"+{more / 1e9:,.0f} GB of {kinds['ram'].name}, so that it holds every expert"
        yield text, replace(again(parts, larger), hit_rate=None)
    if eighths is not None and eighths.always_bytes < parts.always_bytes:
        yield "--dense q8", again(eighths, hw)
    if "vram" not in kinds:
        card = Memory("card", "vram", 24e9, 936e9, reserve=CARD_RESERVE)
        machines = tuple(replace(m, tiers=(card, *m.tiers)) for m in hw.machines)
        text = "a card of 24 GB and 936 GB/s for what every token uses"
        yield text, again(parts, replace(hw, machines=machines))
    if hw.boxes > 1 and hw.split == "pipeline":
        yield "every layer split between the machines", again(parts, replace(hw, split="tensor"))


def format_plan(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a plan's document to people."""
    d = document
    fits = "yes" if d["fits"] else f"no, {format_bytes(d['missing_bytes'])} are missing"
    if d["fits"] and any(t["kind"] == "disk" and t["holds"] != ["embedding"] for t in d["tiers"]):
        fits += ", streaming from disk"
    out = [f"{d['model']} on {d['hardware']}", f"fits: {fits}", ""]
    for t in d["tiers"]:
        room = f" of {format_bytes(t['room'])}" if t["kind"] != "disk" else ""
        read, ms = format_bytes(t["bytes_per_token"]), 1e3 * t["seconds_per_token"]
        held = f"{t['name']} ({t['kind']}): {format_bytes(t['bytes'])}{room}"
        out.append(f"{held}; {read} a token, {ms:.1f} ms")
        out += [f"    {what}" for what in t["holds"]]
    for name, seconds in d["overhead_s"].items():
        out.append(f"{name}: {1e3 * seconds:.1f} ms a token")
    out.append("")
    if d["fits"]:
        keys = ("decode_tok_s", "prefill_tok_s", "sweep_s")
        decode, prefill, sweep = (format_range(d[key]) for key in keys)
        out += [
            f"decode     {decode} tok/s, bound by {d['binds']}",
            f"prefill    {prefill} tok/s, a prompt of {d['prefill_tokens']:,}",
            f"sweep      {sweep} s for {d['sweep_tokens']:,} tokens",
        ]
    out += [
        f"cache      {format_bytes(d['cache_bytes'])} for {d['context']:,} tokens",
        f"smallest   {format_bytes(d['smallest_budget'])} of memory, the rest from disk",
        f"helps most {d['advice']}",
    ]
    return out + [f"note: {note}" for note in d["notes"]]
