"""Tools in `duetto chat`: their definitions from a file, calls as they are made, results as typed.

Nothing is called here: the user is who answers.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from duetto.cli.interrupt import first_interrupt
from duetto.cli.stdin import read_line
from duetto.core.errors import ConfigError, EngineError
from duetto.core.outputs import RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.dialects.pieces import (
    AnswerPiece,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
)
from duetto.llm import LLM
from duetto.server.apis.protocol import Tools
from duetto.server.apis.reading import decode
from duetto.server.apis.tool_names import check_tool_names
from duetto.server.http.errors import ApiError

DECLINED = "The user declined this call."
CUT_OFF = "[a call was cut off by --max-tokens, and is forgotten]"


class _ToolsFile(msgspec.Struct):
    tools: Tools


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Definitions as OpenAI has them, in a list. Raises ConfigError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--tools: {path} cannot be read: {error.strerror}") from None
    try:
        msgspec.json.decode(text)  # so that it ends within what is put around it
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"--tools: {path} is not valid JSON in UTF-8") from None
    try:
        found = decode(b'{"tools": %b}' % text, _ToolsFile).tools
        check_tool_names([tool.function.name for tool in found], "tools[{}].function.name")
    except ApiError as error:
        raise ConfigError(f"--tools: {error.message}") from None
    if not found:
        raise ConfigError(f"--tools: {path} defines none")
    return [tool.shown() for tool in found]


def print_said(
    llm: LLM,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    tools: list[dict[str, Any]],
) -> RequestOutput:
    """Print text and calls as they become certain; return the finished answer. Ctrl-C ends it as
    it is. Raises EngineError if the engine failed on it."""
    output = None
    with first_interrupt() as llm.is_stopped:
        for grown, pieces in llm.stream_chat(messages, params, tools=tools):
            print(shown(pieces), end="", flush=True)
            output = grown
    print()
    assert output is not None, "every request ends in a final update"
    if output.outputs[0].error is not None:
        raise EngineError(output.outputs[0].error)
    return output


def shown(pieces: Iterable[AnswerPiece]) -> str:
    """As a terminal shows them: a call as name(arguments) on a line of its own."""
    texts = []
    for piece in pieces:
        match piece:
            case Content(text) | Reasoning(text) | CallArguments(_, text):
                texts.append(text)
            case CallStart(_, name):
                texts.append(f"\n{name}(")
            case CallEnd(_, is_complete):
                texts.append(")" if is_complete else "…")
    return "".join(texts)


def without_cut_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments do not parse cannot go back into a conversation."""
    calls = message.get("tool_calls", [])
    whole = [call for call in calls if _parses(call["function"]["arguments"])]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    if len(whole) < len(calls):
        print(CUT_OFF, file=sys.stderr)
    if whole:
        return {**kept, "tool_calls": whole}
    return {**kept, "content": kept["content"] or ""}


def results_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the user types for each call; an empty line declines it. Raises EOFError."""
    return [
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "content": read_line(f"result of {call['function']['name']}> ").strip() or DECLINED,
        }
        for call in message.get("tool_calls", [])
    ]


def _parses(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False
