"""The parser of a whole answer: reasoning first, then content and calls."""

from collections.abc import Iterable, Sequence

from duetto.dialects.dialect import CallDialect
from duetto.dialects.harmony import HARMONY
from duetto.dialects.pieces import AnswerParser, ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.reasoning import HARMONY_REASONING, ReasoningDialect
from duetto.dialects.special_tokens import WithoutSpecialTokens
from duetto.dialects.stepped import SteppedParser


def answer_parser(
    calls: CallDialect | None,
    reasoning: ReasoningDialect | None,
    tools: Sequence[ToolSchema] = (),
    *,
    is_open: bool = False,
    special_tokens: Iterable[str] = (),
) -> AnswerParser:
    """A parser of one answer.

    `is_open`: the prompt has opened the reasoning (`ReasoningDialect.is_open`). `special_tokens`
    are all that the tokenizer has: what of them is no marker is dropped from content and reasoning.
    """
    if reasoning is HARMONY_REASONING:
        calls = HARMONY  # one format: it is read by one parser, with tools or without
    parser: AnswerParser = SteppedParser(
        lambda reader: _answer(reader, calls, reasoning, tools, is_open=is_open)
    )
    dropped = set(special_tokens) - set(markers_of(calls, reasoning))
    return WithoutSpecialTokens(parser, dropped) if dropped else parser


def markers_of(calls: CallDialect | None, reasoning: ReasoningDialect | None) -> tuple[str, ...]:
    """The strings that a parser has to see, also where they are special tokens."""
    of_calls = calls.markers if calls else ()
    return (*of_calls, *(reasoning.markers if reasoning else ()))


def _answer(
    reader: Reader,
    calls: CallDialect | None,
    reasoning: ReasoningDialect | None,
    tools: Sequence[ToolSchema],
    *,
    is_open: bool,
) -> Reading[None]:
    is_apart = calls is None or not calls.reads_reasoning
    if reasoning is not None and is_apart:
        yield from reasoning.steps(reader, is_open=is_open)
    if calls is None:
        yield from reader.rest()
    else:
        yield from calls.read(tools)(reader)
