"""Which dialects a model speaks: read from its chat template, or named by the user."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from duetto.core.errors import ConfigError
from duetto.dialects.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from duetto.dialects.dialect import CallDialect
from duetto.dialects.gemma import FUNCTION_GEMMA, GEMMA_4, TOOL_CODE
from duetto.dialects.generic import GENERIC
from duetto.dialects.granite import GRANITE
from duetto.dialects.harmony import HARMONY
from duetto.dialects.hermes import HERMES
from duetto.dialects.llama_json import LLAMA_JSON
from duetto.dialects.mistral import MISTRAL, MISTRAL_LIST
from duetto.dialects.phi import PHI
from duetto.dialects.pythonic import PYTHONIC
from duetto.dialects.qwen_xml import QWEN_XML, SEED_XML
from duetto.dialects.reasoning import (
    GEMMA_REASONING,
    GRANITE_REASONING,
    HARMONY_REASONING,
    MISTRAL_REASONING,
    REASONING_DIALECTS,
    SEED_REASONING,
    THINK,
    ReasoningDialect,
)

CALL_DIALECTS = (
    HERMES,
    QWEN_XML,
    SEED_XML,
    LLAMA_JSON,
    PYTHONIC,
    MISTRAL,
    MISTRAL_LIST,
    PHI,
    FUNCTION_GEMMA,
    GEMMA_4,
    TOOL_CODE,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    HARMONY,
    GRANITE,
    GENERIC,
)
# A template speaks the first dialect all of whose strings it contains.
_SIGNS_OF_CALLS: tuple[tuple[CallDialect, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>", "tools")),
    (DEEPSEEK_V3, ("<｜tool▁calls▁begin｜>", "```json")),
    (DEEPSEEK_V31, ("<｜tool▁calls▁begin｜>",)),
    (MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    (MISTRAL_LIST, ("[TOOL_CALLS]",)),
    (FUNCTION_GEMMA, ("<start_function_call>",)),
    (GEMMA_4, ("<|tool_call>", "<tool_call|>")),
    (TOOL_CODE, ("```tool_code",)),
    (SEED_XML, ("<seed:tool_call>",)),
    (QWEN_XML, ("<function=", "<parameter=")),
    (PHI, ("<|tool_call|>", "<|/tool_call|>")),
    (PHI, ("<|tool|>", "<|/tool|>")),
    (PHI, ("functools[",)),
    (HERMES, ("<tool_call>", "</tool_call>")),
    (GRANITE, ("<|tool_call|>",)),
    (GRANITE, ("<tool_call>",)),
    (GRANITE, ("<function_call>",)),
    (PYTHONIC, ("func_name1(",)),
    (LLAMA_JSON, ('"parameters": dictionary of argument name',)),
    (PYTHONIC, ("<|python_start|>",)),
    (LLAMA_JSON, ("<|python_tag|>",)),
    (GENERIC, ("tools",)),
)
_SIGNS_OF_REASONING: tuple[tuple[ReasoningDialect, tuple[str, ...]], ...] = (
    (HARMONY_REASONING, ("<|channel|>", "<|message|>")),
    (SEED_REASONING, ("<seed:think>",)),
    (MISTRAL_REASONING, ("[THINK]",)),
    (GEMMA_REASONING, ("<|channel>thought",)),
    (THINK, ("</think>",)),
    (THINK, ("<think>",)),
    (GRANITE_REASONING, ("thought process:", "my response:")),
    (GRANITE_REASONING, ("thought process", "Here is my response")),
)

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
    found = Dialects(
        _first(template or "", _SIGNS_OF_CALLS), _first(template or "", _SIGNS_OF_REASONING)
    )
    calls, reasoning = found
    if tool_call_parser is not None:
        calls = _named(tool_call_parser, CALL_DIALECTS, "--tool-call-parser")
    if reasoning_parser is not None:
        reasoning = _named(reasoning_parser, REASONING_DIALECTS, "--reasoning-parser")
    if calls is HARMONY and reasoning_parser is None:
        reasoning = HARMONY_REASONING
    if reasoning is HARMONY_REASONING and tool_call_parser is None:
        calls = HARMONY
    if (calls is HARMONY) != (reasoning is HARMONY_REASONING):
        raise ConfigError(
            "--tool-call-parser and --reasoning-parser: harmony writes calls and reasoning in one "
            f"format, so {HARMONY.name!r} and {HARMONY_REASONING.name!r} go only together"
        )
    return Dialects(calls, reasoning)


def _first(template: str, signs: Sequence[tuple[Named, tuple[str, ...]]]) -> Named | None:
    return next((dialect for dialect, all_of in signs if _has(template, all_of)), None)


def _has(template: str, strings: tuple[str, ...]) -> bool:
    return all(string in template for string in strings)


def _named(name: str, dialects: Sequence[Named], flag: str) -> Named:
    for dialect in dialects:
        if name == dialect.name or name in dialect.aliases:
            return dialect
    known = ", ".join(map(_with_aliases, dialects))
    raise ConfigError(f"{flag}: there is no parser {name!r}; known are: {known}")


def _with_aliases(dialect: CallDialect | ReasoningDialect) -> str:
    others = ", ".join(dialect.aliases)
    return f"{dialect.name} (or {others})" if others else dialect.name
