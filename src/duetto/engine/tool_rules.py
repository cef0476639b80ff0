"""Which tools an answer may call, and whether it must."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
