"""Tools of a conversation, as chat templates are given them: transformers' form, checked.

Knows no template, and not what an answer may call.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from duetto.checkpoints.plain_data import PlainData
from duetto.core.errors import InvalidRequest

TOOLS = "tools"
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MAX_DEPTH = 48  # a level of a schema is up to three levels of JSON
# How the arguments of a call are constrained; it says nothing about the tool.
_NOT_FOR_TEMPLATES = frozenset(("strict",))


def plain_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools in plain data, each {"type": "function", "function": {"name", "parameters", ...}}.

    Keys stay in their order, since templates print them as JSON. A null is left out, and a function
    without parameters has none, in words that templates read.

    Raises InvalidRequest, naming the place, for what is no tool, and for two of one name.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InvalidRequest(TOOLS, f"must be a list of tools, not {tools!r:.60}")
    plain, places = [], dict[str, int]()
    for index, tool in enumerate(tools):
        field = f"{TOOLS}[{index}]"
        made = _plain_tool(field, tool)
        name = made["function"]["name"]
        if name in places:
            raise InvalidRequest(
                f"{field}.function.name", f"{name!r} is {TOOLS}[{places[name]}]'s name too"
            )
        places[name] = index
        plain.append(made)
    return plain


def _plain_tool(field: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise InvalidRequest(field, f"must be an object, not {tool!r:.60}")
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"{field}.type", f"must be 'function', not {tool.get('type')!r:.60}: others run nowhere"
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{field}.function", f"must be an object, not {function!r:.60}")
    _check_function(f"{field}.function", function)
    given = {k: v for k, v in function.items() if v is not None and k not in _NOT_FOR_TEMPLATES}
    given.setdefault("parameters", {"type": "object", "properties": {}})
    others = {k: v for k, v in tool.items() if v is not None}
    return PlainData(field, _MAX_DEPTH).of({**others, "function": given})


def _check_function(field: str, function: Mapping[str, Any]) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field}.name", f"must be 1 to 64 of a-z, A-Z, 0-9, _, . and -, not {name!r:.80}"
        )
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{field}.description", f"must be a string, not {description!r:.60}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(
            f"{field}.parameters", f"must be a JSON schema, an object, not {parameters!r:.60}"
        )
