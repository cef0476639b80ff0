"""The loop: text, stop strings, failing steps and records, over executors without a model."""

from dataclasses import replace
from itertools import count, pairwise

import pytest
from fakes import ByteCodec, FunctionExecutor, ShadowExecutor, generate_alone, make_request
from scheduler.guesses import Guesses

from duetto.core.batch import RequestUpdate, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.core.errors import InvalidRequest, RequestTooLong
from duetto.core.executor import Done
from duetto.core.request import FinishReason
from duetto.core.timings import Part
from duetto.engine.engine import STEP_FAILED, TEXT_FAILED, Engine
from duetto.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(num_blocks=64, max_model_len=128, block_size=4, max_num_batched_tokens=32)
EOS = 256


def make_engine(executor, config=CONFIG, depth=0, drafts=None):
    ticks = count()
    codec = ByteCodec()
    return Engine(
        Scheduler(config, drafts=drafts),
        executor,
        decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
        clock=lambda: float(next(ticks)),
        depth=depth,
    )


def says(text, then=EOS):
    """An executor that says `text`, byte by byte, and then the end of sequence."""
    data = text.encode()
    return FunctionExecutor(lambda _, index: data[index] if index < len(data) else then)


def run(engine):
    updates: dict[str, list[RequestUpdate]] = {}
    while engine.has_work:
        for update in engine.step().updates:
            updates.setdefault(update.request_id, []).append(update)
        engine.scheduler.check()
    return updates


def text_of(updates):
    return "".join(update.text for update in updates)


def test_text_streams_and_ends_with_the_stop_token_hidden():
    engine = make_engine(says("héllo"))
    engine.add(make_request(max_tokens=20, stop_token_ids=[EOS]))
    updates = run(engine)["r0"]
    assert text_of(updates) == "héllo"
    assert not any("\ufffd" in update.text for update in updates)
    assert [u.finish_reason for u in updates[:-1]] == [None] * (len(updates) - 1)
    assert updates[-1].finish_reason is FinishReason.STOP
    assert updates[-1].stop_reason == EOS  # the caller named it
    assert updates[-1].tokens[0].token_id == EOS


def test_stop_string_ends_the_request_in_the_step_that_completes_it():
    engine = make_engine(says("one two three"))
    engine.add(make_request(max_tokens=20, stop=["two"]))
    updates = run(engine)["r0"]
    assert text_of(updates) == "one "
    assert len(updates) == len("one two")  # not a step more
    assert updates[-1].finish_reason is FinishReason.STOP
    assert updates[-1].stop_reason == "two"
    assert updates[-1].timings.finish_time is not None
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks


def test_stop_string_completed_by_the_last_token_allowed_is_a_stop():
    engine = make_engine(says("abcdef"))
    engine.add(make_request(max_tokens=3, stop=["bc"]))
    (last,) = run(engine)["r0"][-1:]
    assert (last.finish_reason, last.stop_reason, last.text) == (FinishReason.STOP, "bc", "")


def test_held_back_text_is_flushed_at_the_length_limit():
    engine = make_engine(says("abcdef"))
    engine.add(make_request(max_tokens=4, stop=["cdx"]))
    updates = run(engine)["r0"]
    assert text_of(updates) == "abcd"
    assert updates[-1].finish_reason is FinishReason.LENGTH


def test_abort_in_any_state_flushes_and_is_final_once():
    engine = make_engine(says("abc" * 20))
    engine.add(make_request("running", max_tokens=50, stop=["bX"]))
    engine.step()
    engine.step()
    engine.add(make_request("waiting", max_tokens=5))
    update = engine.abort("running")
    assert (update.finish_reason, update.text) == (FinishReason.ABORT, "b")
    assert engine.abort("running") is None
    assert engine.abort("waiting").finish_reason is FinishReason.ABORT
    assert engine.abort("never seen") is None
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks


@pytest.mark.parametrize("when", ["fail_next", "fail_after_writing"])
def test_a_failing_step_of_one_ends_it_and_the_engine_goes_on(when, caplog):
    executor = ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    engine = make_engine(executor)
    engine.add(make_request("lost", max_tokens=4))
    setattr(executor, when, True)
    (update,) = engine.step().updates
    assert update.finish_reason is FinishReason.ERROR
    assert update.error == STEP_FAILED  # nothing of the exception's own words
    assert "planted failure" in caplog.text
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks
    request = make_request("next", max_tokens=4)
    engine.add(request)
    updates = run(engine)["next"]
    assert [t.token_id for u in updates for t in u.tokens] == generate_alone(request)


def neighbours(count=3):
    """Requests that stream, and one that comes late, with the beginning of the first's prompt."""
    early = [make_request(f"r{i}", prompt=[i] * 9 + [5], max_tokens=9) for i in range(count)]
    return early, make_request("late", prompt=[0] * 8 + [3] * 20, max_tokens=3)


