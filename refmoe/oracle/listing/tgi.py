"""Text Generation Inference's /generate with details, and Ollama's list `logprobs`.

    TGI      {"generated_text", "details": {"prefill": [{"id", "text", "logprob"}, ...],
             "tokens": [...], "top_tokens": [[{"id", "text", "logprob"}, ...], ...]}}
    Ollama   {"response" or "message", "logprobs": [{"token", "logprob", "bytes",
             "top_logprobs": [...]}, ...], "prompt_eval_count"}

prefill has the prompt's tokens if decoder_input_details was asked for, the first with null.
Sources: huggingface/text-generation-inference `router/src/lib.rs` (Details); ollama/ollama
`api/types.go` (Logprob).
"""

from collections.abc import Mapping
from typing import Any

from refmoe.oracle.listing.base import Form, Listing, Slot, count_of, described, items, part
from refmoe.oracle.listing.openai import contents


def read_tgi(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read one response of TGI's /generate."""
    details = part(response, "details")
    tokens = items(f"{where}: details.tokens", details.get("tokens"))
    prefill = items(f"{where}: details.prefill", details.get("prefill"))
    if not tokens and not prefill:
        return []
    slots = [Slot(described(f"{where}: prefill {t}", x)) for t, x in enumerate(prefill)]
    top = items(f"{where}: details.top_tokens", details.get("top_tokens"))
    for t, x in enumerate(tokens):
        at = f"{where}: token {t}"
        listed = tuple(described(at, y) for y in items(at, top[t] if t < len(top) else None))
        slots.append(Slot(described(at, x), listed))
    text = response.get("generated_text")
    known: list[int] | None = [] if prefill else None
    return [
        Listing(
            TGI.name,
            tuple(slots),
            known,
            prompted=len(prefill),
            text=text if isinstance(text, str) and not prefill else None,
        )
    ]


def read_ollama(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read one response of Ollama's /api/generate or /api/chat."""
    rows = response.get("logprobs")
    if not isinstance(rows, list) or not rows:
        return []
    text = response.get("response", part(response, "message").get("content"))
    return [
        Listing(
            OLLAMA.name,
            contents(f"{where}: logprobs", rows),
            count=count_of(response.get("prompt_eval_count")),
            text=text if isinstance(text, str) else None,
        )
    ]


TGI = Form("TGI's /generate", read_tgi)
OLLAMA = Form("Ollama's logprobs", read_ollama)
