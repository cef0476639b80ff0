"""`bench serve` from end to end against the tiny server, and what it asks of it beforehand."""

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
from bench.fake_server import FakeServer

from duetto.bench.client import Target
from duetto.bench.metrics import SLO
from duetto.bench.serve import Load, ServeResult, find_model, run_serve, token_counter
from duetto.bench.workload import Lengths, Workload, WorkloadRequest, random_workload
from duetto.core.errors import ConfigError

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


def test_chat_sends_ids_as_the_server_spells_them(server: FakeServer) -> None:
    result = run(server, workload(1), is_chat=True)
    ids = workload(1).requests[0].prompt_token_ids or ()
    spelled = " ".join(f"t{token}" for token in ids)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": spelled}]
    assert "random token ids as text" in result.notes[0]


def test_a_server_that_refuses_everything_is_one_line(server: FakeServer) -> None:
    made = Workload((WorkloadRequest(prompt_text="esufer", num_output_tokens=1),))  # backwards
    with pytest.raises(ConfigError, match="/v1/completions: ServerError: HTTP 400: prompt: must"):
        run(server, made)


def test_questions_to_the_server(server: FakeServer) -> None:
    assert find_model(server.base_url, None) == "fake-model"
    assert token_counter(server.base_url, None, "m")("three words here") == 3


def test_nobody_listens() -> None:
    with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        find_model("http://127.0.0.1:1", None)
    with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        token_counter("http://127.0.0.1:1", None, "m")("a")


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
