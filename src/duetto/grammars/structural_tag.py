"""vLLM's structural tags: text in which some parts have a form.

Two notations: the old one, {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, and
XGrammar's, {"format": {"type": ...}}. Refuses what is neither, and what it does not know, with its
place.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from duetto.core.errors import InvalidRequest
from duetto.grammars.json_schema import JsonOptions, prepared_schema
from duetto.grammars.lark import LarkWriter
from duetto.grammars.tags import Tag, free_until_tag, only_tags

# The fields of each type: those that it must have, and those that it may have.
_TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "const_string": (("value",), ()),
    "json_schema": (("json_schema",), ()),
    "regex": (("pattern",), ()),
    "any_text": ((), ()),
    "sequence": (("elements",), ()),
    "or": (("elements",), ()),
    "tag": (("begin", "content", "end"), ()),
    "triggered_tags": (("triggers", "tags"), ("at_least_one", "stop_after_first")),
    "tags_with_separator": (("tags", "separator"), ("at_least_one", "stop_after_first")),
}


class _Reader(NamedTuple):
    """Formats to expressions."""

    lark: LarkWriter
    field: str
    options: JsonOptions

    def refuse(self, place: str, message: str) -> InvalidRequest:
        return InvalidRequest(self.field, f"{place or '$'} {message}")

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.refuse(place, f"must be a text, not {value!r:.60}")
        return value

    def several(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.refuse(place, f"must be a list that is not empty, not {value!r:.60}")
        return value

    def flag(self, given: Mapping[str, Any], name: str, place: str) -> bool:
        value = given.get(name, False)
        if not isinstance(value, bool):
            raise self.refuse(f"{place}.{name}", f"must be true or false, not {value!r:.60}")
        return value

    def schema(self, value: Any, place: str) -> str:
        if not isinstance(value, dict | bool):
            raise self.refuse(place, f"must be a schema, not {value!r:.60}")
        text = json.dumps(value, ensure_ascii=False)
        return self.lark.schema(prepared_schema(text, self.field, self.options))

    def format(self, given: Any, place: str, *, is_last: bool) -> str:
        """`is_last`: nothing follows it."""
        kind = self.checked(given, place)
        if kind == "const_string":
            return self.lark.literal(self.text(given["value"], f"{place}.value"))
        if kind == "json_schema":
            return self.schema(given["json_schema"], f"{place}.json_schema")
        if kind == "regex":
            return self.lark.regex(self.text(given["pattern"], f"{place}.pattern"))
        if kind == "any_text":
            if not is_last:
                raise self.refuse(place, "must stand last, or alone in a tag with an end")
            return self.lark.any_text()
        if kind == "tag":
            return self.lark.rule(only_tags(self.lark, [self.tag(given, place)], only_one=True))
        if kind in ("sequence", "or"):
            return self.elements(given, place, is_last=is_last)
        return self.tags(given, place, is_last=is_last)

    def checked(self, given: Any, place: str) -> str:
        kind = given.get("type") if isinstance(given, dict) else None
        if not isinstance(kind, str) or kind not in _TYPES:
            known = ", ".join(_TYPES)
            raise self.refuse(f"{place}.type", f"is {kind!r:.60}; accepted: {known}")
        needed, possible = _TYPES[kind]
        for name in needed:
            if name not in given:
                raise self.refuse(f"{place}.{name}", "is required")
        for name in given:
            if name not in ("type", *needed, *possible):
                raise self.refuse(f"{place}.{name[:60]}", "is not supported")
        return kind

    def elements(self, given: Mapping[str, Any], place: str, *, is_last: bool) -> str:
        elements = self.several(given["elements"], f"{place}.elements")
        is_sequence, parts = given["type"] == "sequence", []
        for i, one in enumerate(elements):
            ends = is_last and (not is_sequence or i == len(elements) - 1)
            parts.append(self.format(one, f"{place}.elements[{i}]", is_last=ends))
        return self.lark.rule(" ".join(parts) if is_sequence else " | ".join(parts))

    def tags(self, given: Mapping[str, Any], place: str, *, is_last: bool) -> str:
        found = []
        for i, one in enumerate(self.several(given["tags"], f"{place}.tags")):
            at = f"{place}.tags[{i}]"
            whole = {"type": "tag", **one} if isinstance(one, dict) else one
            if self.checked(whole, at) != "tag":
                raise self.refuse(at, "must be a tag")
            found.append(self.tag(whole, at))
        at_least_one = self.flag(given, "at_least_one", place)
        only_one = self.flag(given, "stop_after_first", place)
        if given["type"] == "tags_with_separator":
            separator = self.text(given["separator"], f"{place}.separator")
            asked = only_tags(
                self.lark, found, separator, at_least_one=at_least_one, only_one=only_one
            )
            return self.lark.rule(asked)
        if not is_last:
            raise self.refuse(place, "triggered_tags must stand last, as any text may follow")
        triggers = self.triggers(given["triggers"], found, place)
        return free_until_tag(
            self.lark, found, triggers, at_least_one=at_least_one, only_one=only_one
        )

    def triggers(self, given: Any, tags: list[Tag], place: str) -> list[str]:
        triggers = [
            self.text(one, f"{place}.triggers[{i}]")
            for i, one in enumerate(self.several(given, f"{place}.triggers"))
        ]
        for tag in tags:
            if not any(one and tag.begin.startswith(one) for one in triggers):
                raise self.refuse(f"{place}.triggers", f"none begins {tag.begin!r:.60}")
        return [one for one in triggers if any(tag.begin.startswith(one) for tag in tags)]

    def tag(self, given: Mapping[str, Any], place: str) -> Tag:
        begin = self.text(given["begin"], f"{place}.begin")
        end = self.text(given["end"], f"{place}.end")
        content, at = given["content"], f"{place}.content"
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            self.checked(content, at)
            return Tag(begin, self.lark.until(end))
        return Tag(begin, self.format(content, at, is_last=False), end)


def structural_tag(lark: LarkWriter, given: Any, field: str, options: JsonOptions) -> str:
    """The expression of a structural tag. Raises InvalidRequest, naming `field`."""
    reader = _Reader(lark, field, options)
    if not isinstance(given, dict):
        raise reader.refuse("$", f"must be an object, not {given!r:.60}")
    given = {name: value for name, value in given.items() if name != "type"}
    if given.keys() == {"format"}:
        return reader.format(given["format"], "$.format", is_last=True)
    if given.keys() != {"structures", "triggers"}:
        raise reader.refuse("$", "must have format, or structures and triggers")
    tags = []
    for i, one in enumerate(reader.several(given["structures"], "$.structures")):
        if not isinstance(one, dict) or one.keys() != {"begin", "schema", "end"}:
            raise reader.refuse(f"$.structures[{i}]", "must have begin, schema and end")
        begin = reader.text(one["begin"], f"$.structures[{i}].begin")
        end = reader.text(one["end"], f"$.structures[{i}].end")
        tags.append(Tag(begin, reader.schema(one["schema"], f"$.structures[{i}].schema"), end))
    return free_until_tag(lark, tags, reader.triggers(given["triggers"], tags, "$"))
