"""The client against a tiny server: instants, token counts, errors, stalls, and the schedule."""

import asyncio
from collections.abc import Iterator

import pytest
from measure.fake_server import GAP_S, FakeServer

from duetto.core.draft_counts import NO_CHAINS, Chains
from duetto.measure.client import Target, drive, open_http, send, started_clock
from duetto.measure.records import RequestRecord
from duetto.measure.workload import WorkloadRequest

IDS = WorkloadRequest(prompt_token_ids=(1, 2, 3), num_output_tokens=4)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


def ask(
    server: FakeServer, request: WorkloadRequest = IDS, scheduled_s: float = 0.0, **options: object
) -> RequestRecord:
    target = Target(base_url=server.base_url, model="m", **options)  # type: ignore[arg-type]

    async def run() -> RequestRecord:
        async with open_http(target) as http:
            return await send(http, target, request, scheduled_s, started_clock())

    return asyncio.run(run())


def text(prompt: str, num_output_tokens: int = 4) -> WorkloadRequest:
    return WorkloadRequest(prompt_text=prompt, num_output_tokens=num_output_tokens)


def counts(record: RequestRecord) -> list[int]:
    return [chunk.num_tokens for chunk in record.chunks]


# --- one request -------------------------------------------------------------------------------


def test_what_is_sent(server: FakeServer) -> None:
    ask(server, api_key="secret", ignore_eos=True, extra_body={"temperature": 0.5, "top_k": 3})
    assert server.bodies[-1] == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "temperature": 0.5,
        "top_k": 3,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.headers[-1]["authorization"] == "Bearer secret"


def test_instants_and_usage(server: FakeServer) -> None:
    record = ask(server, scheduled_s=-1.0)
    assert (record.outcome, record.error, record.finish_reason) == ("ok", None, "length")
    assert counts(record) == [1, 1, 1, 1]
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 4)
    assert record.num_cached_tokens == 4
    assert record.held_s >= 1.0
    assert record.ttft_s is not None
    assert record.ttft_s >= GAP_S * 0.9
    assert record.end_s == record.chunks[-1].time_s
    assert sum(record.itl_s) >= 3 * GAP_S * 0.9


def test_drafts_are_known_by_place_from_duetto_and_in_all_from_others(server: FakeServer) -> None:
    assert ask(server).drafts == NO_CHAINS
    assert ask(server, text("drafted")).drafts == Chains(2, (2, 2, 1), (2, 1, 0))
    assert ask(server, text("predicted")).drafts == Chains(0, (5,), (3,))


def test_a_chunk_of_two_tokens_counts_once_without_more_knowledge(server: FakeServer) -> None:
    record = ask(server, text("wide"))
    assert counts(record) == [1, 1, 1, 1]
    assert record.num_output_tokens == 8  # the server's usage knows better


def test_a_chunk_of_two_tokens_is_counted_by_usage(server: FakeServer) -> None:
    assert counts(ask(server, text("wide"), asks_counts=True)) == [2, 2, 2, 2]


def test_a_chunk_of_two_tokens_is_counted_by_its_ids(server: FakeServer) -> None:
    record = ask(server, text("wide"), extra_body={"return_token_ids": True})
    assert counts(record) == [2, 2, 2, 2]


def test_chat_does_not_count_the_role(server: FakeServer) -> None:
    record = ask(server, text("hello"), is_chat=True)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]
    assert counts(record) == [1, 1, 1, 1]


def test_chat_with_token_ids_is_a_mistake(server: FakeServer) -> None:
    with pytest.raises(ValueError, match="takes text"):
        ask(server, IDS, is_chat=True)


@pytest.mark.parametrize(
    ("prompt", "num_chunks", "error"),
    [
        ("refuse", 0, "ServerError: HTTP 400: prompt: must not be refused"),
        ("html", 0, "SSEError: Expected response with content type"),
        ("fail", 1, "ServerError: the engine failed"),
        ("garbage", 1, "DecodeError: JSON is malformed"),
        ("break", 1, "the stream ended without a finish reason"),
    ],
)
def test_failures_are_records(server: FakeServer, prompt: str, num_chunks: int, error: str) -> None:
    record = ask(server, text(prompt))
    assert record.outcome == "failed"
    assert (record.error or "").startswith(error)
    assert len(record.chunks) == num_chunks


def test_a_stall_ends_by_the_timeout(server: FakeServer) -> None:
    record = ask(server, text("stall"), timeout_s=0.4)
    assert record.outcome == "aborted"
    assert record.error == "no whole answer within 0.4 s"
    assert counts(record) == [1]
    assert record.finish_reason is None


def test_nobody_listens() -> None:
    nobody = FakeServer()
    nobody.base_url = "http://127.0.0.1:1"
    record = ask(nobody)
    assert record.outcome == "failed"
    assert (record.error or "").startswith("ConnectError")


# --- many requests -----------------------------------------------------------------------------


def requests_at(*times: float) -> list[WorkloadRequest]:
    return [WorkloadRequest(prompt_text="a", num_output_tokens=1, arrival_s=t) for t in times]


def drive_with(
    requests: list[WorkloadRequest],
    answer_s: float,
    **options: object,
) -> tuple[list[RequestRecord], int]:
    """Drive a sender that takes `answer_s`; the records, and the most that ran at one time."""
    clock, active, most = started_clock(), 0, 0

    async def answer(request: WorkloadRequest, scheduled_s: float) -> RequestRecord:
        nonlocal active, most
        sent_s = clock()
        active += 1
        most = max(most, active)
        await asyncio.sleep(answer_s)
        active -= 1
        return RequestRecord(scheduled_s=scheduled_s, sent_s=sent_s, end_s=clock())

    driven = drive(requests, answer, clock=clock, **options)  # type: ignore[arg-type]
    return asyncio.run(driven), most


def test_an_open_loop_sends_when_it_is_time_and_not_before() -> None:
    times = [0.2, 0.0, 0.1]  # out of order: records come back in the workload's
    records, _ = drive_with(requests_at(*times), answer_s=0.3)
    assert [record.scheduled_s for record in records] == times
    for record in records:
        assert 0 <= record.held_s < 0.1


def test_an_open_loop_does_not_wait_for_answers() -> None:
    records, most = drive_with(requests_at(0, 0, 0, 0), answer_s=0.2)
    assert most == 4
    assert max(record.end_s for record in records) < 0.6


def test_a_limit_holds_requests_back_and_the_wait_is_seen() -> None:
    records, most = drive_with(requests_at(0, 0, 0), answer_s=0.1, max_concurrency=1)
    assert most == 1
    assert [record.scheduled_s for record in records] == [0, 0, 0]
    assert records[2].held_s >= 0.18


def test_a_closed_loop_has_no_arrivals_to_wait_for() -> None:
    records, most = drive_with(
        requests_at(9, 9, 9, 9), answer_s=0.1, max_concurrency=2, is_closed_loop=True
    )
    assert most == 2
    assert all(record.held_s < 0.05 for record in records)
    assert 0.18 < max(record.end_s for record in records) < 1.0


def test_each_answer_is_announced_once() -> None:
    done: list[RequestRecord] = []
    records, _ = drive_with(requests_at(0, 0, 0), answer_s=0.0, on_done=done.append)
    assert sorted(map(id, done)) == sorted(map(id, records))
