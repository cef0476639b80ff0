"""An answer in the terminal: streamed as it comes, and its timings in one line."""

from collections.abc import Callable, Mapping
from typing import Any

from duetto.cli.interrupt import first_interrupt
from duetto.cli.output import print_json
from duetto.core.draft_counts import tokens_per_step
from duetto.core.errors import EngineError
from duetto.core.outputs import RequestOutput
from duetto.core.request import FinishReason
from duetto.core.sampling_params import SamplingParams
from duetto.core.timings import RequestTimings
from duetto.llm import LLM
from duetto.measure.metrics import JsonValue


def print_answer(
    llm: LLM,
    make_prompt: Callable[[], Mapping[str, Any]],
    params: SamplingParams,
    *,
    as_json: bool = False,
) -> RequestOutput:
    """Print the text as it becomes certain, or at the end as JSON; return the finished answer.

    Ctrl-C ends the answer as it is, also while the prompt is made: its finish_reason is then
    "abort". Raises EngineError if the engine failed on it.
    """
    num_printed = 0
    output = None
    with first_interrupt() as llm.is_stopped:
        for output in llm.stream(make_prompt(), params):
            text = output.outputs[0].text
            if not as_json:
                print(text[num_printed:], end="", flush=True)
            num_printed = len(text)
    if not as_json:
        print()
    assert output is not None, "every request ends in a final update"
    if output.outputs[0].error is not None:
        raise EngineError(output.outputs[0].error)
    if as_json:
        print_json(answer_json(output))
    return output


def was_interrupted(output: RequestOutput) -> bool:
    return output.outputs[0].finish_reason == FinishReason.ABORT.value


def answer_json(output: RequestOutput) -> dict[str, JsonValue]:
    """A finished answer, its counts and its timings."""
    answer, timings = output.outputs[0], output.outputs[0].timings
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": len(answer.token_ids),
        "ttft_ms": _ms(timings.ttft_s if timings else None),
        "tpot_ms": _ms(timings.tpot_s if timings else None),
        **_drafts_json(timings),
    }


def _drafts_json(timings: RequestTimings | None) -> dict[str, JsonValue]:
    """llama.cpp's names; nothing where no drafts ran."""
    if timings is None or timings.speculation is None:
        return {}
    count = timings.speculation.total
    return {"draft_n": count.num_proposed, "draft_n_accepted": count.num_accepted}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


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
    parts += _drafts(timings)
    parts.append(f"ended by {answer.finish_reason}")
    return "[" + ", ".join(parts) + "]"


def _drafts(timings: RequestTimings) -> list[str]:
    """What speculation did, if it tried anything."""
    told = timings.speculation
    if told is None or not told.total.num_proposed:
        return []
    count = told.total
    per_step = tokens_per_step(len(timings.token_times), count.num_accepted) or 1.0
    return [
        f"{count.num_accepted} of {count.num_proposed} drafts accepted "
        f"({per_step:.2f} tokens a step)"
    ]
