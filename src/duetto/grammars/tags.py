"""Texts with tagged parts: calls of tools among free text, or alone, and reasoning before either.

What dialects and structural tags are made of. Each function returns an expression of the writer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from duetto.grammars.json_schema import JsonOptions, prepared_schema
from duetto.grammars.lark import LarkWriter

_SPACE_AFTER_REASONING = r"/[\x20\t\r\n]{1,8}/"


class Tag(NamedTuple):
    """A part of an answer with a form."""

    begin: str  # a text, which may hold special tokens
    content: str  # an expression
    end: str = ""


class ReasoningMarks(NamedTuple):
    """Free text before the rest of an answer, and between what it stands."""

    begin: str
    end: str
    has_begun: bool = False  # the prompt ends with `begin`


def json_content(
    lark: LarkWriter,
    schema: Mapping[str, Any],
    field: str,
    options: JsonOptions = JsonOptions(),  # noqa: B008  # frozen
) -> str:
    """JSON by a schema. Raises InvalidRequest, naming `field`."""
    return lark.schema(prepared_schema(json.dumps(schema, ensure_ascii=False), field, options))


def free_until_tag(
    lark: LarkWriter,
    tags: Sequence[Tag],
    triggers: Sequence[str] = (),
    *,
    at_least_one: bool = False,
    only_one: bool = False,
    last: str | None = None,
) -> str:
    """Any text; but what begins with a trigger goes on as a tag that begins with it. By default
    each tag's own beginning is one. `last` is what follows the tags, by default any text; after
    `only_one` tag nothing does."""
    groups: dict[str, list[Tag]] = {}
    for tag in tags:
        trigger = next((t for t in triggers if tag.begin.startswith(t)), tag.begin)
        groups.setdefault(trigger, []).append(tag)
    choices = []
    for trigger, own in groups.items():
        rests = [
            _joined(
                lark.literal(tag.begin[len(trigger) :]) if len(tag.begin) > len(trigger) else "",
                tag.content,
                lark.literal(tag.end) if tag.end else "",
            )
            for tag in own
        ]
        choices.append(lark.rule(f"{lark.until(trigger)} {lark.one_of(rests)}"))
    one, end = lark.one_of(choices), lark.any_text() if last is None else last
    if only_one:
        return one if at_least_one else f"({one} | {end})"
    return f"{one}{'+' if at_least_one else '*'} {end}"


def only_tags(
    lark: LarkWriter,
    tags: Sequence[Tag],
    separator: str = "",
    *,
    at_least_one: bool = True,
    only_one: bool = False,
) -> str:
    """Tags and nothing else."""
    each = [
        lark.rule(_joined(lark.literal(tag.begin), tag.content, lark.literal(tag.end)))
        for tag in tags
    ]
    one = lark.one_of(each)
    several = one if only_one else f"{one} ({_joined(lark.literal(separator), one)})*"
    return several if at_least_one else f"({several})?"


def reasoning_first(lark: LarkWriter, marks: ReasoningMarks, rest: str) -> str:
    """Free text between its marks, if there is any, and then `rest`."""
    space = lark.rule(_SPACE_AFTER_REASONING)
    thought = f"{lark.until(marks.end)} {space}?"
    if marks.has_begun:
        return f"{thought} {rest}"
    return f"({lark.literal(marks.begin)} {thought})? {rest}"


def _joined(*parts: str) -> str:
    return " ".join([part for part in parts if part and part != '""']) or '""'
