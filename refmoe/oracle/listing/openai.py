"""OpenAI's two forms and what servers add to them; they stand in `choices`.

    completions  logprobs: {"tokens": [text], "token_logprobs": [x], "top_logprobs": [{text: x}],
                 "text_offset"}; with echo the prompt's tokens come first, the first with null
    chat         logprobs: {"content": [{"token", "bytes", "logprob", "top_logprobs": [...]}]}

    vLLM         prompt_logprobs: [null, {id: {"logprob", "rank", "decoded_token"}}, ...], of a
                 choice or of the response: entry t is of token t; prompt_token_ids and token_ids
                 (return_token_ids); texts like token_id:123 (return_tokens_as_token_ids); -9999 for
                 a token that cannot come; raw_logits for values (logprobs_mode)
    SGLang       OpenAI's forms; equal texts of a completion's list are one key
    Fireworks    token_ids in a completion's logprobs, token_id in content, raw_output with
                 prompt_token_ids, completion_token_ids and completion_logprobs
    llama-server content with ids; prob and top_probs where probabilities are of after sampling
    llama-cpp-python   texts without their bytes that are no UTF-8; chat's bytes are null
    TensorRT-LLM OpenAI's forms, bytes made of the text
    mlx_lm       content with ids; its token is some token of the list, not the one that was drawn

Sources: vllm-project/vllm `vllm/entrypoints/openai/completion/serving.py`
(_create_completion_logprobs), `chat_completion/protocol.py`, `v1/engine/logprobs.py`;
sgl-project/sglang `python/sglang/srt/entrypoints/openai/utils.py` (to_openai_style_logprobs);
fw-ai/fireworks client `api.py` (LogProbs, NewLogProbs, RawOutput); ggml-org/llama.cpp
`tools/server/server-task.cpp`; abetlen/llama-cpp-python `llama_cpp/llama.py`,
`llama_chat_format.py`; NVIDIA/TensorRT-LLM `tensorrt_llm/serve/postprocess_handlers.py`
(create_logprobs); ml-explore/mlx-lm `mlx_lm/server.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refmoe.files import InputError
from refmoe.oracle.listing.base import (
    Entry,
    Form,
    Listing,
    Slot,
    count_of,
    described,
    items,
    name,
    number,
    part,
)
from refmoe.oracle.listing.own import by_id
from refmoe.oracle.readers.base import read_ids


class _Slots(NamedTuple):
    """The slots of one field, and what the field says about them."""

    slots: tuple[Slot, ...]
    form: str
    sampled: bool = False
    drawn: bool = True


def read(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read every choice of a response; none where it has no log-probabilities."""
    choices = response.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        choices = [{}] if "prompt_logprobs" in response else []
    out = []
    for n, choice in enumerate(choices):
        at = where if len(choices) == 1 else f"{where}: choice {n}"
        found = _choice(at, response, choice)
        out += [] if found is None else [found]
    return out


def _choice(where: str, response: Mapping[str, Any], choice: Mapping[str, Any]) -> Listing | None:
    """Return the sequence of one choice, or None where nothing is listed of it."""
    raw, usage, logprobs = part(choice, "raw_output"), part(response, "usage"), _logprobs(choice)
    prompt = _ids(where, "prompt_token_ids", choice, response, raw)
    drawn = _ids(where, "token_ids", choice) or _ids(where, "completion_token_ids", raw)
    found = _generated(f"{where}: logprobs", logprobs)
    own = choice.get("prompt_logprobs", response.get("prompt_logprobs"))
    prompted = prompt_slots(f"{where}: prompt_logprobs", own, prompt)
    slots = _with_ids(found.slots, _ids(where, "token_ids", logprobs))
    if not prompted and not slots:
        return None
    count = count_of(usage.get("prompt_tokens")) if prompt is None else len(prompt)
    total = len(drawn) if drawn else count_of(usage.get("completion_tokens"))
    echoed = _echoed(slots, count, total)
    if echoed and prompt is not None:
        slots = _with_ids(slots, [*prompt, *(drawn or [])])
    elif echoed and drawn:
        slots = slots[: -len(drawn)] + _with_ids(slots[-len(drawn) :], drawn)
    else:
        slots = _with_ids(slots, drawn)
    said = part(choice, "message") or part(choice, "delta")
    text = choice.get("text", said.get("content"))
    if prompted:
        text = None  # it may be of the answer alone
        slots = (*prompted, *(slots[len(prompted) :] if echoed else slots))
    total_prompt = count if prompted or echoed else None
    if prompted or echoed:
        prompt, count = [], None
    forms = ["vLLM's prompt_logprobs"] * bool(prompted) + [found.form] * bool(found.slots)
    return Listing(
        " and ".join(forms),
        slots,
        prompt,
        count,
        total_prompt,
        text=text if isinstance(text, str) else None,
        probabilities=found.sampled,
        sampled=found.sampled,
        drawn=found.drawn,
    )


