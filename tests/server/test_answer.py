"""Merging for slow readers, in the small."""

import asyncio

import pytest
from fakes import make_request

from duetto.core.batch import RequestUpdate, SampledToken, TokenLogprob
from duetto.core.request import FinishReason
from duetto.server.answer import TOKEN_BYTES, Answer, ClientGone

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


def test_silence_is_an_empty_list():
    assert run(Answer([A], 1000).next(0.01)) == []


def test_a_reader_that_waits_is_woken():
    async def story():
        answer = Answer([A], 1000)
        asyncio.get_running_loop().call_later(0.01, answer.put, text("a", "x"))
        return await answer.next(5)

    assert run(story())[0].text == "x"


def test_too_much_unread_ends_the_answer_and_keeps_nothing():
    async def story():
        answer = Answer([A], 10 * TOKEN_BYTES)
        for _ in range(9):
            answer.put(text("a", "x"))
        assert not answer.is_gone
        answer.put(text("a", "x" * 91))
        assert answer.is_gone
        answer.put(text("a", "y" * 10**6))
        assert not answer._pending and answer.unfinished == {"a"}
        answer.put(text("a", "", finish_reason=FinishReason.ABORT))
        assert not answer.unfinished
        with pytest.raises(ClientGone):
            await answer.next(1)

    run(story())


def scores(request_id, num_tokens):
    scored = tuple(TokenLogprob(1, -1.0, 1) for _ in range(num_tokens))
    return RequestUpdate(request_id, prompt_logprobs=scored)


def test_one_large_update_never_ends_it():
    """As many prompt log-probabilities as a step makes, however many that are."""

    async def story():
        answer = Answer([A], 10 * TOKEN_BYTES)
        for _ in range(3):
            answer.put(scores("a", 1000))
            (delta,) = await answer.next(1)
            assert len(delta.prompt_logprobs) == 1000
        answer.put(scores("a", 1000))
        answer.put(text("a", "x"))  # what nobody has read is no longer small
        assert answer.is_gone

    run(story())


def test_a_step_of_large_updates_never_ends_it_while_the_reader_waits():
    async def story():
        answer = Answer([A, B], 10 * TOKEN_BYTES)
        reader = asyncio.create_task(answer.next(5))
        await asyncio.sleep(0)
        answer.put(scores("a", 1000))
        answer.put(scores("b", 1000))
        assert [len(delta.prompt_logprobs) for delta in await reader] == [1000, 1000]

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
