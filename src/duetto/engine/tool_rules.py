"""Which tools an answer may call, and whether it must."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duetto.core.errors import InvalidRequest
from duetto.dialects.pieces import ToolSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRules:
    tools: Sequence[Mapping[str, Any]]  # as chat templates are given them
    is_required: bool = False
    only: str | None = None  # the one tool that may be called
    strict: frozenset[str] = frozenset()  # tools whose arguments must follow their schema
    parallel: bool = True  # more than one call in an answer

    @property
    def schemas(self) -> list[ToolSchema]:
        """Of the tools that may be called."""
        functions = [tool["function"] for tool in self.tools]
        return [
            ToolSchema(each["name"], each.get("parameters") or {})
            for each in functions
            if self.only in (None, each["name"])
        ]


def offline_rules(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any]
) -> ToolRules | None:
    """Of a caller in this process; None: nothing is called. Raises InvalidRequest for a choice that
    is none; the tools are the template's to check."""
    only = None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        only = function.get("name") if isinstance(function, Mapping) else None
    if only is None and choice not in ("none", "auto", "required"):
        words = f'must be none, auto, required or {{"type": "function", ...}}, not {choice!r:.60}'
        raise InvalidRequest("tool_choice", words)
    if not tools:
        if choice not in ("none", "auto"):
            raise InvalidRequest("tool_choice", "needs tools")
        return None
    if choice == "none":
        return None
    rules = ToolRules(tools=tools, is_required=choice != "auto", only=only)
    if only is not None and not rules.schemas:
        raise InvalidRequest("tool_choice", f"{only!r:.60} is none of the tools")
    return rules
