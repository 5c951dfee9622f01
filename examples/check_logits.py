"""Are these logits right, when logits are all there is?

    python examples/check_logits.py

writes the logits of a healthy engine and of one that forgot YaRN's part of the softmax scale, as
any engine could (an .npz with `lm_head` and `tokens`), and judges both end to end. The envelope is
then that of the whole network in the engine's precision, so small faults in it stay unseen.
"""

import tempfile
from pathlib import Path

import numpy as np

import refmoe

model = refmoe.load()
tokens = model.tokenizer.encode("To be, or not to be, that is the question")


def too_flat(path: str, x: np.ndarray) -> np.ndarray:
    return x / 1.8133 if path.endswith("#scores") else x  # 1.8133 = (0.1·ln 32 + 1)²


with tempfile.TemporaryDirectory() as tmp:
    for name, engine in (
        ("healthy", refmoe.load(numerics="bfloat16")),
        ("too flat", refmoe.load(numerics="bfloat16")),
    ):
        watched = engine.using(engine.nx.watching(too_flat if name == "too flat" else None))
        file = Path(tmp) / f"{name}.npz"
        np.savez(file, lm_head=watched.logits(tokens), tokens=np.array(tokens))
        report = refmoe.check(model, refmoe.read_dump(file))
        print(f"{name}: {report.verdict}, {report.reason}")
        print(f"  judged together: {len(report.points[0].through)} operations")
