"""Metrics after known traffic."""

import pytest
from numpy.random import default_rng
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, make_app, wait_until
from starlette.testclient import TestClient

from duetto.core.reuse_choice import ReuseRules, insisted
from duetto.server.observe.metrics import TOKEN_GAP_BUCKETS, _observe_all


@pytest.fixture
def executor():
    return SpeakingExecutor("abcdef")


@pytest.fixture
def client(executor):
    with TestClient(make_app(executor, kv_cache_dtype="bfloat16")[0]) as made:
        yield made


def samples(client):
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (s.name, *sorted(set(s.labels.items()) - {("model_name", MODEL), ("engine", "0")})): s.value
        for family in text_string_to_metric_families(reply.text)
        for s in family.samples
    }


def ask(client, **more):
    body = {"model": MODEL, "prompt": "a prompt of more than one block", "max_tokens": 4, **more}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_known_traffic_gives_known_numbers(client):
    ask(client)
    ask(client, max_tokens=50)
    got = samples(client)

    def value(name, *labels):
        return got[f"vllm:{name}", *labels]

    assert value("prompt_tokens_total") == 62
    assert value("prompt_tokens_cached_total") == 28
    assert value("prefix_cache_queries_total") == 62 and value("prefix_cache_hits_total") == 28
    assert value("generation_tokens_total") == 4 + 7
    assert value("request_success_total", ("finished_reason", "length")) == 1
    assert value("request_success_total", ("finished_reason", "stop")) == 1
    assert value("request_success_total", ("finished_reason", "error")) == 0
    assert value("num_preemptions_total") == 0
    assert value("iteration_tokens_total_count") == 4 + 7
    assert value("iteration_tokens_total_sum") == 31 + 3 + 3 + 6
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds",
                 "request_queue_time_seconds", "request_prefill_time_seconds",
                 "request_decode_time_seconds", "request_inference_time_seconds",
                 "request_time_per_output_token_seconds", "request_params_n"):  # fmt: skip
        assert value(f"{name}_count") == 2, name
    assert value("inter_token_latency_seconds_count") == 3 + 6
    assert value("request_prompt_tokens_sum") == 62
    assert value("request_generation_tokens_sum") == 11
    assert value("request_params_max_tokens_sum") == 54
    assert value("prompt_tokens_by_source_total", ("source", "local_compute")) == 34
    assert value("prompt_tokens_by_source_total", ("source", "local_cache_hit")) == 28
    assert value("request_prefill_kv_computed_tokens_sum") == 34
    duration = ("http_request_duration_seconds_count", ("handler", "/v1/completions"))
    assert got[(*duration, ("method", "POST"))] == 2
    assert got["process_resident_memory_bytes",] > 1e6 and ("python_info" in {k[0] for k in got})
    info = [k for k in got if k[0] == "vllm:cache_config_info"]
    assert dict(info[0][1:])["num_gpu_blocks"] == str(CONFIG.num_blocks)
    assert dict(info[0][1:])["cache_dtype"] == "bfloat16"
    http = ("http_requests_total", ("handler", "/v1/completions"), ("method", "POST"))
    assert got[(*http, ("status", "2xx"))] == 2


def test_what_is_reused_is_neither_computed_nor_cached(executor):
    rules = ReuseRules(why_not=insisted)
    with TestClient(make_app(executor, reuse=rules)[0]) as client:
        text = {"text": "twelve bytes", "reusable": True}
        ask(client, prompt={"segments": ["ab", text, "?"]}, reuse="first:2")
        ask(client, prompt={"segments": ["abcd", text, "?"]}, reuse="first:2")
        ask(client, prompt={"segments": ["efgh"]}, reuse="first:2")
        ask(client, prompt={"segments": ["ab", text, "?"]})
        got = samples(client)
    sources = ("local_compute", "local_cache_hit", "local_reuse")
    by_source = [got["vllm:prompt_tokens_by_source_total", ("source", s)] for s in sources]
    assert by_source == [5 + 7 + 4 + 11, 4, 10 + 10]
    tokens = [
        got["duetto:reuse_tokens_total", ("kind", kind)]
        for kind in ("reused", "recomputed", "missing")
    ]
    assert tokens == [20, 4, 12]
    assert got["duetto:reuse_requests_total", ("outcome", "reused")] == 2
    assert got["duetto:reuse_requests_total", ("outcome", "computed")] == 1


def test_gauges_follow_a_request_and_return_to_zero(client, executor):
    seen = []

    class Watching(SpeakingExecutor):
        def submit(self, batch):
            seen.append(samples(client))
            return super().submit(batch)

    # The first step's gauges are seen by the second one: /metrics is served while it runs.
    executor.submit = Watching("abc").submit
    ask(client)
    during = [s["vllm:num_requests_running",] for s in seen]
    assert max(during) == 1
    assert (
        max(s["vllm:kv_cache_usage_perc",] for s in seen) == 9 / CONFIG.num_blocks
    )  # of 33 tokens
    wait_until(lambda: samples(client)["vllm:num_requests_running",] == 0)
    assert samples(client)["vllm:kv_cache_usage_perc",] == 0


def test_an_engine_failure_is_counted(client, executor):
    executor.fails = True
    body = {"model": MODEL, "prompt": "a"}
    assert client.post("/v1/completions", json=body).status_code == 500
    got = samples(client)
    assert got["vllm:request_success_total", ("finished_reason", "error")] == 1
    assert got["vllm:num_requests_running",] == 0


def test_many_values_at_once_are_observed_as_one_by_one():
    edges = [*TOKEN_GAP_BUCKETS, 1e-9, 79.9, 80.1, 1e6, 0.0]
    values = edges + [edge * (1 + 1e-12) for edge in edges] + default_rng(0).random(500).tolist()
    made = [Histogram("x", "x", buckets=TOKEN_GAP_BUCKETS, registry=None) for _ in range(2)]
    for value in values:
        made[0].observe(value)
    _observe_all(made[1], list(values))
    _observe_all(made[1], [])
    found = [[(s.name, s.labels, s.value) for s in each.collect()[0].samples] for each in made]
    one, many = ([s for s in samples if "sum" not in s[0] and "created" not in s[0]]
                 for samples in found)  # fmt: skip
    assert one == many and len(one) > len(TOKEN_GAP_BUCKETS)
    sums = [next(s[2] for s in samples if "sum" in s[0]) for samples in found]
    assert sums[0] == pytest.approx(sums[1])
