"""`duetto chat`: a conversation in the terminal, in this process."""

import re
import sys
from typing import Annotated

from cyclopts import Parameter

from duetto.cli.default_model import open_llm
from duetto.cli.interrupt import INTERRUPTED
from duetto.cli.output import JsonFlag
from duetto.cli.stdin import read_line
from duetto.cli.stream import print_answer, stats_line, was_interrupted
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError, EngineError, InvalidRequest
from duetto.core.outputs import RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM

HELP = (
    "A line is a message. /clear forgets the conversation, /exit (or end of input) leaves; Ctrl-C "
    "ends an answer, and at the prompt the program."
)
INTERRUPTED_ANSWER = "[interrupted: what was said so far stays in the conversation]"
INTERRUPTED_QUESTION = "[interrupted before a word was said: the message is forgotten]"
_COMMAND = re.compile(r"/[\w-]+")  # the whole line: "/etc/hosts has what?" is a message


def chat(
    model: str | None = None,
    *,
    system_prompt: str | None = None,
    quick: Annotated[str | None, Parameter(alias="-q")] = None,
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
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    start = [{"role": "system", "content": system_prompt}] if system_prompt else []
    with open_llm(model, args) as llm:
        if quick is not None:
            quick_turn = [*start, {"role": "user", "content": quick}]
            if was_interrupted(_answer(llm, quick_turn, params, stats, as_json)):
                sys.exit(INTERRUPTED)
            return
        _converse(llm, start, params, stats)


def _converse(llm: LLM, start: list[dict[str, str]], params: SamplingParams, stats: bool) -> None:
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
            output = _answer(llm, turn, params, stats)
        except (InvalidRequest, EngineError) as error:  # too long, say: go on without it
            print(f"duetto: {error}", file=sys.stderr)
        else:
            text = output.outputs[0].text
            if was_interrupted(output):
                print(INTERRUPTED_ANSWER if text else INTERRUPTED_QUESTION, file=sys.stderr)
            if text or not was_interrupted(output):
                messages = [*turn, {"role": "assistant", "content": text}]


def _answer(
    llm: LLM,
    messages: list[dict[str, str]],
    params: SamplingParams,
    stats: bool,
    as_json: bool = False,
) -> RequestOutput:
    output = print_answer(llm, lambda: llm.chat_prompt(messages), params, as_json=as_json)
    if stats and not as_json:
        print(stats_line(output), file=sys.stderr)
    return output
