"""Are these logits right? Judge an engine of which only the logits are known.

    python examples/check_logits.py

This writes two dumps as any engine could, `.npz` files with `lm_head` and `tokens`, and judges
both. One is of a healthy engine that stores bfloat16; the other forgot YaRN's part of the softmax
scale. Without the tensors in between, the whole network is judged as one operation, so that a fault
which is smaller than the rounding of the whole network stays unseen.
"""

import tempfile
from pathlib import Path

import numpy as np

import refmoe

model = refmoe.load()
tokens = model.tokenizer.encode("To be, or not to be")


def too_flat(path: str, x: np.ndarray) -> np.ndarray:
    """Undo YaRN's part of the softmax scale: this watcher plants the fault."""
    return x / 1.8133 if path.endswith("#scores") else x  # 1.8133 = (0.1·ln 32 + 1)²


with tempfile.TemporaryDirectory() as tmp:
    engine = refmoe.load(numerics="bfloat16")
    for name, watcher in (("healthy", None), ("too flat", too_flat)):
        logits = engine.using(engine.nx.watching(watcher)).logits(tokens)
        file = Path(tmp) / f"{name}.npz"
        np.savez(file, lm_head=logits, tokens=np.array(tokens))
        report = refmoe.check(model, refmoe.read_dump(file))
        print(f"{name}: {report.verdict}, {report.reason}")
        print(f"  judged together: {len(report.points[0].through)} operations")
