"""Tools and tool calls, read into the form that transformers' chat templates take.

That form is `{"type": "function", "function": {"name": ..., "parameters": {...}}}` for a tool, and
the same with `arguments` for a call (transformers, "Tool use"). Arguments are a dict, since
templates write them as JSON themselves.
"""

import json
from typing import Any


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Returns the tools of a row: a list or its JSON text; none for nothing.

    Raises ValueError for JSON that is not valid, and for a tool without a name.
    """
    tools = parsed(value, "tools")
    if not tools:
        return []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise ValueError(f"tools are {tools!r:.60}: expected a list of functions, or its JSON text")
    return [_as_function(parsed(tool, "a tool"), "a tool") for tool in tools]


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Returns the calls of an answer: one or a list of them, or their JSON text.

    Raises ValueError for JSON that is not valid, the arguments' too, and for a call without a name.
    """
    calls = parsed(value, "tool_calls")
    if not calls:
        return []
    read = []
    for call in [calls] if isinstance(calls, dict) else calls:
        one = _as_function(parsed(call, "a tool call"), "a tool call")
        arguments = one["function"].get("arguments")
        arguments = _arguments(arguments, one["function"]["name"])
        one["function"] = {**one["function"], "arguments": arguments}
        read.append(one)
    return read


def _as_function(given: Any, what: str) -> dict[str, Any]:
    """Returns `given` with its function under `function`. A bare function is wrapped."""
    if isinstance(given, dict) and "function" not in given and "name" in given:
        given = {"type": "function", "function": given}
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} has no name: got {given!r:.80}, expected a function with a name")
    return {"type": "function", **given}


def _arguments(value: Any, name: str) -> Any:
    if value is None or value == "":
        return {}
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the arguments of a call of {name} are no JSON ({value!r:.60}): correct them, or "
            "leave the row out"
        ) from error


def parsed(value: Any, what: str) -> Any:
    """Returns what JSON text holds; what is no text stays as it is, blank text is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: {value!r:.60} is not JSON ({error})") from error
