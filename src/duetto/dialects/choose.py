"""Which dialects a model speaks: read from its chat template, or named by the user."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from duetto.core.errors import ConfigError
from duetto.dialects.dialect import CallDialect
from duetto.dialects.hermes import HERMES
from duetto.dialects.reasoning import REASONING_DIALECTS, THINK, ReasoningDialect

CALL_DIALECTS: tuple[CallDialect, ...] = (HERMES,)

Named = TypeVar("Named", CallDialect, ReasoningDialect)


class Dialects(NamedTuple):
    """What the answers of a model are parsed by; None where there is nothing to parse."""

    calls: CallDialect | None
    reasoning: ReasoningDialect | None


def choose_dialects(
    template: str | None,
    *,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Dialects:
    """The dialects that the template's text shows, unless they are named.

    Raises ConfigError for a name that is not known, and for two that cannot go together.
    """
    calls = (
        _named(tool_call_parser, CALL_DIALECTS, "--tool-call-parser")
        if tool_call_parser
        else _calls_of(template or "")
    )
    reasoning = (
        _named(reasoning_parser, REASONING_DIALECTS, "--reasoning-parser")
        if reasoning_parser
        else _reasoning_of(template or "")
    )
    return _together(calls, reasoning)


def _calls_of(template: str) -> CallDialect | None:
    return HERMES if "<tool_call>" in template else None


def _reasoning_of(template: str) -> ReasoningDialect | None:
    return THINK if "<think>" in template else None


def _together(calls: CallDialect | None, reasoning: ReasoningDialect | None) -> Dialects:
    return Dialects(calls, reasoning)


def _named(name: str, dialects: Sequence[Named], flag: str) -> Named:
    for dialect in dialects:
        if name in (dialect.name, *dialect.aliases):
            return dialect
    known = ", ".join(map(_with_aliases, dialects))
    raise ConfigError(f"{flag}: there is no parser {name!r}; known are: {known}")


def _with_aliases(dialect: CallDialect | ReasoningDialect) -> str:
    others = ", ".join(dialect.aliases)
    return f"{dialect.name} (or {others})" if others else dialect.name
