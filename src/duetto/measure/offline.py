"""What `duetto bench latency` and `throughput` have in common: an LLM in this process.

Knows the LLM only by the protocol below; the command line brings the real one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from duetto.core.outputs import RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.core.timings import Part
from duetto.measure.records import RequestRecord, record_from_timings
from duetto.measure.workload import WorkloadRequest


class OfflineLLM(Protocol):
    def generate(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = ...,
    ) -> list[RequestOutput]: ...


def run_offline(
    llm: OfflineLLM, requests: Sequence[WorkloadRequest], *, use_tqdm: bool = False
) -> list[RequestOutput]:
    """Answer all requests, greedily and to their full length. They all arrive now."""
    prompts: list[str | Mapping[str, Any]] = []
    for request in requests:
        if request.prompt_text is not None:
            prompts.append(request.prompt_text)
        else:
            prompts.append({"prompt_token_ids": list(request.prompt_token_ids or ())})
    params = [
        SamplingParams(temperature=0.0, max_tokens=r.num_output_tokens, ignore_eos=True)
        for r in requests
    ]
    return llm.generate(prompts, params, use_tqdm=use_tqdm)


def records_of(outputs: Sequence[RequestOutput]) -> list[RequestRecord]:
    """One record per answer, from the engine's own instants."""
    return [
        record_from_timings(
            completion.timings,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=completion.finish_reason,
        )
        for output in outputs
        for completion in output.outputs
        if completion.timings is not None
    ]


def mean_parts_s(outputs: Sequence[RequestOutput]) -> dict[str, float]:
    """What an answer's time went to on average (core/timings.py); the sum is the mean E2E."""
    timings = [c.timings for output in outputs for c in output.outputs if c.timings is not None]
    return {
        part.value: sum(t.parts[part] for t in timings) / len(timings) for part in Part if timings
    }
