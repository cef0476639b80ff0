"""Latency and throughput against an LLM made of arithmetic, and the table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from duetto.cli.report import print_parts, print_report
from duetto.core.draft_counts import Chains
from duetto.core.errors import ConfigError
from duetto.core.outputs import CompletionOutput, RequestOutput
from duetto.core.sampling_params import SamplingParams
from duetto.core.timings import Part, RequestTimings
from duetto.measure.latency import LatencyPlan, measure_latency
from duetto.measure.metrics import SLO, Report
from duetto.measure.offline import mean_parts_s
from duetto.measure.throughput import measure_throughput
from duetto.measure.workload import Lengths, Workload, WorkloadRequest, random_workload


class CountingLLM:
    """Answers every prompt with max_tokens tokens, one "second" apart after two of waiting."""

    def __init__(self, finish_reason: str = "length") -> None:
        self.finish_reason = finish_reason
        self.calls: list[list[str | Mapping[str, Any]]] = []
        self.params: list[SamplingParams] = []

    def generate(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        self.calls.append(list(prompts))
        self.params += sampling_params
        return [self._answer(*each) for each in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: str | Mapping[str, Any], params: SamplingParams) -> RequestOutput:
        assert params.max_tokens is not None
        timings = RequestTimings(arrival_time=100.0)
        timings.account(Part.WAITING, 102.0)
        timings.token_times = [102.0 + i for i in range(params.max_tokens)]
        timings.finish_time = timings.token_times[-1]
        timings.account(Part.DECODE, timings.finish_time)
        ids = [1, 2] if isinstance(prompt, str) else list(prompt["prompt_token_ids"])
        answer = CompletionOutput(0, finish_reason=self.finish_reason, timings=timings)
        return RequestOutput("r", None, ids, [answer], finished=True, num_cached_tokens=1)


def test_latency_measures_only_what_comes_after_the_warm_up() -> None:
    llm, advanced = CountingLLM(), []
    plan = LatencyPlan(input_len=5, output_len=4, batch_size=3, num_iters_warmup=2, num_iters=4)
    result = measure_latency(llm, plan, advance=advanced.append)
    assert [len(call) for call in llm.calls] == [3] * 6
    assert len(result.latencies_s) == 4
    assert result.report.num_ok == 12
    assert (result.report.ttft.mean, result.report.itl.mean) == (2.0, 1.0)
    assert advanced == [1] * 6
    shown = result.as_json()
    assert shown["avg_latency"] == pytest.approx(sum(result.latencies_s) / 4)
    assert list(shown["percentiles"]) == ["10", "25", "50", "75", "90", "99"]  # type: ignore[call-overload, arg-type]


def test_latency_never_repeats_a_prompt() -> None:
    llm = CountingLLM()
    measure_latency(llm, LatencyPlan(batch_size=2, num_iters_warmup=1, num_iters=3))
    prompts = [tuple(p["prompt_token_ids"]) for call in llm.calls for p in call]  # type: ignore[index]
    assert len(set(prompts)) == 8


def test_throughput_runs_everything_at_once() -> None:
    llm = CountingLLM()
    made = random_workload(4, input_lengths=Lengths(10), output_lengths=Lengths(3), vocab_size=9)
    result = measure_throughput(llm, made, slo=SLO(ttft=1.0))
    assert [len(call) for call in llm.calls] == [4]
    assert all(p.max_tokens == 3 and p.ignore_eos and p.is_greedy for p in llm.params)
    shown = result.as_json()
    assert (shown["num_requests"], shown["total_num_tokens"]) == (4, 52)
    assert shown["total_cached_tokens"] == 4
    assert shown["goodput"] == 0
    assert shown["mean_parts_ms"]["waiting"] == 2000.0  # type: ignore[call-overload, index]


def test_texts_pass_as_texts() -> None:
    llm = CountingLLM()
    made = Workload((WorkloadRequest(prompt_text="hello", num_output_tokens=2),), ("a note",))
    assert measure_throughput(llm, made).notes == ("a note",)
    assert llm.calls == [["hello"]]


def test_a_failed_answer_is_counted_as_failed() -> None:
    made = random_workload(2, input_lengths=Lengths(3), output_lengths=Lengths(3), vocab_size=9)
    report = measure_throughput(CountingLLM("error"), made).report
    assert (report.num_ok, report.num_failed) == (0, 2)


def test_the_parts_add_up_to_the_mean_latency() -> None:
    llm = CountingLLM()
    made = random_workload(3, input_lengths=Lengths(3), output_lengths=Lengths(5), vocab_size=9)
    report = measure_throughput(llm, made).report
    outputs = llm.generate([{"prompt_token_ids": [1]}], [SamplingParams(max_tokens=5)])
    assert sum(mean_parts_s(outputs).values()) == report.e2e.mean
    assert mean_parts_s([]) == {}


@pytest.mark.parametrize("name", ["input_len", "output_len", "batch_size", "num_iters"])
def test_a_bad_plan_names_the_flag(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        LatencyPlan(**{name: 0})


def shown_of(report: Report, notes: Sequence[str] = ()) -> str:
    console = Console(file=StringIO(), width=100)
    print_report(report, console, notes=notes)
    print_parts({"waiting": 2.0}, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_drafts_are_told_where_there_were_any() -> None:
    made = random_workload(2, input_lengths=Lengths(3), output_lengths=Lengths(3), vocab_size=9)
    report = measure_throughput(CountingLLM(), made).report
    assert "drafts" not in shown_of(report)
    shown = shown_of(replace(report, drafts=Chains(2, (2, 1), (2, 0))))
    assert "2 of 3 drafts accepted (67%), 1.50 tokens a step; by place 100%, 0%\n" in shown
    shown = shown_of(replace(report, drafts=Chains(0, (3,), (2,))))  # only totals are known
    assert "2 of 3 drafts accepted (67%), 1.50 tokens a step\n" in shown


def test_the_table() -> None:
    made = random_workload(2, input_lengths=Lengths(3), output_lengths=Lengths(3), vocab_size=9)
    shown = shown_of(
        measure_throughput(CountingLLM(), made, slo=SLO(itl=2.0)).report, ["[cut] prompts"]
    )
    lines = shown.splitlines()
    assert lines[0].split() == ["ms", "mean", "p50", "p90", "p99", "max"]
    assert lines[1].split() == ["TTFT", *["2000.00"] * 5]
    assert lines[2].split() == ["ITL", *["1000.00"] * 5]
    assert "2 of 2 requests answered" in shown
    assert "2 prompt tokens cached (33%)" in shown
    assert "2 of 2 met itl 2000 ms" in shown
    assert "note: [cut] prompts" in shown  # brackets are text, not markup
    assert "waiting 2000.0" in shown
    assert "arrival" not in shown  # nobody was late


def test_the_table_of_nothing_but_failures_has_no_numbers() -> None:
    made = random_workload(2, input_lengths=Lengths(3), output_lengths=Lengths(3), vocab_size=9)
    shown = shown_of(measure_throughput(CountingLLM("error"), made).report)
    assert shown.splitlines()[1].split() == ["TTFT", *["-"] * 5]
    assert "(2 failed, 0 aborted)" in shown
