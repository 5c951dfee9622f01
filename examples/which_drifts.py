"""Two engines disagree. Which of them is farther from float64, and is either of them wrong?

    python examples/which_drifts.py

This compares an engine that stores its tensors in bfloat16 with one that stores them in float16;
refmoe plays both. Their results differ, and yet both are right: each operation is judged in float64
on the engine's own inputs, against what rounding in its own precision explains. The last line is
the geometric mean, over all points, of the first engine's error divided by the second's. Two dumps
on disk are compared in the same way by `refmoe check A --against B`.
"""

import tempfile
from pathlib import Path

import numpy as np

import refmoe

model = refmoe.load()
tokens = model.tokenizer.encode("To be, or not to be, that is the question")
errors = {}
with tempfile.TemporaryDirectory() as tmp:
    for name in ("bfloat16", "float16"):
        file = Path(tmp) / f"{name}.npz"
        points = refmoe.trace(refmoe.load(numerics=name), tokens)
        np.savez(file, tokens=np.array(tokens), **points)
        report = refmoe.check(model, refmoe.read_dump(file))
        print(f"{name}: {report.verdict}, {report.compared} tensors compared")
        errors[name] = {p.name: p.rel_error for p in report.points if p.rel_error > 0}
both = [p for p in errors["bfloat16"] if p in errors["float16"]]
ratio = np.exp(np.mean([np.log(errors["bfloat16"][p] / errors["float16"][p]) for p in both]))
print(f"bfloat16 errs {ratio:.1f} times as much as float16 (8 significant bits, and 11)")
