"""llama-server's /completion with n_probs: completion_probabilities, one object for each token.

    {"id", "token", "bytes", "logprob", "top_logprobs": [{"id", "token", "bytes", "logprob"}]}
    {"id", "token", "bytes", "prob", "top_probs": [{"id", ..., "prob"}]}      post_sampling_probs
    {"content", "probs": [{"tok_str", "prob"}]}                               before December 2024

A token's text may be held back or joined, its id is right. The response has the prompt as text and
as a number of tokens, tokens_evaluated. In a stream every event has its own token.
Source: ggml-org/llama.cpp `tools/server/server-task.cpp` (completion_token_output,
server_task_result_cmpl_final), `tools/server/README.md`.
"""

from collections.abc import Mapping
from typing import Any

from refmoe.oracle.listing.base import (
    Entry,
    Form,
    Listing,
    Slot,
    count_of,
    described,
    items,
    name,
)


def read(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read one response of /completion."""
    rows = items(f"{where}: completion_probabilities", response.get("completion_probabilities"))
    if not rows:
        return []
    slots, after = [], False
    for t, row in enumerate(rows):
        at = f"{where}: completion_probabilities {t}"
        if isinstance(row, dict) and "probs" in row:
            after = True
            top = [_older(at, x) for x in items(at, row["probs"])]
            slots.append(Slot(name(at, row.get("content")), tuple(top)))
            continue
        value = "prob" if isinstance(row, dict) and "prob" in row else "logprob"
        after |= value == "prob"
        top = [described(at, x, value) for x in items(at, _top(row))]
        slots.append(Slot(described(at, row, value), tuple(top)))
    prompt = response.get("prompt")
    content = response.get("content")
    return [
        Listing(
            LLAMA_SERVER.name,
            tuple(slots),
            count=count_of(response.get("tokens_evaluated")),
            prompt_text=prompt if isinstance(prompt, str) else None,
            text=content if isinstance(content, str) else None,
            probabilities=after,
            sampled=after,
        )
    ]


def _top(row: Any) -> Any:
    """Return the list of the likeliest, under either of its names."""
    return (row.get("top_probs") or row.get("top_logprobs")) if isinstance(row, dict) else None


def _older(where: str, item: Any) -> Entry:
    """Return the entry of {tok_str, prob}."""
    found = item if isinstance(item, dict) else {}
    return name(where, found.get("tok_str"), found.get("prob"))


LLAMA_SERVER = Form("llama-server's /completion", read)
