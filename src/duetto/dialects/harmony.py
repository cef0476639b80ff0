"""gpt-oss: messages with a header that names their channel and, of a call, the function.

    <|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary
     to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(A space, not a line break, is before `to=`.) Source: openai/harmony, docs/format.md. `analysis` is
reasoning; `final` and what is said in `commentary` are content. The recipient may stand before the
channel, too. An answer that begins without a header is content. A header that says something else
is content, and so is its message.
"""

import re
from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.pieces import Content, Reasoning, ToolSchema
from duetto.dialects.reader import NotACall, Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_MARKERS = Markers(_START, _CHANNEL, *_ENDS)
_HEADER_ENDS = Markers(_MESSAGE, *_ENDS, _START)
_END_WORDS = Words(_ENDS)
_MOST_HEADER = 256
_TO = r"to=functions\.(?P<{}>[^\s<]+)"
_HEADER = re.compile(
    rf"(?:<\|start\|>assistant)?\s*(?:{_TO.format('before')})?\s*"
    rf"<\|channel\|>(?P<channel>analysis|commentary|final)\s*(?:{_TO.format('behind')})?\s*"
    r"(?:(?:<\|constrain\|>)?\s*\w+)?\s*"
)


def _read(tools: Sequence[ToolSchema]) -> Read:
    names = {tool.name for tool in tools}

    def read(reader: Reader) -> Reading[None]:
        kind: type[Content] | type[Reasoning] = Content
        while (marker := (yield from reader.text_until(_MARKERS, kind))) is not None:
            kind = Content
            if marker in _ENDS:
                yield from reader.marker_ends()
                continue
            try:
                kind = yield from _header_on(reader, marker, names)
            except NotACall as why:
                reader.give_back(why)

    return read


def _header_on(
    reader: Reader, begun: str, names: set[str]
) -> Reading[type[Content] | type[Reasoning]]:
    """A header whose first marker has been read, and the call if it is one's.

    What kind of text comes behind.
    """
    reader.expect_end()
    text, end = yield from reader.upto(_HEADER_ENDS, _MOST_HEADER)
    header = _HEADER.fullmatch(begun + text)
    if header is None or end != _MESSAGE:
        raise NotACall
    name = header["behind"] or header["before"]
    if name is None:
        yield from reader.marker_ends()
        return Reasoning if header["channel"] == "analysis" else Content
    if name not in names:
        raise NotACall
    yield from reader.spaces()
    yield from reader.json_arguments(name)
    yield from reader.marker_ends()
    if (yield from reader.peek()) == "<":
        yield from reader.expect(_END_WORDS)
        yield from reader.marker_ends()
    return Content


HARMONY = CallDialect(
    name="openai",
    read=_read,
    form=CallForm(
        before_name="<|channel|>commentary to=functions.",
        before_arguments=" <|constrain|>json<|message|>",
        after_arguments="<|call|>",
    ),
    markers=(_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS),
    aliases=("harmony", "openai_gptoss"),
    reads_reasoning=True,
)