@pytest.mark.parametrize("at_step", [0, 1, 4])
@pytest.mark.parametrize("culprit", ["r1", "late"])
def test_who_makes_a_step_raise_ends_alone_and_its_neighbours_answers_are_whole(culprit, at_step):
    executor = ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    engine = make_engine(executor)
    early, late = neighbours()
    for request in early:
        engine.add(request)
    updates = {}
    for number in range(60):
        if number == at_step:
            executor.poisoned = {culprit}
        if number == 3:
            engine.add(late)
        for update in engine.step().updates:
            updates.setdefault(update.request_id, []).append(update)
        engine.scheduler.check()
    assert not engine.has_work
    for request in (*early, late):
        told, answer = updates[request.request_id], generate_alone(request)
        tokens = [token.token_id for update in told for token in update.tokens]
        timings = told[-1].timings
        assert sum(timings.parts.values()) == timings.e2e_s
        if request.request_id == culprit:
            assert (told[-1].finish_reason, told[-1].error) == (FinishReason.ERROR, STEP_FAILED)
            assert tokens == answer[: len(tokens)]
        else:
            assert told[-1].finish_reason is FinishReason.LENGTH and tokens == answer
            assert len(timings.token_times) == len(answer)
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks


def test_a_step_that_fails_only_as_a_batch_costs_nobody_an_answer(caplog):
    executor = ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    engine = make_engine(executor)
    early, _ = neighbours()
    for request in early:
        engine.add(request)
    executor.fail_after_writing = True
    assert {u.error for u in engine.step().updates} == {None}
    assert "0 of 3 failed" in caplog.text
    updates = run(engine)
    for request in early:
        tokens = [t.token_id for u in updates[request.request_id] for t in u.tokens]
        assert tokens == generate_alone(request)[1:]


def test_a_broken_device_ends_every_request_after_one_try_each():
    executor = ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    executor.is_broken = True
    engine = make_engine(executor)
    for request in neighbours()[0]:
        engine.add(request)
    updates = engine.step().updates
    assert [u.error for u in updates] == [STEP_FAILED] * 3
    assert executor.num_executed == 4 and not engine.has_work
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_process_is_obeyed_and_the_step_can_be_run_again(interrupt):
    class Interrupted(ShadowExecutor):
        def submit(self, batch):
            if not self.num_executed:
                self.num_executed += 1
                raise interrupt
            return super().submit(batch)

    engine = make_engine(Interrupted(CONFIG.num_blocks, CONFIG.block_size))
    request = make_request("a")
    engine.add(request)
    with pytest.raises(interrupt):
        engine.step()
    tokens = [t.token_id for u in run(engine)["a"] for t in u.tokens]
    assert tokens == generate_alone(request)


class Times:
    """Prices that are told what was learned."""

    def __init__(self):
        self.learned = []

    def step_time(self, shape):
        return 3.0 * shape.num_tokens

    def has_measured(self, shape):
        return shape.num_tokens == 1

    def observe(self, shape, seconds):
        self.learned.append(shape.num_tokens)


def test_nothing_is_learned_of_a_step_that_was_tried_again():
    times, executor = Times(), ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    engine = Engine(Scheduler(CONFIG), executor, step_times=times)
    for request in neighbours()[0]:
        engine.add(request)
    executor.fail_next = True
    assert engine.step().record.predicted_s == 90.0  # of the step as it was planned
    assert times.learned == []
    engine.step()
    assert times.learned == [3]


def test_what_proposing_took_is_no_part_of_what_the_step_took():
    class Slow(ShadowExecutor):
        def submit(self, batch):
            output = super().submit(batch).result()
            return Done(output._replace(drafting_s=4.0))

    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 5.0
            return self.now

    seconds = []
    times = Times()
    times.observe = lambda shape, step_s: seconds.append(step_s)
    executor = Slow(CONFIG.num_blocks, CONFIG.block_size)
    engine = Engine(Scheduler(CONFIG), executor, clock=Clock(), step_times=times)
    engine.add(make_request("a"))
    record = engine.step().record
    assert seconds == [record.end_time - record.start_time - 4.0]


def test_what_is_being_computed_can_be_seen_from_outside():
    seen = []

    class Seen(ShadowExecutor):
        def submit(self, batch):
            seen.append(engine.computing)
            return super().submit(batch)

    executor = Seen(CONFIG.num_blocks, CONFIG.block_size)
    engine = Engine(Scheduler(CONFIG), executor, step_times=Times())
    for request in neighbours(2)[0]:
        engine.add(request)
    executor.fail_next = True
    engine.step()
    engine.step()
    assert engine.computing is None
    told = [(each.num_requests, each.predicted_s, each.is_measured) for each in seen]
    alone = (1, 30.0, False)
    assert told == [(2, 60.0, False), alone, alone, (2, 6.0, False)]
    assert len(set(seen)) == 4  # each is its own


