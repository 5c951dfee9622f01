"""A checkpoint examined without running it: what is wrong, suspicious, or worth knowing.

    lint(folder)                  one checkpoint, read once from end to end
    lint_against(folder, other)   two checkpoints of one model, whatever each is stored in

    config    constants against the published member of the same shape; ids that end a turn
    YaRN      ramp, softmax scale and gain as other engines take them from this config
    tensors   missing, never read, twice, in the wrong shard, of a wrong shape or dtype
    values    NaN and infinity, all zero, subnormal, copies of another tensor, gains of norms
    INT4      codes and scales, and whether GGUF's Q4_0 can hold them exactly
    FP8       NaN codes, scales that are zero or look inverted
    router    gate rows, and what rounding the bias to bf16 does to the choice of experts

    error     the weights or constants cannot be right: `ok` is false
    warning   probably wrong, or right and known to break an engine
    note      facts

Two tensors are compared tile by tile in float64, where every stored format is exact:

    the same bits; the same values; rounded: |a - b| is at most half a step of each plain type
    (bf16, float16, float32); within a step: also half a quantisation step, s·(1/2 + 8/256) of
    INT4 (rounding to the code, and of the scale to bf16 at code 8), half a unit of e4m3 · s of
    FP8; else wrong, and a cause is sought.

Of a GGUF the same is asked, of its metadata for config.json, and of a GGUF and a folder together.
Without a meaning there: shards and index (a split is held together when it is opened, where names,
shapes and tensors stored twice are errors as well); a dtype for each tensor, which may be any;
generation_config.json and an <|im_end|> that no id names, as llama.cpp ends a turn at that name;
INT4, FP8 and whether Q4_0 could hold them: Q4_0, Q8_0 and the halves of other blocks are looked at
instead. Without a bound of its own a K-quant or IQ is compared by its RMS (`quant_verify.LOOSE`).

Findings of one kind are many in a model of 208,550 tensors: the worst `SHOWN` are listed and the
others counted. Not decidable here: a nibble order or a row order that is wrong in the only copy.
"""

from pathlib import Path

import numpy as np

from refmoe.config import Config, OtherScheme
from refmoe.files import InputError
from refmoe.lint.base import Finding, _Findings
from refmoe.lint.blocks import _gguf_values
from refmoe.lint.diff.compare import _two_checkpoints
from refmoe.lint.names import _names
from refmoe.lint.router import _router
from refmoe.lint.settings import _config, _member, _said, _two_configs, _words
from refmoe.lint.shards import _gather
from refmoe.lint.values import _values
from refmoe.lint.yarn import _yarn
from refmoe.weights.checkpoint import (
    Checkpoint,
)
from refmoe.weights.gguf import Gguf, is_gguf


@np.errstate(over="ignore", invalid="ignore")  # values that are not finite are looked for
def lint(folder: str | Path) -> list[Finding]:
    """Examine the checkpoint in a folder, or a GGUF; `InputError` only if there is no config."""
    if is_gguf(Path(folder)):
        return _lint_gguf(Path(folder))
    folder, out = _folder(folder), _Findings()
    cfg = _config(folder, out)
    if cfg is None:
        return out.listed()
    _yarn(cfg, out)
    if isinstance(cfg.quantization, OtherScheme):
        method = cfg.quantization.quant_method
        text = f"quant_method = {method!r}: its weights cannot be read here"
        out.add("error", "format", None, text)
        return out.listed()
    if not any(folder.glob("*.safetensors")):
        out.add("error", "shards", None, f"{folder}: no *.safetensors file")
        return out.listed()
    checkpoint = Checkpoint(folder, cfg, _gather(folder, out))
    try:
        fit = _names(checkpoint, out)
    except InputError as e:  # sizes that no tensor can have
        out.add("error", "config", None, f"config.json: {e}")
        return out.listed()
    _values(checkpoint, fit, out)
    _router(checkpoint, fit, out)
    return out.listed()


@np.errstate(over="ignore", invalid="ignore")
def lint_against(folder: str | Path, other: str | Path) -> list[Finding]:
    """Compare two checkpoints of one model, tensor by tensor; `folder` is taken to be right.

    `other` may lack a config.json, as a dump of an engine's loaded weights does.
    """
    out = _Findings()
    a = _one_of_two(folder, None, out)
    b = _one_of_two(other, a.cfg, out)
    if isinstance(b, Gguf) or (b.path / "config.json").exists():
        _two_configs(a, b, out)
    else:
        text = f"{b.path} has no config.json: only tensors are compared"
        out.add("note", "config", None, text)
    _two_checkpoints(a, b, out)
    return out.listed()


def _one_of_two(path: str | Path, cfg: Config | None, out: _Findings) -> Checkpoint:
    """`cfg`: what a folder without a config.json is taken to be of."""
    if is_gguf(Path(path)):
        return Gguf.open(path)
    folder = _folder(path)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no *.safetensors file")
    if cfg is None or (folder / "config.json").exists():
        cfg = Config.load(folder)
    return Checkpoint(folder, cfg, _gather(folder, out))


def _lint_gguf(path: Path) -> list[Finding]:
    """The same questions, as far as a GGUF has them."""
    out = _Findings()
    try:
        checkpoint = Gguf.open(path)
    except InputError as e:
        out.add("error", "file", None, str(e))
        return out.listed()
    for note in checkpoint.notes:
        out.add("warning", "metadata", None, note)
    _member(_said(checkpoint), out)
    _words(checkpoint, out)
    _yarn(checkpoint.cfg, out)
    for name in checkpoint.missing:
        out.add("error", "missing tensors", name, "the metadata call for it, no part has it")
    for name in checkpoint.unread:
        out.add("warning", "tensors never read", name, "nothing in the network is called that")
    _gguf_values(checkpoint, out)
    _router(checkpoint, list(checkpoint.tensors), out)
    return out.listed()


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; lint takes a checkpoint's folder")
    return path
