"""Top-k log-probabilities as JSON, ours or as vLLM's server returns them.

    ours     {"tokens": [...], "top_logprobs": [{"id": logprob, ...} or null, ...]}
             entry t is what follows token t
    vLLM's   {"prompt_token_ids": [...], "prompt_logprobs": [null, {"id": {"logprob": x, ...},
             ...}, ...]}, alone or in `choices`; entry t is of token t itself

Source: vllm-project/vllm, entrypoints/openai/protocol.py.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError, read_json
from refmoe.oracle.readers.base import Dump, Reader, read_ids, register

MOST_PROBABILITY = 1.1  # sum of a row's probabilities; some servers print few digits
NONE_BELOW = -9000.0  # vLLM writes -9999 where it has no log-probability


def recognise(path: Path) -> bool:
    """Tell whether this is a .json file."""
    return path.is_file() and path.suffix == ".json"


def read(path: Path) -> Dump:
    """Read tokens and log-probabilities; `rounded` is bfloat16, as nothing else is known."""
    tokens, top = read_logprobs(path)
    return Dump(path, {}, tokens, "bfloat16", top=top)


def read_logprobs(path: Path) -> tuple[list[int] | None, tuple[np.ndarray, np.ndarray]]:
    """Return the tokens, and for each position ids [T, K] (-1: none) with log-probabilities [T, K].

    Row t is the distribution of what follows token t.
    """
    tokens, rows = _rows(path)
    found = [_pairs(f"{path}: position {t}", row) for t, row in enumerate(rows)]
    width = max(map(len, found))
    ids, values = np.full((len(rows), width), -1), np.full((len(rows), width), np.nan)
    for t, row in enumerate(found):
        ids[t, : len(row)], values[t, : len(row)] = list(row), list(row.values())
    if not width or (np.nan_to_num(values) == 0).all():
        raise InputError(f"{path}: every log-probability is 0 or missing; the server gave none")
    return tokens, (ids, values)


def _rows(path: Path) -> tuple[list[int] | None, list[Any]]:
    """Return the tokens and, for each, the object that says what follows it."""
    value = read_json(path)
    value = value if isinstance(value, dict) else {}
    inside = value.get("choices") or [{}]
    if isinstance(inside, list) and isinstance(inside[0], dict):
        value = {**inside[0], **{k: v for k, v in value.items() if v is not None}}
    tokens = value.get("tokens") or value.get("prompt_token_ids")
    rows = value.get("top_logprobs")
    if rows is None and isinstance(own := value.get("prompt_logprobs"), list):
        rows = [*own[1:], None]  # what is said of token t is the distribution after token t - 1
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: neither top_logprobs nor prompt_logprobs is a list in it")
    tokens = None if tokens is None else read_ids(f"{path}: tokens", tokens)
    if tokens is not None and len(tokens) != len(rows):
        raise InputError(
            f"{path}: log-probabilities of {len(rows)} positions, and other tokens ({len(tokens)})"
        )
    return tokens, rows


def _pairs(where: str, row: Any) -> dict[int, float]:
    """Return id → log-probability of one position; nothing for null."""
    if row is None:
        return {}
    try:
        pairs = {int(i): float(x["logprob"] if isinstance(x, dict) else x) for i, x in row.items()}
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise InputError(f"{where} is no object of token ids and log-probabilities") from None
    for i, x in pairs.items():
        if not 0 <= i < 2**31 or not NONE_BELOW < x < 1e-3:
            hint = " (-9999 stands for none)" if x <= NONE_BELOW else ""
            raise InputError(
                f"{where}: token {i} has log-probability {x}, expected one below 0{hint}"
            )
    if len(pairs) != len(row):
        raise InputError(f"{where}: the same token twice; the keys must be ids, not texts")
    total = math.fsum(map(math.exp, pairs.values()))
    if total > MOST_PROBABILITY:
        raise InputError(f"{where}: the probabilities add up to {total:.3g}; are they logarithms?")
    return pairs


register(Reader("logprobs", ".json", recognise, read))