@pytest.mark.parametrize("output", [StepOutput(()), StepOutput((None,)), StepOutput(None), None])
def test_an_executor_that_returns_too_little_fails_the_step(output):
    class Mute:
        def submit(self, batch):
            return Done(output)

    engine = make_engine(Mute())
    engine.add(make_request())
    (update,) = engine.step().updates
    assert update.finish_reason is FinishReason.ERROR
    assert not engine.has_work


def decode_failing_on(*bad):
    """A tokenizer that raises whenever one of some tokens is among those it is given."""

    def decode(ids, skip):
        if any(token_id in bad for token_id in ids):
            raise RuntimeError("planted failure of the tokenizer")
        return "".join(chr(token_id) for token_id in ids)

    return decode


def test_a_prompt_that_cannot_be_decoded_is_refused_and_changes_nothing(caplog):
    engine = Engine(Scheduler(CONFIG), says("abc"), decode_failing_on(7))
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.add(make_request(prompt=[7]))
    assert not engine.has_work
    assert "planted failure" in caplog.text


def test_an_answer_that_cannot_be_decoded_ends_alone(caplog):
    executor = FunctionExecutor(lambda request_id, index: 9 if request_id == "bad" else 50 + index)
    engine = Engine(Scheduler(CONFIG), executor, decode_failing_on(9))
    engine.add(make_request("bad", prompt=[1], max_tokens=5))
    engine.add(make_request("good", prompt=[2], max_tokens=3))
    updates = run(engine)
    (bad,) = updates["bad"]
    assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, TEXT_FAILED)
    assert bad.timings.finish_time is not None
    assert text_of(updates["good"]) == "234"
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks
    assert "planted failure of the tokenizer" in caplog.text


def test_one_failed_row_leaves_the_others_alone():
    executor = ShadowExecutor(CONFIG.num_blocks, CONFIG.block_size)
    executor.fail_requests = {"bad"}
    engine = make_engine(executor)
    good = make_request("good", prompt=(5, 6, 7), max_tokens=4)
    engine.add(make_request("bad", prompt=(1, 2, 3), max_tokens=4))
    engine.add(good)
    updates = run(engine)
    assert updates["bad"][-1].error == "planted failure of one request"
    assert [t.token_id for u in updates["good"] for t in u.tokens] == generate_alone(good)


def test_what_can_never_fit_is_refused_with_the_numbers():
    engine = make_engine(says("x"))
    with pytest.raises(RequestTooLong, match=r"length is 128.*129 tokens .100 in.*29 in"):
        engine.add(make_request(prompt=[1] * 100, max_tokens=29))
    assert not engine.has_work


def test_latency_parts_tile_the_time_from_arrival_to_finish():
    engine = make_engine(says("abcdefgh"))
    engine.add(make_request("a", max_tokens=6))
    engine.step()
    engine.add(make_request("b", prompt=[9] * 40, max_tokens=3, arrival_time=2.0))
    timings = {i: u[-1].timings for i, u in run(engine).items()}
    for each in timings.values():
        assert sum(each.parts.values()) == pytest.approx(each.e2e_s)
    assert timings["a"].parts[Part.SHARED] > 0  # b's prompt was computed beside it
    assert timings["b"].parts[Part.PROMPT] > 0
    assert len(timings["b"].token_times) == 3
    assert timings["b"].tpot_s == pytest.approx(sum(timings["b"].itl_s) / 2)


def test_records_count_what_a_step_computed():
    engine = make_engine(says("abcdefgh"))
    engine.add(make_request("a", prompt=[1] * 8, max_tokens=6))
    first = engine.step().record
    assert (first.num_tokens, first.num_prompt_tokens, first.num_scheduled) == (8, 8, 1)
    assert (first.num_queried_tokens, first.num_hit_tokens) == (8, 0)
    engine.add(make_request("b", prompt=[1] * 9, max_tokens=6))
    second = engine.step().record
    assert (second.num_tokens, second.num_prompt_tokens) == (2, 1)  # one next token, one of b's
    assert (second.num_queried_tokens, second.num_hit_tokens) == (9, 8)
    assert second.num_free_blocks == CONFIG.num_blocks - 4


# --- drafts, and steps in flight ------------------------------------------------------------


def answer_of(engine, request):
    """What a caller is told, and what is counted."""
    engine.add(request)
    updates = run(engine)["r0"]
    tokens = [token.token_id for update in updates for token in update.tokens]
    assert list(request.output_token_ids) == tokens
    assert len(request.timings.token_times) == len(tokens)
    assert updates[-1].timings is request.timings
    assert engine.scheduler.pool.num_free == CONFIG.num_blocks
    last = updates[-1]
    return text_of(updates), tokens, last.finish_reason, last.stop_reason, last.error


