"""Read the responses that a file holds: one, a list, a stream of events, or one in each line.

Events of one response are joined: texts and lists one after another, of anything else the last.
SGLang's repeat what came before, so that a list which begins with the one before replaces it.
Lines are events of a stream by `data:` in front of them or by what they say of themselves
(`object` ends in chunk, `delta`, `stop` false), and of one response if their `id` is one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refmoe.files import InputError, read_text

SPOKEN = ("data:", "event:", "id:", "retry:", ":")  # beginnings of a line of an event stream
MEASURED = ("prompt_token_ids", "prompt_logprobs")  # given once for the whole of a response


def read_responses(path: Path) -> list[dict[str, Any]]:
    """Return the responses of a file; raise `InputError` if it is neither JSON nor a stream."""
    text = read_text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if is_stream(lines):
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        events = [_parse(path, d) for d in data if d != "[DONE]"]
        return _joined(path, events, True)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        if len(lines) < 2 or not lines[0].startswith("{") or not lines[0].endswith("}"):
            raise InputError(f"{path}: not JSON ({e})") from None
        return _joined(path, [_parse(path, line) for line in lines], False)
    found = value if isinstance(value, list) else [value]
    return [_response(path, x) for x in found]


def is_stream(lines: Sequence[str]) -> bool:
    """Tell whether these lines, none of them empty, are server-sent events."""
    return bool(lines) and lines[0].startswith(SPOKEN) and any(x.startswith("data:") for x in lines)


def _parse(path: Path, line: str) -> dict[str, Any]:
    """Return the object of one line."""
    try:
        return _response(path, json.loads(line))
    except (ValueError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: {line[:40]!r} is no JSON ({e}); is the file whole?") from None


def _response(path: Path, value: Any) -> dict[str, Any]:
    """Return a response, without the wrapper that a batch's file or a log has around it."""
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: a JSON {type(value).__name__}, expected a server's response, an object"
        )
    inside: Any = value
    while isinstance(inside, dict) and isinstance(inside.get("response"), dict):
        inside = inside["response"].get("body", inside["response"])
    return inside if isinstance(inside, dict) else value


def _joined(path: Path, events: list[dict[str, Any]], stream: bool) -> list[dict[str, Any]]:
    """Return the responses that these events make."""
    if not events:
        raise InputError(f"{path}: a stream without events")
    if any("error" in e and len(e) == 1 for e in events):
        raise InputError(f"{path}: the stream ends with an error: {events[-1]}")
    if not (stream or all(map(_partial, events[:-1]))):
        return events
    out: dict[Any, dict[str, Any]] = {}
    for event in events:
        key = event.get("id") or _inner_id(event)
        out[key] = _join(out[key], event) if key in out else event
    return list(out.values())


def _inner_id(event: dict[str, Any]) -> Any:
    """Return the id that SGLang's events have inside, or llama-server's number of the prompt."""
    meta = event.get("meta_info")
    return meta.get("id") if isinstance(meta, dict) else event.get("index")


def _partial(event: dict[str, Any]) -> bool:
    """Tell whether an object says that it is a part of a response."""
    choices = event.get("choices")
    deltas = isinstance(choices, list) and any(
        isinstance(c, dict) and "delta" in c for c in choices
    )
    return str(event.get("object")).endswith("chunk") or deltas or event.get("stop") is False


def _join(a: Any, b: Any, key: str = "") -> Any:
    """Return what two events say together."""
    if isinstance(a, dict) and isinstance(b, dict):
        out = dict(a)
        for k, x in b.items():
            out[k] = _join(out[k], x, k) if out.get(k) is not None else x
        return out
    if key == "choices" and isinstance(a, list) and isinstance(b, list):
        return _join_choices(a, b)
    if isinstance(a, list) and isinstance(b, list):
        repeated = key.startswith(("input_", "output_")) and b[: len(a)] == a
        return b if repeated or (key in MEASURED and b) else a + b
    if key in ("text", "content", "response") and isinstance(a, str) and isinstance(b, str):
        return b if a and b.startswith(a) and key == "text" else a + b
    return a if b is None else b


def _join_choices(a: list[Any], b: list[Any]) -> list[Any]:
    """Return choices joined by their index."""
    out = {c.get("index", 0): c for c in a if isinstance(c, dict)}
    for c in b:
        if isinstance(c, dict):
            i = c.get("index", 0)
            out[i] = _join(out[i], c) if i in out else c
    return [out[i] for i in sorted(out, key=str)]
