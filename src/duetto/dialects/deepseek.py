"""DeepSeek V3, R1-0528 (JSON in a fence) and V3.1 (bare JSON), between tokens of their own.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>
    {"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

(V3.1 breaks no line before the arguments.) Source: the chat templates of deepseek-ai,
"deepseek_v3" and "deepseek_v31" in vLLM's documentation of tool calling.
"""

from collections.abc import Sequence

from duetto.dialects.dialect import CallDialect, CallForm
from duetto.dialects.json_calls import calls_in
from duetto.dialects.pieces import ToolSchema
from duetto.dialects.reader import Reader, Reading
from duetto.dialects.stepped import Read
from duetto.dialects.words import Markers, Words

_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_TOKENS = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEPARATOR)
_MARKERS = Markers(_CALLS_BEGIN)
_BEGINS = Words([_CALL_BEGIN])
_ENDS = Words([_CALL_END])
_GOES_ON = Words([_CALL_BEGIN, _CALLS_END])
_SEPARATORS = Words([_SEPARATOR])
_FUNCTION = Words([f"function{_SEPARATOR}"])
_FENCE = Words(["```json"])
_FENCE_END = Words(["```"])


def _fenced(reader: Reader, names: Words) -> Reading[None]:
    yield from reader.expect(_FUNCTION)
    name = yield from reader.expect(names)
    yield from reader.spaces()
    yield from reader.expect(_FENCE)
    yield from reader.spaces()
    yield from reader.json_arguments(name)
    yield from reader.spaces()
    yield from reader.expect(_FENCE_END)


def _bare(reader: Reader, names: Words) -> Reading[None]:
    name = yield from reader.expect(names)
    yield from reader.expect(_SEPARATORS)
    yield from reader.spaces()
    yield from reader.json_arguments(name)


def _dialect(name: str, form: CallForm, *, is_fenced: bool) -> CallDialect:
    def read(tools: Sequence[ToolSchema]) -> Read:
        names = Words(tool.name for tool in tools)

        def behind(reader: Reader, _marker: str) -> Reading[None]:
            yield from reader.spaces()
            yield from reader.expect(_BEGINS)
            while True:
                yield from (_fenced if is_fenced else _bare)(reader, names)
                yield from reader.spaces()
                yield from reader.expect(_ENDS)
                yield from reader.marker_ends()
                if (yield from reader.expect(_GOES_ON)) == _CALLS_END:
                    break
                reader.expect_call()
            yield from reader.marker_ends()

        return lambda reader: calls_in(reader, _MARKERS, behind)

    return CallDialect(name=name, read=read, form=form, markers=_TOKENS)


DEEPSEEK_V3 = _dialect(
    "deepseek_v3",
    CallForm(
        opening=_CALLS_BEGIN,
        before_name=f"{_CALL_BEGIN}function{_SEPARATOR}",
        before_arguments="\n```json\n",
        after_arguments=f"\n```{_CALL_END}",
        separator="\n",
        closing=_CALLS_END,
    ),
    is_fenced=True,
)
DEEPSEEK_V31 = _dialect(
    "deepseek_v31",
    CallForm(
        opening=_CALLS_BEGIN,
        before_name=_CALL_BEGIN,
        before_arguments=_SEPARATOR,
        after_arguments=_CALL_END,
        separator="",
        closing=_CALLS_END,
    ),
    is_fenced=False,
)