ENDS = [
    {"stop_token_ids": [EOS], "max_tokens": 60},
    {"stop": ["two"], "max_tokens": 60},
    {"stop": ["o t", "e"], "max_tokens": 60},
    {"stop": ["wo"], "max_tokens": 7},  # completed by the last token allowed
    {"stop": ["wo"], "max_tokens": 6},
    {"stop": ["two"], "max_tokens": 60, "include_stop_str_in_output": True},
    {"stop_token_ids": [ord("w")], "min_tokens": 3, "max_tokens": 60},
    {"bad_word_ids": [[ord("t"), ord("w")]], "max_tokens": 9},
    {"presence_penalty": 1.0, "max_tokens": 9},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_answers_end_alike_with_drafts_and_with_steps_in_flight(ends, depth):
    text = "one two three four"
    plain = answer_of(make_engine(says(text)), make_request(**ends))
    assert answer_of(make_engine(says(text), depth=depth), make_request(**ends)) == plain
    for seed in range(8):
        engine = make_engine(says(text), depth=depth, drafts=Guesses(seed))
        assert answer_of(engine, make_request(**ends)) == plain


def test_what_is_aborted_while_its_step_is_in_flight_is_told_nothing_more():
    engine = make_engine(says("abcdefgh"), depth=2)
    for name in ("gone", "stays"):
        engine.add(make_request(name, max_tokens=8))
    engine.step()
    engine.step()
    assert engine.abort("gone").finish_reason is FinishReason.ABORT
    updates = run(engine)
    assert "gone" not in updates
    assert text_of(updates["stays"]) == "abcdefgh"


def test_steps_in_flight_of_requests_that_are_gone_are_waited_for():
    engine = make_engine(says("abcdefgh"), depth=2)
    engine.add(make_request(max_tokens=8))
    engine.step()
    engine.abort("r0")
    assert engine.has_work and not engine.scheduler.has_work
    assert engine.step().updates == ()
    assert not engine.has_work


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_step_that_fails_once_costs_no_answer_at_any_depth(depth, at):
    class Once(ShadowExecutor):
        def execute(self, batch):
            if self.num_executed == at:
                self.fail_after_writing = True
            return super().execute(batch)

    executor = Once(CONFIG.num_blocks, CONFIG.block_size)
    executor.raises_late = at % 2 == 0
    engine = make_engine(executor, depth=depth)
    wanted = [make_request(name, (1, 2, i), 9, seed=i) for i, name in enumerate("abc")]
    for request in wanted:
        engine.add(request)
    updates = run(engine)
    for request in wanted:
        tokens = [t.token_id for u in updates[request.request_id] for t in u.tokens]
        assert tokens == generate_alone(request)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_step_that_gives_too_little_once_costs_no_answer_at_any_depth(depth, at, caplog):
    class Once(ShadowExecutor):
        def submit(self, batch):
            is_short = self.num_executed == at
            output = super().submit(batch).result()
            self.is_tainted = self.is_tainted or is_short
            return Done(StepOutput(output.results[:-1]) if is_short else output)

    engine = make_engine(Once(CONFIG.num_blocks, CONFIG.block_size), depth=depth)
    wanted = [make_request(name, (1, 2, i), 9, seed=i) for i, name in enumerate("abc")]
    for request in wanted:
        engine.add(request)
    updates = run(engine)
    for request in wanted:
        tokens = [t.token_id for u in updates[request.request_id] for t in u.tokens]
        assert tokens == generate_alone(request)
    assert "returned 2 results for 3 requests" in caplog.text and "0 of 3 failed" in caplog.text


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_records_count_each_admission_and_preemption_once(depth):
    config = replace(CONFIG, num_blocks=9)
    engine = make_engine(ShadowExecutor(9, config.block_size), config=config, depth=depth)
    for index, name in enumerate("abcd"):
        engine.add(make_request(name, (1, 2, 3, 4, index), 12, seed=index))
    records = [report.record for report in iter_reports(engine) if report.record]
    counts = engine.scheduler.counts
    assert counts.num_preemptions and counts.num_hit_tokens
    assert sum(r.num_preemptions for r in records) == counts.num_preemptions
    assert sum(r.num_queried_tokens for r in records) == counts.num_queried_tokens
    assert sum(r.num_hit_tokens for r in records) == counts.num_hit_tokens


def test_a_step_in_flight_is_not_the_time_of_the_next():
    """Two steps that overlap: each is as long as it was the only one to run."""
    engine = make_engine(says("abcdefgh"), depth=1)
    engine.add(make_request(max_tokens=8))
    records = [report.record for report in iter_reports(engine) if report.record]
    assert len(records) == 8
    assert all(a.end_time <= b.start_time for a, b in pairwise(records))


def iter_reports(engine):
    while engine.has_work:
        yield engine.step()
