"""What does it cost to store every tensor in 16 bits?

    python examples/rounding.py

This computes one sentence with tiny-k2 in float64, in float32, and in emulations of engines that
store float16 and bfloat16. For each layer it prints the largest error of each run, relative to the
largest value of the float64 result, and for how many of the tokens the router chose other experts.
"""

import numpy as np

import refmoe

TEXT = "My lord, the king hath sent to know your mind,"
truth = refmoe.load(numerics="float64")
tokens = truth.tokenizer.encode(TEXT)
exact = refmoe.trace(truth, tokens)

print(f"{'after layer':<12}{'float32':>10}{'float16':>10}{'bfloat16':>10}   experts changed")
runs = {
    n: refmoe.trace(refmoe.load(numerics=n), tokens) for n in ("float32", "float16", "bfloat16")
}
for i in range(truth.cfg.num_hidden_layers):
    name = f"model.layers.{i}"
    size = np.abs(exact[name]).max()
    errors = [np.abs(run[name] - exact[name]).max() / size for run in runs.values()]
    chosen = f"{name}.mlp.gate#experts"
    flips = ""
    if chosen in exact:
        same = [np.sort(run[chosen]) == np.sort(exact[chosen]) for run in runs.values()]
        flips = "  ".join(f"{int((~s.all(axis=1)).sum())} of {len(tokens)}" for s in same)
    print(f"{i:<12}" + "".join(f"{e:>10.1e}" for e in errors) + f"   {flips}")
