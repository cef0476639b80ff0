"""What a server with a real model and real drafts tells of them, in all places the same."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.fakes_server import chunks, post, wait_until
from starlette.testclient import TestClient

from duetto import build as building
from duetto.core.engine_args import EngineArgs
from duetto.engine.thread import in_thread
from duetto.scheduler.drafts import Ask
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

NAME, NUM_TOKENS = "tiny", 40
# One token again and again: after two of them, each draft is right.
ASKED = {
    "model": NAME,
    "prompt": "def f(x):",
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "temperature": 0.0,
    "logit_bias": {"7": 100},
}


class Always:
    """All the drafts that there may be, whatever they cost: no test may depend on speed."""

    is_on = True

    def __init__(self, max_drafts, *_):
        self.max_drafts = max_drafts["ngram"]

    def choose(self, candidates, _shape, _room, _limit_s=None):
        return {c.request.request_id: len(c.drafts) for c in candidates}

    def ask(self, planned):
        return {
            p.request.request_id: Ask("ngram", min(self.max_drafts, p.num_left)) for p in planned
        }

    def learn(self, _outcomes, _drafting_s):
        pass

    def forget(self, _request):
        pass


@pytest.fixture(scope="module")
def client(tiny_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "AdaptiveDrafts", Always)
        config = {"method": "ngram", "num_speculative_tokens": 4}
        built = building.build(tiny_model, EngineArgs(max_model_len=512, speculative_config=config))
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(served_model_name=NAME, max_drafts=built.model.max_drafts),
    )
    with TestClient(app) as made:
        made.history = app.state.relay.history
        yield made


def totals(client):
    return {
        s.name.removeprefix("vllm:spec_decode_").removesuffix("_total"): s.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for s in family.samples
        if s.name.startswith("vllm:spec_decode") and s.name.endswith("_total")
        if "position" not in s.labels
    }


def of_steps(client):
    records = [step.record.drafts for step in client.history.steps()]
    return sum(r.verified.total.num_accepted for r in records if r is not None)


@pytest.mark.parametrize("stream", [False, True])
def test_all_places_tell_the_same(client, stream):
    before, steps_before = totals(client), of_steps(client)
    if stream:
        asked = {**ASKED, "stream_options": {"include_usage": True}}
        got = chunks(client, "/v1/completions", asked)
        usage = got[-1]["usage"]
        timings = next(c["timings"] for c in got if c.get("timings"))
        shown = got[0]["id"]
    else:
        body = post(client, "/v1/completions", ASKED)
        usage, timings, shown = body["usage"], body["timings"], body["id"]
    drafted, accepted = timings["draft_n"], timings["draft_n_accepted"]
    assert accepted > NUM_TOKENS // 2
    assert usage["completion_tokens"] == timings["predicted_n"] == NUM_TOKENS
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
    }
    told = timings["speculation"]
    assert sum(told["proposed_per_position"]) == drafted
    assert sum(told["accepted_per_position"]) == accepted
    assert told["by_method"] == {"ngram": {"proposed": drafted, "accepted": accepted}}
    assert told["tokens_per_step"] == pytest.approx(NUM_TOKENS / (NUM_TOKENS - accepted), abs=1e-3)
    assert told["drafting_ms"] > 0 and told["verifying_ms"] >= 0
    # The record of a step comes after its updates.
    wait_until(lambda: of_steps(client) - steps_before == accepted)
    gained = {name: value - before[name] for name, value in totals(client).items()}
    assert gained == {
        "num_drafts": told["steps"],
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
    }
    (choice,) = client.get(f"/v1/requests/{shown}/timeline").json()["choices"]
    assert choice["speculation"]["accepted_per_position"] == told["accepted_per_position"]
    assert choice["drafts"].startswith(f"ngram: {accepted} of {drafted} drafts accepted")
    decoded = [s for s in choice["segments"] if s["kind"] == "decode"]
    assert sum(s["drafts"] for s in decoded) == drafted
    assert sum(s["steps"] for s in decoded) == NUM_TOKENS - accepted - 1  # the prompt's gave one


def test_several_choices_add_up_in_the_usage(client):
    body = post(client, "/v1/completions", {**ASKED, "n": 2, "temperature": 0.5})
    accepted = [choice["timings"]["draft_n_accepted"] for choice in body["choices"]]
    told = body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert told == sum(accepted) > 0


@pytest.mark.parametrize("num_tokens", range(20, 25))  # a step gives five: it stops within most
def test_a_stop_string_in_an_accepted_run_counts_no_tokens_beyond_it(client, num_tokens):
    whole = post(client, "/v1/completions", ASKED)["choices"][0]["text"]
    unit = whole[: len(whole) // NUM_TOKENS]
    assert unit * NUM_TOKENS == whole
    before, steps_before = totals(client), of_steps(client)
    body = post(client, "/v1/completions", {**ASKED, "stop": [unit * num_tokens]})
    usage, timings, shown = body["usage"], body["timings"], body["id"]
    assert usage["completion_tokens"] == timings["predicted_n"] == num_tokens
    drafted, accepted = timings["draft_n"], timings["draft_n_accepted"]
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == accepted
    told = timings["speculation"]
    assert sum(told["accepted_per_position"]) == accepted < num_tokens
    assert told["by_method"] == {"ngram": {"proposed": drafted, "accepted": accepted}}
    wait_until(lambda: of_steps(client) - steps_before == accepted)
    assert totals(client)["num_accepted_tokens"] - before["num_accepted_tokens"] == accepted
    (choice,) = client.get(f"/v1/requests/{shown}/timeline").json()["choices"]
    num_steps = sum(s.get("steps", 0) for s in choice["segments"])
    assert num_tokens - accepted == num_steps  # each gave one token that is no draft
    assert told["tokens_per_step"] == pytest.approx(num_tokens / num_steps, abs=1e-3)
