"""The line of counts and timings below an answer."""

from duetto.cli.stream import answer_json, stats_line
from duetto.core.draft_counts import Chains, Speculation
from duetto.core.outputs import CompletionOutput, RequestOutput
from duetto.core.timings import RequestTimings


def answer(told: Speculation | None) -> RequestOutput:
    """Six tokens, in steps that gave one, three and two of them."""
    timings = RequestTimings(0.0, finish_time=4.0, speculation=told)
    timings.token_times = [1.0, 2.0, 2.0, 2.0, 3.5, 3.5]
    one = CompletionOutput(0, "abcdef", [1] * 6, finish_reason="stop", timings=timings)
    return RequestOutput("r", None, [7, 7], [one], finished=True)


def test_without_drafts_nothing_is_said_of_them() -> None:
    line, told = stats_line(answer(None)), answer_json(answer(None))
    assert line.startswith("[2 prompt tokens (0 cached), 6 generated, TTFT 1000.0 ms, TPOT 500.00")
    assert "draft" not in line and "draft_n" not in told
    asked = Speculation(num_asked=2, asked="ngram")  # and nothing was proposed
    assert stats_line(answer(asked)) == line


def test_drafts_are_told_with_the_tokens_of_a_step() -> None:
    told = Speculation(asked="ngram")
    told.add_chain(Chains.of(4, 2))
    told.add_chain(Chains.of(1, 1))
    assert ", 3 of 5 drafts accepted (2.00 tokens a step), ended by stop]" in stats_line(
        answer(told)
    )
    shown = answer_json(answer(told))
    assert (shown["draft_n"], shown["draft_n_accepted"]) == (5, 3)
