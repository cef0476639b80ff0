"""`bench serve` from end to end against the tiny server, and what it asks of it beforehand."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import msgspec
import pytest
from measure.fake_server import TEMPLATE_TOKENS, FakeServer

from duetto.core.errors import ConfigError
from duetto.measure.client import Target
from duetto.measure.metrics import SLO
from duetto.measure.serve import Load, ServeResult, TokenCounter, find_model, run_serve
from duetto.measure.traces import TraceFit, read_azure
from duetto.measure.workload import Lengths, Workload, WorkloadRequest, random_workload

ALL_AT_ONCE = Load()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as running:
        yield running


def workload(num_requests: int = 6) -> Workload:
    return random_workload(
        num_requests, input_lengths=Lengths(5), output_lengths=Lengths(3), vocab_size=50
    )


def run(
    server: FakeServer,
    made: Workload,
    load: Load = ALL_AT_ONCE,
    **options: object,
) -> ServeResult:
    target = Target(base_url=server.base_url, model="m", **options)  # type: ignore[arg-type]
    return asyncio.run(run_serve(target, made, load))


def test_a_run(server: FakeServer) -> None:
    load = Load(max_concurrency=2, is_closed_loop=True, num_warmups=1, slo=SLO(ttft=10.0, itl=10.0))
    result = run(server, workload(), load)
    assert (result.report.num_ok, result.report.num_good) == (6, 6)
    assert result.report.num_output_tokens == 18
    assert result.report.num_cached_tokens == 24
    assert result.report.itl.count == 12
    assert server.most_active == 2
    assert result.notes == ()
    # A question before the run, a warm-up, and then the workload itself in order.
    sent = [tuple(body["prompt"]) for body in server.bodies]
    prompts = [request.prompt_token_ids for request in workload().requests]
    assert sorted(sent[2:]) == sorted(prompts)  # type: ignore[type-var]
    assert not set(sent[:2]) & set(prompts)  # or they would warm the prefix cache


def test_the_document_is_json_and_detailed_on_demand(server: FakeServer) -> None:
    result = run(server, workload(2))
    short = msgspec.json.decode(msgspec.json.encode(result.as_json()))
    assert short["completed"] == 2
    assert "ttfts" not in short
    detailed = msgspec.json.decode(msgspec.json.encode(result.as_json(detailed=True)))
    assert detailed["output_lens"] == [3, 3]
    assert [len(gaps) for gaps in detailed["itls"]] == [2, 2]


def test_failures_are_counted_and_the_run_goes_on(server: FakeServer) -> None:
    prompts = ["fine", "fail", "refuse", "stall", "fine"]
    made = Workload(tuple(WorkloadRequest(prompt_text=p, num_output_tokens=3) for p in prompts))
    result = run(server, made, Load(slo=SLO(ttft=5.0)), timeout_s=0.5)
    report = result.report
    assert (report.num_ok, report.num_failed, report.num_aborted) == (2, 2, 1)
    assert report.num_good == 2
    assert report.as_json()["slo_attainment"] == 0.4
    assert len(report.errors) == 3


def test_a_server_that_does_not_count_per_chunk() -> None:
    with FakeServer(has_counts=False).running() as server:
        result = run(server, workload(2))
    assert result.report.num_ok == 2
    assert "does not count per chunk" in result.notes[0]
    assert "continuous_usage_stats" not in server.bodies[-1]["stream_options"]


def test_chats_have_the_lengths_asked_for(server: FakeServer) -> None:
    made = random_workload(
        4, input_lengths=Lengths(12, "uniform", 0.3), output_lengths=Lengths(2), vocab_size=50
    )
    result = run(server, made, is_chat=True)
    asked = [len(request.prompt_token_ids or ()) for request in made.requests]
    assert [record.num_prompt_tokens for record in result.records] == asked
    ids = made.requests[0].prompt_token_ids or ()
    spelled = " ".join(f"t{token}" for token in ids[: len(ids) - TEMPLATE_TOKENS])
    sent = [body["messages"][0]["content"] for body in server.bodies[-4:]]
    assert spelled in sent and result.notes == ()
    document = result.as_json(detailed=True)
    assert document["input_lens"] == document["asked_input_lens"] == asked
    assert document["mean_input_len"] == document["mean_asked_input_len"] == sum(asked) / 4
    assert (document["min_input_len"], document["max_input_len"]) == (min(asked), max(asked))


def test_a_trace_sent_as_chats_has_its_lengths(server: FakeServer) -> None:
    file = Path(__file__).parent / "fixtures" / "azure_conv_5.csv"
    made = read_azure(file, vocab_size=50, fit=TraceFit(0.1, max_output_len=2))
    made = made.with_arrivals([0.0] * len(made.requests))
    result = run(server, made, is_chat=True)
    asked = [len(request.prompt_token_ids or ()) for request in made.requests]
    assert [record.num_prompt_tokens for record in result.records] == asked


def test_a_template_longer_than_the_prompt_is_told(server: FakeServer) -> None:
    result = run(server, workload(2), is_chat=True)
    assert [record.num_prompt_tokens for record in result.records] == [TEMPLATE_TOKENS + 1] * 2
    assert "2 of 2 chat prompts have not exactly the length" in result.notes[0]
    assert "14 tokens in all for 10 (+40%)" in result.notes[1]


@pytest.mark.parametrize(
    ("spells", "how"),
    [
        (True, "(HTTP 400), so prompts are random token ids as text"),
        (False, "(HTTP 404), so prompts are common words"),
    ],
)
def test_a_server_that_counts_no_chats_comes_near(spells: bool, how: str) -> None:
    made = random_workload(3, input_lengths=Lengths(30), output_lengths=Lengths(1), vocab_size=50)
    with FakeServer(counts_chats=False, spells=spells).running() as server:
        result = run(server, made, is_chat=True)
    assert all(abs(record.num_prompt_tokens - 30) <= 2 for record in result.records)
    assert "/tokenize" in result.notes[0] and how in result.notes[0]
    assert "not of the lengths asked for" in result.notes[1]


def test_texts_are_sent_as_they_are_and_what_the_template_adds_is_told(server: FakeServer) -> None:
    text = WorkloadRequest(prompt_text="five words are in here", num_prompt_tokens=5,
                           num_output_tokens=1)  # fmt: skip
    result = run(server, Workload((text,)), is_chat=True)
    assert server.bodies[-1]["messages"][0]["content"] == text.prompt_text
    assert "11 tokens in all for 5 (+120%); the chat template adds" in result.notes[0]
    assert run(server, Workload((text,))).notes == ()


def test_answers_that_end_early_are_told() -> None:
    with FakeServer(ends_after=2).running() as server:
        result = run(server, workload(3))
        document = result.as_json(detailed=True)
        assert "3 of 3 answers ended before the length asked for (6 tokens" in result.notes[0]
        assert "--ignore-eos" in result.notes[0] and document["ended_early"] == 3
        assert (document["mean_output_len"], document["mean_asked_output_len"]) == (2.0, 3.0)
        assert (document["output_lens"], document["asked_output_lens"]) == ([2] * 3, [3] * 3)
        assert run(server, workload(3), ignore_eos=True).notes == ()


def test_a_server_that_refuses_everything_is_one_line(server: FakeServer) -> None:
    made = Workload((WorkloadRequest(prompt_text="esufer", num_output_tokens=1),))  # backwards
    with pytest.raises(ConfigError, match="/v1/completions: ServerError: HTTP 400: prompt: must"):
        run(server, made)


def test_questions_to_the_server(server: FakeServer) -> None:
    assert find_model(server.base_url, None) == "fake-model"
    count = TokenCounter(server.base_url, None, "m")
    assert count("three words here") == 3 and count.notes == ()


@pytest.mark.parametrize(("status", "says"), [(404, "HTTP 404"), (200, "without a count")])
def test_a_server_without_tokenize_is_counted_by_guess(
    monkeypatch: pytest.MonkeyPatch, status: int, says: str
) -> None:
    asked = []

    def request(*args: object, **options: object) -> httpx2.Response:
        asked.append(args)
        return httpx2.Response(status, json={}, request=httpx2.Request("POST", "http://h"))

    monkeypatch.setattr(httpx2, "request", request)
    count = TokenCounter("http://h", None, "m")
    assert [count("x" * 40), count("y"), count("")] == [10, 1, 1]
    assert len(asked) == 1 and says in count.notes[0] and "guess" in count.notes[0]


def test_nobody_listens() -> None:
    with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        find_model("http://127.0.0.1:1", None)
    with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        TokenCounter("http://127.0.0.1:1", None, "m")("a")


def test_nobody_listens_to_chats() -> None:
    dead = Target(base_url="http://127.0.0.1:1", model="m", is_chat=True)
    ids = Workload((WorkloadRequest(prompt_token_ids=(1,), num_output_tokens=1),))
    with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        asyncio.run(run_serve(dead, ids, Load()))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_concurrency": 0}, "--max-concurrency 0"),
        ({"num_warmups": -1}, "--num-warmups -1"),
        ({"percentiles": (101.0,)}, "--metric-percentiles"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        Load(**options)  # type: ignore[arg-type]
