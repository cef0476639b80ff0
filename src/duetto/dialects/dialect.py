"""What a dialect of calls is: its parser, and what a grammar needs to write the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    opening: str = ""  # before the first key
    closing: str = ""  # behind the last value
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
    begins_answer: bool = False  # calls are known only at the beginning of a line
    reads_reasoning: bool = False  # calls and reasoning are one format

    def parser(self, tools: Sequence[ToolSchema]) -> AnswerParser:
        """A parser of one answer without reasoning."""
        return SteppedParser(self.read(tools))
