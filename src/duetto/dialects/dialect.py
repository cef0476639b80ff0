"""What a dialect of calls is: its parser, and what a grammar needs to write the same."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duetto.dialects.pieces import AnswerParser, ToolSchema
from duetto.dialects.stepped import Read, SteppedParser


@dataclass(frozen=True)
class ArgumentForm:
    """How arguments are written that are not JSON: a sequence of keys and values.

    Values are JSON, but for strings that are quoted otherwise.
    """

    before_key: str
    after_key: str
    after_value: str
    separator: str
    string_quote: str = '"'  # "" for strings that end where `after_value` begins
    quotes_inner_strings: bool = True  # the quote is that of strings within lists and objects too


@dataclass(frozen=True)
class CallForm:
    """How calls are written, as a grammar has to write them:

    opening, (before_name, name, before_arguments, arguments, after_arguments) ..., closing
    """

    before_name: str
    before_arguments: str
    after_arguments: str
    opening: str = ""
    closing: str = ""
    separator: str | None = None  # between two calls; None where only one may be made
    arguments: ArgumentForm | None = None  # None: JSON

    @property
    def trigger(self) -> str:
        """What tells a reader that a call begins: from here on the text is not free."""
        return self.opening or self.before_name


@dataclass(frozen=True)
class CallDialect:
    """How one family of models writes calls."""

    name: str
    read: Callable[[Sequence[ToolSchema]], Read]
    form: CallForm
    markers: tuple[str, ...]  # what its parser has to see, also where a marker is a special token
    aliases: tuple[str, ...] = ()  # other names that `--tool-call-parser` takes
    begins_line: bool = False  # no marker tells a call: it is known where it begins a line
    reads_reasoning: bool = False  # calls and reasoning are one format

    def parser(self, tools: Sequence[ToolSchema]) -> AnswerParser:
        """A parser of one answer without reasoning."""
        return SteppedParser(self.read(tools))


def calls_text(form: CallForm, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How calls look that a model of this family makes: names and arguments."""
    texts = (
        f"{form.before_name}{name}{form.before_arguments}"
        f"{_arguments_text(form.arguments, arguments)}{form.after_arguments}"
        for name, arguments in calls
    )
    return form.opening + (form.separator or "").join(texts) + form.closing


def _arguments_text(form: ArgumentForm | None, arguments: Mapping[str, Any]) -> str:
    if form is None:
        return json.dumps(arguments, ensure_ascii=False)
    return form.separator.join(
        f"{form.before_key}{key}{form.after_key}{_value_text(form, value)}{form.after_value}"
        for key, value in arguments.items()
    )


def _value_text(form: ArgumentForm, value: Any) -> str:
    quote = form.string_quote
    if isinstance(value, str) and quote != '"':
        return f"{quote}{value}{quote}"
    if not form.quotes_inner_strings or quote == '"':
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        members = (f"{key}:{_value_text(form, inner)}" for key, inner in value.items())
        return f"{{{','.join(members)}}}"
    if isinstance(value, list):
        return f"[{','.join(_value_text(form, inner) for inner in value)}]"
    return json.dumps(value)
