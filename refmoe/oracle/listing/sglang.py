"""SGLang's /generate with return_logprob: lists of [logprob, id, text or null] in meta_info.

    input_token_logprobs     the prompt's tokens from logprob_start_len on, the first with null
    input_top_logprobs       top_logprobs_num likeliest of each, null for the first
    output_token_logprobs, output_top_logprobs        of the tokens that were generated
    input_token_ids_logprobs, output_token_ids_logprobs     of the ids that were asked for

A stream repeats these lists from their beginnings in every event, unless it was told otherwise.
Source: sgl-project/sglang `python/sglang/srt/managers/tokenizer_manager.py`
(convert_logprob_style, detokenize_logprob_tokens); its OpenAI endpoints are in openai.py.
"""

from collections.abc import Mapping
from typing import Any

from refmoe.files import InputError
from refmoe.oracle.listing.base import (
    Entry,
    Form,
    Listing,
    Slot,
    count_of,
    items,
    number,
    part,
    whole,
)


def triple(where: str, value: Any) -> Entry:
    """Return the entry of [logprob, id, text]."""
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{where} is {value!r}, expected [logprob, id, text]")
    return Entry(whole(where, value[1]), value=number(where, value[0]))


def read(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read one response of /generate."""
    meta = part(response, "meta_info")
    slots = [*_slots(where, meta, "input"), *_slots(where, meta, "output")]
    if not slots:
        return []
    given = len(items(f"{where}: input_token_logprobs", meta.get("input_token_logprobs")))
    total = count_of(meta.get("prompt_tokens"))
    before = None if total is None else total - given
    if before is not None and before < 0:
        raise InputError(f"{where}: input_token_logprobs has {given} of {total} prompt_tokens")
    whole_prompt = before == 0 or (before is None and given > 0)
    prompt: list[int] | None = [] if whole_prompt else None
    text = response.get("text") if not given else None
    return [
        Listing(
            SGLANG.name,
            tuple(slots),
            prompt,
            None if whole_prompt else before,
            given,
            text=text if isinstance(text, str) else None,
        )
    ]


def _slots(where: str, meta: Mapping[str, Any], side: str) -> list[Slot]:
    """Return the slots of one side, input or output."""

    def field(name: str) -> Any:
        key = f"{side}_{name}_logprobs"
        return items(f"{where}: {key}", meta.get(key))

    tokens, top, asked = field("token"), field("top"), field("token_ids")
    for more, what in ((top, "top"), (asked, "token_ids")):
        if more and len(more) != len(tokens):
            raise InputError(
                f"{where}: {side}_{what}_logprobs has {len(more)} rows, {side}_token_logprobs "
                f"{len(tokens)}"
            )
    out = []
    for t, value in enumerate(tokens):
        at = f"{where}: {side} token {t}"
        rows = [row for rows in (top, asked) if rows and (row := rows[t]) is not None]
        listed = tuple(triple(at, x) for row in rows for x in items(at, row))
        out.append(Slot(triple(at, value), listed))
    return out


SGLANG = Form("SGLang's /generate", read)
