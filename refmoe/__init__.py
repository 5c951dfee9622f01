"""refmoe: the reference engine for Moonshot's Kimi K2 family.

model = refmoe.load()                        the embedded tiny-k2, or a checkpoint's folder
model.logits(tokens)                         [T, Z]
refmoe.generate(model, "ROMEO:")             text, piece by piece
refmoe.trace(model, tokens, ["lm_head"])     {point: array}
"""

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.oracle.check import check
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.trace import trace
from refmoe.run.generate import generate
from refmoe.run.load import Model, load
from refmoe.version import __version__

__all__ = [
    "Config",
    "InputError",
    "Model",
    "__version__",
    "check",
    "generate",
    "load",
    "read_dump",
    "trace",
]
