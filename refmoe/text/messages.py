"""Check the messages and tool declarations that people hand to a chat template.

A message is an object as in OpenAI's API: `role`; `content`, a string or a list of parts
{"type": "text", "text": …}; where they apply `name`, `reasoning_content`, `tool_call_id` and
`tool_calls`, each {"id", "type": "function", "function": {"name", "arguments"}} with arguments as
text or as an object.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refmoe.files import InputError, read_json

NAME = r"[^\s:]+"  # of a function: what stands between `functions.` and `:INDEX` in a call's id


def check_messages(messages: list[Any]) -> None:
    """Raise `InputError` for what no template understands, and take out fields that are None.

    `content` may be None, as OpenAI has it beside tool calls, and stays.
    """
    if not messages:
        raise InputError("no messages; a conversation begins with one")
    for i, m in enumerate(messages):
        where = f"message {i}"
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not m["role"]:
            raise InputError(f"{where}: expected an object with a role, got {shorten(m)}")
        for field in ("reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name"):
            if field in m and m[field] is None:
                del m[field]
            elif field != "tool_calls" and not isinstance(m.get(field, ""), str):
                raise InputError(f"{where}: {field} is {shorten(m[field])}, expected a string")
        content = m.get("content")
        if content is not None and not isinstance(content, str | list):
            raise InputError(
                f"{where}: content is {shorten(content)}, expected a string or a list of parts"
            )
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or (
                kind == "text" and not isinstance(part.get("text"), str)
            ):
                raise InputError(
                    f'{where}: part {shorten(part)}, expected {{"type": "text", "text": …}}'
                )
        calls = m.get("tool_calls", [])
        if not isinstance(calls, list):
            raise InputError(f"{where}: tool_calls is {shorten(calls)}, expected a list")
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if (
                not isinstance(function, dict)
                or not isinstance(function.get("name"), str)
                or not isinstance(function.get("arguments"), str | dict)
                or not isinstance(call.get("id", ""), str)
            ):
                raise InputError(
                    f'{where}: tool call {shorten(call)}, expected {{"id": "functions.NAME:INDEX", '
                    '"function": {"name": …, "arguments": text or object}}'
                )


def check_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """Return `tools` if it is a list of function declarations, each with a name of its own.

    Raises `InputError`, which begins with `where`, if it is anything else.
    """
    if not isinstance(tools, list):
        raise InputError(f"{where}: expected a list of function declarations, got {shorten(tools)}")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise InputError(
                f'{where}: tool {i} is {shorten(tool)}, expected {{"type": "function", "function": '
                '{"name": …, "description": …, "parameters": …}} with a name without spaces or ":"'
            )
        if name in names:
            raise InputError(f"{where}: two tools are called {name!r}")
        names.add(name)
    return tools


def read_tools(file: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list of function declarations, or an object that holds it under `tools`.

    Raises `InputError` for any other file.
    """
    value = read_json(Path(file))
    return check_tools(value.get("tools") if isinstance(value, dict) else value, str(file))


def copy_plain(value: Any, swap: Mapping[int, int], where: str) -> Any:
    """Return a copy made of plain JSON types, so that a template cannot reach the caller's objects.

    Characters are replaced as `swap` says (see `str.translate`), and half a surrogate pair by
    U+FFFD. Raises `InputError` for a value that JSON cannot hold.
    """
    if isinstance(value, str):
        text = str.__str__(value)  # a subclass may carry methods
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text.translate(swap) if swap else text
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            copy_plain(key, swap, where): copy_plain(item, swap, where)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [copy_plain(item, swap, where) for item in value]
    raise InputError(f"{where}: it holds a {type(value).__name__}; expected what JSON can hold")


def shorten(value: Any) -> str:
    """Return the first 80 characters of a value as JSON, for a message."""
    return json.dumps(value, ensure_ascii=False)[:80]
