"""Two engines disagree: which of them is further from float64, and is either at fault?

    python examples/which_drifts.py

compares an engine that stores bfloat16 with one that stores float16. They differ by a percent, and
both are right: each is held against float64 on its own inputs, within its own precision.
"""

import tempfile
from pathlib import Path

import numpy as np

import refmoe
from refmoe.oracle.check import Case, arbitrate

model = refmoe.load()
tokens = model.tokenizer.encode("To be, or not to be, that is the question")
cases = {}
with tempfile.TemporaryDirectory() as tmp:
    for name in ("bfloat16", "float16"):
        file = Path(tmp) / f"{name}.npz"
        points = refmoe.trace(refmoe.load(numerics=name), tokens)
        np.savez(file, tokens=np.array(tokens), **points)
        cases[name] = Case(model, refmoe.read_dump(file))
        report = cases[name].report
        print(f"{name}: {report.verdict}, {report.compared} tensors compared")
both = arbitrate(cases["bfloat16"], cases["float16"])
print(f"bfloat16 errs {both.ratio:.1f} times as much as float16 (8 bits of significand and 11)")