def _logprobs(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a choice's logprobs, or those of Fireworks' raw output."""
    logprobs = part(choice, "logprobs")
    if any(logprobs.get(key) for key in ("content", "reasoning_content", "tokens")):
        return logprobs
    return part(part(choice, "raw_output"), "completion_logprobs")


def _ids(where: str, key: str, *places: Mapping[str, Any]) -> list[int] | None:
    """Return the token ids under this key in the first place that has them."""
    value = next((p[key] for p in places if p.get(key)), None)
    return None if value is None else read_ids(f"{where}: {key}", value)


def prompt_slots(where: str, rows: Any, prompt: Sequence[int] | None) -> tuple[Slot, ...]:
    """Return a slot for each token of vLLM's prompt_logprobs.

    Without ids, nothing tells which entry of a list is its own token.
    """
    if not isinstance(rows, list) or not rows:
        return ()
    if prompt is not None and len(prompt) != len(rows):
        raise InputError(
            f"{where}: log-probabilities of {len(rows)} positions, and other tokens ({len(prompt)})"
        )
    found = [by_id(f"{where} {t}", row) for t, row in enumerate(rows)]
    ids = [None] * len(rows) if prompt is None else prompt
    return tuple(
        Slot(None if i is None else Entry(i), row) for i, row in zip(ids, found, strict=True)
    )


def _generated(where: str, logprobs: Mapping[str, Any]) -> _Slots:
    """Return the slots of a choice's logprobs, in either of OpenAI's forms."""
    thought = items(f"{where}.reasoning_content", logprobs.get("reasoning_content"))
    content = [*thought, *items(f"{where}.content", logprobs.get("content"))]
    if content:
        first = content[0] if isinstance(content[0], dict) else {}
        after = "prob" in first
        drawn = "id" not in first or "bytes" in first or "top_logprobs" not in first  # not mlx_lm
        slots = contents(f"{where}.content", content, drawn)
        return _Slots(slots, "chat's logprobs.content", after, drawn)
    tokens = items(f"{where}.tokens", logprobs.get("tokens"))
    values = items(f"{where}.token_logprobs", logprobs.get("token_logprobs"))
    top = items(f"{where}.top_logprobs", logprobs.get("top_logprobs"))
    if not tokens:
        return _Slots((), "")
    for more, what in ((values, "token_logprobs"), (top, "top_logprobs")):
        if more and len(more) != len(tokens):
            raise InputError(f"{where}: {len(tokens)} tokens and {len(more)} {what}")
    out = []
    for t, token in enumerate(tokens):
        at = f"{where}: token {t}"
        row = top[t] if top else None
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{at} has {row!r} for top_logprobs, expected an object")
        listed = tuple(name(at, key, x) for key, x in (row or {}).items())
        value = number(at, values[t]) if values else number(at, None)
        own = Entry(token) if type(token) is int else name(at, token)
        out.append(Slot(own._replace(value=value), listed))
    return _Slots(tuple(out), "completions' logprobs")


def contents(where: str, content: Sequence[Any], drawn: bool = True) -> tuple[Slot, ...]:
    """Return the slots of objects {token, bytes, logprob, top_logprobs}; {} is an unknown one.

    drawn  False: the objects' own tokens are not those of the sequence
    """
    out = []
    for t, item in enumerate(content):
        at = f"{where} {t}"
        if item == {}:
            out.append(Slot(None))
            continue
        value = "prob" if isinstance(item, dict) and "prob" in item else "logprob"
        own = described(at, item, value)
        more = item.get("top_probs" if value == "prob" else "top_logprobs")
        listed = tuple(described(at, x, value) for x in items(at, more))
        out.append(Slot(own, listed) if drawn else Slot(None, listed))
    return tuple(out)


def _echoed(slots: Sequence[Slot], prompt: int | None, drawn: int | None) -> bool:
    """Tell whether the slots begin with the prompt's tokens, of which there are so many.

    By their number, where it decides; else because the first token of all has no log-probability.
    """
    if not slots or slots[0].token is None:
        return False
    if prompt is not None and drawn is not None and prompt != drawn:
        if len(slots) == drawn:
            return False
        if len(slots) in (prompt, prompt + drawn):
            return True
    return math.isnan(slots[0].token.value) and not slots[0].listed


def _with_ids(slots: tuple[Slot, ...], ids: Sequence[int] | None) -> tuple[Slot, ...]:
    """Return slots whose tokens have these ids, as far as both go."""
    out = list(slots)
    for t, (slot, i) in enumerate(zip(slots, ids or (), strict=False)):
        out[t] = Slot((slot.token or Entry(None))._replace(id=i), slot.listed)
    return tuple(out)


OPENAI = Form("choices", read)
