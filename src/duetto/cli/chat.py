"""`duetto chat`: a conversation in the terminal, in this process."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from duetto.cli.chat_tools import print_said, read_tools, results_of, without_cut_calls
from duetto.cli.default_model import open_llm
from duetto.cli.interrupt import INTERRUPTED
from duetto.cli.output import JsonFlag
from duetto.cli.stdin import read_line
from duetto.cli.stream import print_answer, stats_line, was_interrupted
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError, EngineError, InvalidRequest
from duetto.core.outputs import RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM, ChatMessage

HELP = (
    "A line is a message. /clear forgets the conversation, /exit (or end of input) leaves; Ctrl-C "
    "ends an answer, and at the prompt the program."
)
INTERRUPTED_ANSWER = "[interrupted: what was said so far stays in the conversation]"
INTERRUPTED_QUESTION = "[interrupted before a word was said: the message is forgotten]"
_COMMAND = re.compile(r"/[\w-]+")  # the whole line: "/etc/hosts has what?" is a message


@dataclass(frozen=True, slots=True)
class _Asking:
    """What is the same for all messages."""

    params: SamplingParams
    shows_stats: bool
    tools: list[dict[str, Any]]


def chat(
    model: str | None = None,
    *,
    system_prompt: str | None = None,
    quick: Annotated[str | None, Parameter(alias="-q")] = None,
    tools: Path | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stats: bool = True,
    as_json: JsonFlag = False,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Talk with a model. The conversation so far is reused from the prefix cache at every turn.

    Parameters
    ----------
    model
        A checkpoint directory with a chat template, or org/name on the Hugging Face hub; by default
        the small reader that ships with Duetto.
    system_prompt
        What the model is told first.
    quick
        Answer this one message and leave.
    tools
        A JSON file with definitions of tools, as OpenAI's API has them. Calls are shown as the
        model makes them; what you type is the result, and an empty line declines.
    max_tokens
        The most tokens of an answer.
    temperature
        0 is greedy.
    top_p
        Keep the likeliest tokens of this total probability.
    stats
        Print counts and timings to stderr after each answer.
    as_json
        With --quick: the last line of stdout is one JSON document: the text, counts and timings.
    """
    if as_json and quick is None:
        raise ConfigError("--json: needs --quick; a conversation is not one document")
    if tools is not None and quick is not None:
        raise ConfigError("--tools: not with --quick; the results of calls are typed")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    asking = _Asking(params, stats, [] if tools is None else read_tools(tools))
    start: list[ChatMessage] = (
        [{"role": "system", "content": system_prompt}] if system_prompt else []
    )
    with open_llm(model, args) as llm:
        if quick is not None:
            quick_turn: list[ChatMessage] = [*start, {"role": "user", "content": quick}]
            if was_interrupted(_answer(llm, quick_turn, asking, as_json=as_json)):
                sys.exit(INTERRUPTED)
            return
        if asking.tools:  # a template that shows none is told at once
            llm.chat_prompt([{"role": "user", "content": "?"}], tools=asking.tools)
        _converse(llm, start, asking)


def _converse(llm: LLM, start: list[ChatMessage], asking: _Asking) -> None:
    print(HELP, file=sys.stderr)
    messages = list(start)
    while True:
        try:
            line = read_line("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/clear":
            messages = list(start)
            continue
        if not line:
            continue
        if _COMMAND.fullmatch(line):
            print(f"duetto: there is no {line}. {HELP}", file=sys.stderr)
            continue
        turn = [*messages, {"role": "user", "content": line}]
        try:
            messages = _turn(llm, turn, asking) or messages
        except (InvalidRequest, EngineError) as error:  # too long, say: go on without it
            print(f"duetto: {error}", file=sys.stderr)
        except EOFError:  # instead of a call's result
            return


def _turn(llm: LLM, turn: list[ChatMessage], asking: _Asking) -> list[ChatMessage] | None:
    """The conversation with the answer to its last message, and with calls, their results and the
    answers to these. None: nothing was said before the user ended it."""
    while True:
        output = _answer(llm, turn, asking)
        answer = output.outputs[0]
        message = answer.message or {"role": "assistant", "content": answer.text}
        if was_interrupted(output):
            text = message["content"]
            print(INTERRUPTED_ANSWER if text else INTERRUPTED_QUESTION, file=sys.stderr)
            return [*turn, {"role": "assistant", "content": text}] if text else None
        message = without_cut_calls(message)
        turn = [*turn, message]
        if "tool_calls" not in message:
            return turn
        turn += results_of(message)


def _answer(
    llm: LLM, messages: list[ChatMessage], asking: _Asking, *, as_json: bool = False
) -> RequestOutput:
    if asking.tools:
        output = print_said(llm, messages, asking.params, asking.tools)
    else:
        output = print_answer(
            llm, lambda: llm.chat_prompt(messages), asking.params, as_json=as_json
        )
    if asking.shows_stats and not as_json:
        print(stats_line(output), file=sys.stderr)
    return output
