"""`duetto complete`: continue a text, in this process."""

import sys
from typing import Annotated

from cyclopts import Parameter

from duetto.build import EngineArgs
from duetto.cli.default_model import model_or_demo
from duetto.cli.stdin import read_stdin
from duetto.cli.stream import print_answer, stats_line
from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM


def complete(
    model: str | None = None,
    prompt: str | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    ignore_eos: bool = False,
    stats: bool = True,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Continue a text and stream it to stdout.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    prompt
        The text to continue; read from stdin if left out.
    max_tokens
        The most tokens to generate.
    temperature
        0 is greedy.
    top_p
        Keep the likeliest tokens of this total probability.
    top_k
        Keep this many of the likeliest tokens; 0 keeps all.
    stop
        Texts that end the answer.
    ignore_eos
        Go on after the end of sequence.
    stats
        Print counts and timings to stderr at the end.
    """
    text = read_stdin() if prompt is None else prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with LLM(model_or_demo(model), args=args) as llm:
        output = print_answer(llm, {"prompt": text}, params)
    if stats:
        print(stats_line(output), file=sys.stderr)
