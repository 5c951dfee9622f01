"""refmoe: the reference engine for Moonshot's Kimi K2 family.

model = refmoe.load()                        the embedded tiny-k2, or a checkpoint's folder
model.logits(tokens)                         [T, Z]
refmoe.generate(model, "ROMEO:")             text, piece by piece
refmoe.trace(model, tokens, ["lm_head"])     {point: array}
refmoe.check(model, refmoe.read_dump(file))  Report: where another engine first goes wrong

`import refmoe` loads none of this: a name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refmoe.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` does it
    from refmoe.config import Config
    from refmoe.files import InputError
    from refmoe.oracle.check import check
    from refmoe.oracle.readers.dump import read_dump
    from refmoe.oracle.trace import trace
    from refmoe.run.generate import generate
    from refmoe.run.load import Model, load

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

_HOMES = {  # public name: the module that defines it
    "Config": "refmoe.config",
    "InputError": "refmoe.files",
    "Model": "refmoe.run.load",
    "check": "refmoe.oracle.check",
    "generate": "refmoe.run.generate",
    "load": "refmoe.run.load",
    "read_dump": "refmoe.oracle.readers.dump",
    "trace": "refmoe.oracle.trace",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'refmoe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """Return the public names, whether they were used or not."""
    return sorted({*globals(), *__all__})
