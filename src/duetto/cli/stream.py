"""An answer in the terminal: streamed as it comes, and its timings in one line."""

from collections.abc import Mapping
from typing import Any

from duetto.core.errors import EngineError
from duetto.core.outputs import RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM


def print_answer(llm: LLM, prompt: Mapping[str, Any], params: SamplingParams) -> RequestOutput:
    """Print the text as it becomes certain; return the finished answer.

    Raises EngineError if the engine failed on it.
    """
    num_printed = 0
    output = None
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        print(text[num_printed:], end="", flush=True)
        num_printed = len(text)
    print()
    assert output is not None, "every request ends in a final update"
    if output.outputs[0].error is not None:
        raise EngineError(output.outputs[0].error)
    return output


def stats_line(output: RequestOutput) -> str:
    """The counts and timings of a finished answer, for a person."""
    answer = output.outputs[0]
    timings = answer.timings
    if timings is None or timings.ttft_s is None:
        return f"[{answer.finish_reason}: nothing was generated]"
    parts = [
        f"{len(output.prompt_token_ids)} prompt tokens ({output.num_cached_tokens} cached)",
        f"{len(answer.token_ids)} generated",
        f"TTFT {timings.ttft_s * 1e3:.1f} ms",
    ]
    if timings.tpot_s is not None:
        parts.append(f"TPOT {timings.tpot_s * 1e3:.2f} ms ({1 / timings.tpot_s:.1f} tokens/s)")
    parts.append(f"ended by {answer.finish_reason}")
    return "[" + ", ".join(parts) + "]"
