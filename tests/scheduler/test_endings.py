"""How requests end, what callers are told until then, and what a failure leaves behind."""

from dataclasses import replace

import pytest
from fakes import generate_alone, make_request
from scheduler.scripted import Script

from duetto.core.batch import RequestResult, SampledToken, StepOutput, TokenLogprob
from duetto.core.errors import EngineError
from duetto.core.request import FinishReason
from duetto.core.timings import Part

# --- abort, stop, failures -----------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("preempted", [False, True])
def test_an_abort_in_any_state_is_final_and_frees_everything(
    num_steps: int, preempted: bool
) -> None:
    script = Script(max_num_batched_tokens=4)
    request = make_request("r", (1,) * 10, 8)  # three chunks, then next tokens
    script.add(request)
    script.steps(num_steps)
    if preempted and num_steps:
        script.scheduler._room.preempt(request)
    update = script.scheduler.end("r", FinishReason.ABORT, script.now + 1)
    assert update is not None
    assert (update.finish_reason, update.error) == (FinishReason.ABORT, None)
    assert request.timings.e2e_s == sum(request.timings.parts.values()) == num_steps + 1
    assert script.scheduler.end("r", FinishReason.ABORT, script.now) is None
    assert not script.scheduler.has_work
    assert script.scheduler.pool.num_free == script.config.num_blocks
    script.scheduler.check()


def test_to_abort_what_is_unknown_or_has_ended_is_nothing() -> None:
    script = Script()
    assert script.scheduler.end("unknown", FinishReason.ABORT, 0.0) is None
    script.add(make_request("r", (1,), 1))
    script.finish()
    assert script.scheduler.end("r", FinishReason.ABORT, script.now) is None


def test_a_stop_string_ends_a_running_request() -> None:
    script = Script()
    request = make_request("r", (1,), 8)
    script.add(request)
    script.step()
    script.scheduler.end("r", FinishReason.STOP, script.now)
    assert request.finish_reason is FinishReason.STOP
    assert not script.scheduler.has_work
    assert script.scheduler.pool.num_free == script.config.num_blocks


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_stop_token_ends_it_and_is_a_reason_only_if_the_caller_named_it(
    asked_for: bool,
) -> None:
    script = Script()
    first = generate_alone(make_request("r", (1,), 1))[0]
    request = make_request("r", (1,), 8, stop_token_ids=[first])
    if not asked_for:
        request.sampling = replace(request.sampling, stop_token_ids=())
    script.add(request)
    script.step()
    (update,) = script.updates
    assert update.finish_reason is FinishReason.STOP
    assert update.stop_reason == (first if asked_for else None)
    assert [token.token_id for token in update.tokens] == [first]


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    script = Script(max_num_seqs=1)
    script.add(make_request("a", (1,) * 9, 4), make_request("b", (1,) * 9, 4))
    batch = script.plan()
    updates = script.scheduler.update(
        batch, StepOutput((RequestResult(error="out of order"),)), 1.0
    )
    assert [(u.request_id, u.finish_reason, u.error) for u in updates] == [
        ("a", FinishReason.ERROR, "out of order")
    ]
    script.scheduler.check()
    script.now = 1.0
    assert script.step() == {"b": 9}  # nothing that the failed step wrote is found
    script.finish()


def test_a_failed_row_ends_one_request_and_publishes_nothing_of_it() -> None:
    script = Script()
    script.add(make_request("bad", (1,) * 8, 4), make_request("good", (2,) * 4, 4))
    script.executor.fail_requests = {"bad"}
    script.step()
    failed, good = script.updates
    assert (failed.finish_reason, failed.error) == (
        FinishReason.ERROR,
        "planted failure of one request",
    )
    assert good.finish_reason is None
    script.executor.fail_requests = set()
    again = make_request("again", (1,) * 8, 4)
    script.add(again)
    script.finish()
    assert again.num_cached_tokens == 0


SCORE = TokenLogprob(2, -1.0, 1)
WHOLE = RequestResult((SampledToken(1),), scores=(SCORE, SCORE))


