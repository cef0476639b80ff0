"""Merging for slow readers, in the small."""

import asyncio

import pytest
from fakes import make_request

from duetto.core.batch import RequestUpdate, SampledToken, TokenLogprob
from duetto.core.request import FinishReason
from duetto.server.answer import ENTRY_BYTES, MAX_STEPS, TOKEN_BYTES, Answer, ClientGone

A, B = make_request("a"), make_request("b")


def text(request_id, text, **more):
    return RequestUpdate(request_id, tokens=(SampledToken(1),), text=text, **more)


def run(coroutine):
    return asyncio.run(coroutine)


def test_updates_that_nobody_reads_are_merged_by_choice():
    async def story():
        answer = Answer([A, B], 10_000)
        for letter in "xyz":
            answer.put(text("a", letter, num_cached_tokens=4))
        answer.put(text("b", "q", finish_reason=FinishReason.STOP))
        first, second = await answer.next(1)
        assert (first.index, first.text, len(first.tokens)) == (0, "xyz", 3)
        assert first.final is None and first.num_cached_tokens == 4
        assert (second.index, second.text) == (1, "q") and second.final is not None
        assert answer.unfinished == {"a"} and not answer.has_ended
        answer.put(text("a", "!", finish_reason=FinishReason.LENGTH))
        assert not answer.has_ended  # it has not been read
        (last,) = await answer.next(1)
        assert last.text == "!" and answer.has_ended

    run(story())


def steps(delta):
    return [(step.text, len(step.tokens), step.final is not None) for step in delta.steps()]


def test_steps_are_told_apart_while_only_the_event_loop_is_behind():
    async def story():
        answer = Answer([A], 10_000)
        answer.put(scores("a", 3))
        for letter in ("x", "", "yz"):
            answer.put(text("a", letter))
        answer.put(text("a", "!", finish_reason=FinishReason.STOP))
        (delta,) = await answer.next(1)
        assert (delta.text, len(delta.tokens)) == ("xyz!", 4)
        assert steps(delta) == [
            ("", 0, False), ("x", 1, False), ("", 1, False), ("yz", 1, False), ("!", 1, True)
        ]  # fmt: skip
        first, *others = delta.steps()
        assert len(first.prompt_logprobs) == 3 and not any(s.prompt_logprobs for s in others)

    run(story())


def test_steps_are_merged_while_the_client_takes_nothing_and_when_they_are_many():
    async def story():
        slow, behind = Answer([A], 10_000), Answer([A], 10_000)
        with slow.writing():
            for letter in "xyz":
                slow.put(text("a", letter))
        assert steps(*await slow.next(1)) == [("xyz", 3, False)]
        for _ in range(MAX_STEPS + 9):
            behind.put(text("a", "x"))
        few = Answer([A], 10_000)
        for letter in "xyz":
            few.put(text("a", letter), 2)
        assert steps(*await few.next(1)) == [("x", 1, False), ("yz", 2, False)]
        (delta,) = await behind.next(1)
        assert steps(delta) == [("x", 1, False)] * (MAX_STEPS - 1) + [("x" * 10, 10, False)]

    run(story())


def test_silence_is_an_empty_list():
    assert run(Answer([A], 1000).next(0.01)) == []


def test_a_reader_that_waits_is_woken():
    async def story():
        answer = Answer([A], 1000)
        asyncio.get_running_loop().call_later(0.01, answer.put, text("a", "x"))
        return await answer.next(5)

    assert run(story())[0].text == "x"


LIMIT = 10 * (TOKEN_BYTES + 4)  # ten tokens with a letter each


def test_too_much_that_a_client_does_not_take_ends_the_answer_and_keeps_nothing():
    async def story():
        answer = Answer([A], LIMIT)
        with answer.writing():
            for _ in range(10):
                answer.put(text("a", "x"))
            assert not answer.is_gone
            answer.put(text("a", "x"))
        assert answer.is_gone
        answer.put(text("a", "y" * 10**6))
        assert not answer._pending and answer.unfinished == {"a"}
        answer.put(text("a", "", finish_reason=FinishReason.ABORT))
        assert not answer.unfinished
        for attempt in (answer.writing().__enter__, lambda: answer.next(1).send(None)):
            with pytest.raises(ClientGone):
                attempt()

    run(story())


def scores(request_id, num_tokens, num_top=0):
    top = tuple((i, -1.0) for i in range(num_top))
    scored = tuple(TokenLogprob(1, -1.0, 1, top) for _ in range(num_tokens))
    return RequestUpdate(request_id, prompt_logprobs=scored)


@pytest.mark.parametrize(
    ("update", "num_bytes"),
    [
        (text("a", "xy"), TOKEN_BYTES + 8),
        (scores("a", 10), 10 * ENTRY_BYTES),
        (scores("a", 10, 20), 210 * ENTRY_BYTES),
        (
            RequestUpdate("a", (SampledToken(1, TokenLogprob(1, -1.0, 1, ((1, -1.0),) * 20)),)),
            TOKEN_BYTES + 21 * ENTRY_BYTES,
        ),
    ],
)
def test_what_waits_is_counted_as_what_it_weighs(update, num_bytes):
    async def story():
        enough, little = Answer([A], num_bytes + 1), Answer([A], num_bytes)
        for answer in (enough, little):
            with answer.writing():
                answer.put(update)
                answer.put(text("a", ""))
        assert not enough.is_gone and little.is_gone

    run(story())


def test_one_step_of_all_choices_may_always_wait():
    choices = [make_request(str(i), logprobs=20) for i in range(128)]
    top = tuple((i, -1.0) for i in range(20))

    def step(answer):
        for choice in choices:
            token = SampledToken(1, TokenLogprob(1, -1.0, 1, top))
            answer.put(RequestUpdate(choice.request_id, (token,), text="x"))

    async def story():
        answer = Answer(choices, LIMIT)
        with answer.writing():
            step(answer)
            assert not answer.is_gone
            step(answer)
            assert answer.is_gone

    run(story())


def test_the_scores_of_a_prompt_may_wait_beside_the_answer():
    """They come as fast as a prompt is computed, which says nothing of the client."""
    scored = make_request("a", prompt=[1] * 100, prompt_logprobs=3)

    async def story():
        answer = Answer([scored], LIMIT)
        with answer.writing():
            for _ in range(10):
                answer.put(scores("a", 10, 3))
            for _ in range(10):
                answer.put(text("a", "x"))
            assert not answer.is_gone
            answer.put(text("a", "x"))
            assert answer.is_gone

    run(story())


def test_what_waits_for_anything_but_the_client_never_ends_it():
    """As the making of a large reply, or a step's many updates before the reader's turn."""

    async def story():
        answer = Answer([A, B], LIMIT)
        for request_id in "abab":
            answer.put(scores(request_id, 1000))
        with answer.writing():
            pass
        assert [len(delta.prompt_logprobs) for delta in await answer.next(5)] == [2000, 2000]

    run(story())


def test_reading_in_time_never_ends_it():
    async def story():
        answer = Answer([A], 10 * TOKEN_BYTES)
        for _ in range(100):
            answer.put(text("a", "x" * 50))
            assert (await answer.next(1))[0].text == "x" * 50

    run(story())


def test_who_waits_learns_that_the_client_has_gone():
    async def story():
        answer = Answer([A], 1000)
        asyncio.get_running_loop().call_later(0.01, answer.abandon)
        with pytest.raises(ClientGone):
            await answer.next(5)

    run(story())
