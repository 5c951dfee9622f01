"""Read the token ids that another program says a prompt has: a list, or an object of a server.

    a list of ids                     as refmoe writes it
    /tokenize of vLLM and SGLang      {"tokens": [id, ...], "count": n, ...}
    /tokenize of llama-server         {"tokens": [id, ...]}, or of {"id", "piece"}
    /tokenize of TGI                  [{"id", "text", ...}, ...]
    a Hugging Face tokenizer          {"input_ids": [id, ...]}, or in one more list
    a response of a server            prompt_token_ids, of the response, a choice or raw_output;
                                      SGLang's meta_info.input_token_logprobs
    a response without ids            usage.prompt_tokens, tokens_evaluated, prompt_eval_count,
                                      meta_info.prompt_tokens: how many there are

Sources: vllm-project/vllm `vllm/entrypoints/serve/tokenize/protocol.py`; ggml-org/llama.cpp
`tools/server/README.md`; sgl-project/sglang `python/sglang/srt/entrypoints/openai/protocol.py`;
huggingface/text-generation-inference `router/src/lib.rs`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refmoe.files import InputError, read_json


class Theirs(NamedTuple):
    """The prompt's tokens as another program has them: ids, or their number alone."""

    ids: list[int] | None
    number: int


def read_theirs(file: Path) -> Theirs:
    """Read another program's tokens; raise `InputError` where the file has none."""
    value = read_json(file)
    found = _ids(value)
    if found is None and isinstance(value, Mapping):
        found = _of_response(value)
        count = None if found is not None else _count(value)
        if count is not None:
            return Theirs(None, count)
    if found is None:
        raise InputError(
            f"{file}: no token ids in it; expected a list of integers, what /tokenize returned, or "
            "a response with prompt_token_ids or a count of the prompt's tokens"
        )
    return Theirs(found, len(found))


def _ids(value: Any) -> list[int] | None:
    """Return a list of ids, of objects with an id, or such a list alone in another one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list):
        return None
    every = [x.get("id") if isinstance(x, Mapping) else x for x in value]
    ids = [i for i in every if type(i) is int]
    return ids if len(ids) == len(every) else None


def _of_response(value: Mapping[str, Any]) -> list[int] | None:
    """Return the prompt's ids of what a tokenizer or a server returned."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, Mapping) else {}
    raw, meta = choice.get("raw_output"), value.get("meta_info")
    for place in (value, choice, raw if isinstance(raw, Mapping) else {}):
        found = _ids(place.get("prompt_token_ids"))
        if found is not None:
            return found
    if isinstance(meta, Mapping):
        rows = meta.get("input_token_logprobs")
        if isinstance(rows, list) and len(rows) == meta.get("prompt_tokens", len(rows)):
            found = _ids([x[1] if isinstance(x, list) and len(x) > 1 else None for x in rows])
            return found or None
        return None
    answered = "content" in value or "tokens_predicted" in value  # its tokens are the answer's
    for key in ("input_ids", *(() if answered else ("tokens", "token_ids"))):
        found = _ids(value.get(key))
        if found is not None:
            return found
    return None


def _count(value: Mapping[str, Any]) -> int | None:
    """Return how many tokens a response says the prompt had."""
    usage, meta = value.get("usage"), value.get("meta_info")
    usage = usage if isinstance(usage, Mapping) else {}
    meta = meta if isinstance(meta, Mapping) else {}
    every = (
        usage.get("prompt_tokens"),
        usage.get("input_tokens"),
        value.get("tokens_evaluated"),
        value.get("prompt_eval_count"),
        meta.get("prompt_tokens"),
        value.get("count"),
    )
    return next((n for n in every if type(n) is int and n >= 0), None)