@pytest.mark.parametrize(
    "results",
    [
        (),
        (WHOLE, WHOLE),
        (RequestResult(),),
        (RequestResult(scores=(SCORE, SCORE)),),
        (RequestResult((SampledToken(1),)),),
        (RequestResult((SampledToken(1),), scores=(SCORE,)),),
        (RequestResult((SampledToken(1),), scores=(SCORE, SCORE, SCORE)),),
        (RequestResult((SampledToken(1), SampledToken(1)), scores=(SCORE, SCORE)),),
    ],
)
def test_an_output_that_is_not_whole_is_refused_and_changes_nothing(
    results: tuple[RequestResult, ...],
) -> None:
    script = Script()
    request = make_request("r", (1, 2, 2), 4, prompt_logprobs=0)
    script.add(request)
    batch = script.plan()
    with pytest.raises(EngineError, match=r"for request r|for 1 requests"):
        script.scheduler.update(batch, StepOutput(results), 1.0)
    assert (request.num_written_tokens, request.num_output_tokens) == (0, 0)
    assert request.num_in_flight == 1
    assert request.timings.accounted_until == 0.0
    whole = script.executor.execute(batch)
    (update,) = script.scheduler.update(batch, whole, 1.0)
    assert len(update.tokens) == 1
    assert [score.token_id for score in update.prompt_logprobs] == [2, 2]


# --- what is told --------------------------------------------------------------------------


def test_updates_say_what_a_step_changed_and_nothing_else() -> None:
    script = Script(max_num_batched_tokens=4)
    request = make_request("r", (1,) * 6, 2)
    script.add(request)
    script.step()
    assert script.updates == []  # a chunk says nothing
    script.steps(2)
    first, last = script.updates
    assert (first.finish_reason, first.timings) == (None, None)
    assert (last.finish_reason, last.timings) == (FinishReason.LENGTH, request.timings)
    assert request.timings.token_times == [2.0, 3.0]


def test_scores_of_a_prompt_come_with_its_chunks() -> None:
    script = Script(max_num_batched_tokens=4)
    script.add(make_request("r", range(1, 7), 1, prompt_logprobs=0))
    script.steps(2)
    told = [[score.token_id for score in update.prompt_logprobs] for update in script.updates]
    assert told == [[2, 3, 4, 5], [6]]


def test_min_tokens_and_bad_words_reach_the_sampler() -> None:
    script = Script()
    free = generate_alone(make_request("r", (1,), 4))
    request = make_request(
        "r", (1,), 4, stop_token_ids=[free[0]], min_tokens=2, bad_word_ids=[[free[1]]]
    )
    script.add(request)
    script.finish()
    assert list(request.output_token_ids) == generate_alone(request)
    assert request.num_output_tokens >= 2
    assert free[0] not in request.output_token_ids[:2]
    assert free[1] not in request.output_token_ids


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    script = Script()
    request = make_request("r", range(1, 10), 4)
    script.add(request)
    script.step()
    script.scheduler._room.preempt(request)
    script.step()
    assert request.num_computed_tokens == 10  # it found its own two blocks again
    assert request.num_cached_tokens == 0
    assert request.timings.first_scheduled_time == 0.0
    assert request.timings.parts[Part.PREEMPTED] == 1.0


@pytest.mark.parametrize("fault", ["none", "missing block", "lost request", "queue"])
def test_check_finds_what_is_out_of_order(fault: str) -> None:
    script = Script()
    script.add(*(make_request(f"r{i}", (i + 1,) * 5, 4) for i in range(6)))
    script.step()
    scheduler = script.scheduler
    first = scheduler.running["r0"]
    if fault == "missing block":
        first.block_table.pop()
    elif fault == "lost request":
        del scheduler.running["r0"]
    elif fault == "queue":
        scheduler.waiting.reverse()
    if fault == "none":
        scheduler.check()
    else:
        with pytest.raises(AssertionError):
            scheduler.check()
