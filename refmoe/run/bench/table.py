"""Print what was measured."""

from typing import Any


def table(what: str, document: dict[str, Any]) -> list[str]:
    """For people."""
    if what == "peers":
        out = [f"{'engine':<14}{'version':<12}{'decode':>9}{'prefill':>9}{'ratios':>14}"]
        for r in document["rows"]:
            ratios = f"{r['ratio_decode']:.2f}, {r['ratio_prefill']:.2f}"
            speeds = f"{r['decode_tok_s']:>9.2f}{r['prefill_tok_s']:>9.1f}"
            out.append(f"{r['engine']:<14}{r['version']:<12}{speeds}{ratios:>14}")
        return out
    out = [document["machine"]]
    if what == "kernels":
        for threads_, rate in document["stream_gbs"].items():
            out.append(f"{threads_} threads read {rate:.1f} GB/s")
        out.append(f"{'kernel':<12}{'rows':>6}{'cols':>6}{'tokens':>8}{'threads':>8}")
        out[-1] += f"{'GB/s':>8}{'ratio':>7}  rel error"
        for r in document["kernels"]:
            shape = f"{r['rows']:>6}{r['cols']:>6}{r['tokens']:>8}{r['threads']:>8}"
            rest = f"{r['gbs']:>8.1f}{r['ratio']:>7.2f}  {r['rel_error']:.1e}"
            out.append(f"{r['name']:<12}{shape}{rest}")
        return out
    d = document
    size, unit = (
        (d["bytes_per_token"] / 1e9, "GB")
        if d["bytes_per_token"] > 1e8
        else (d["bytes_per_token"] / 1e6, "MB")
    )
    out += [
        f"{d['tok_s']:.2f} tok/s, at best {d['tok_s_best']:.2f} "
        f"(dense {d['dense']}, INT4 {d['int4']}, cache {d['cache']}, {d['threads']} threads)",
        f"{size:.3f} {unit} a token: {d['gbs']:.1f} GB/s, {d['ratio']:.2f} of what reading alone "
        f"gives at the same time (in the middle {d['stream_gbs']:.1f} GB/s)",
    ]
    for part, seconds in sorted(d["parts"].items(), key=lambda p: -p[1]):
        out.append(f"{part:<16}{1e3 * seconds:>9.3f} ms a token")
    return out
