"""Speculation wherever people look: replies, /metrics, explain, the trace and the log."""

import asyncio
import json
import logging

import pytest
from fakes import make_request
from prometheus_client.parser import text_string_to_metric_families
from server.fakes_server import CONFIG, MODEL
from server.observe.test_questions import kept, of, step

from duetto.core.batch import RequestUpdate
from duetto.core.draft_counts import NO_DRAFTS, Chains, DraftCount, Speculation, StepDrafts
from duetto.core.request import FinishReason
from duetto.core.shape import BatchShape, RequestShape
from duetto.server.apis.replies import timings, usage_body
from duetto.server.apis.translator import Usage
from duetto.server.observe.explain import draft_words, timeline
from duetto.server.observe.history import History
from duetto.server.observe.journal import Journal
from duetto.server.observe.metrics import Metrics
from duetto.server.observe.timeline import segments, trace
from duetto.server.settings import ServerSettings

METHODS = {"ngram": 4}


def speculation(saved_s=1.2):
    """Of 200 drafts 120 were accepted, in 100 steps."""
    told = Speculation(num_asked=110, num_made=230, asked="ngram", drafting_s=0.01)
    for _ in range(60):
        told.add_chain(Chains.of(2, 2))
    for _ in range(40):
        told.add_chain(Chains.of(2, 0))
    if saved_s is not None:
        told.add_price(verifying=0.3, saved=saved_s)
    return told


def final_update(told, num_tokens=220, end=2.8):
    request = make_request("r", range(8))
    times = request.timings
    times.first_scheduled_time, times.finish_time = 0.0, end
    times.token_times = [end] * num_tokens
    times.speculation = told
    return request, RequestUpdate("r", finish_reason=FinishReason.LENGTH, timings=times)


def ended(told, **more):
    history = History()
    return history.record_update(*final_update(told, **more))


def test_usage_has_openai_s_names_if_and_only_if_drafts_ran():
    assert "completion_tokens_details" not in usage_body(Usage(3, 10, 0))
    assert "completion_tokens_details" not in usage_body(Usage(3, 10, 0, NO_DRAFTS))
    shown = usage_body(Usage(3, 10, 0, DraftCount(8, 5)))["completion_tokens_details"]
    assert shown == {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 3}


def test_timings_have_llama_cpp_s_names_and_ours():
    _, update = final_update(speculation())
    shown = timings(update.timings, 8, 0)
    assert (shown["draft_n"], shown["draft_n_accepted"]) == (200, 120)
    assert shown["speculation"] == {
        "steps": 100,
        "tokens_per_step": 2.2,
        "proposed_per_position": (100, 100),
        "accepted_per_position": (60, 60),
        "by_method": {"ngram": {"proposed": 200, "accepted": 120}},
        "asked": 110,
        "made": 230,
        "drafting_ms": 10.0,
        "verifying_ms": 300.0,
        "saved_ms": 1200.0,
    }
    assert json.loads(json.dumps(shown))
    _, plain = final_update(None)
    assert not {"draft_n", "draft_n_accepted", "speculation"} & timings(plain.timings, 8, 0).keys()
    _, asked = final_update(Speculation(num_asked=3, asked="ngram"))  # and nothing was proposed
    shown = timings(asked.timings, 8, 0)
    assert "draft_n" not in shown and shown["speculation"]["asked"] == 3


@pytest.mark.parametrize(
    ("told", "methods", "num_tokens", "words"),
    [
        (None, {}, 9, "off: the server was started without --speculative-config"),
        (None, METHODS, 2, "none was asked for: the answer was too short"),
        (
            None,
            METHODS,
            9,
            "none was asked for: at that load drafts would have cost more than they gave",
        ),
        (
            Speculation(num_asked=3, asked="suffix"),
            METHODS,
            9,
            "suffix: asked 3 times, it proposed nothing that was tried",
        ),
        (
            speculation(),
            METHODS,
            220,
            "ngram: 120 of 200 drafts accepted, 2.20 tokens a step; saved about 1.20 s of 4.00 s",
        ),
        (
            speculation(-0.05),
            METHODS,
            220,
            "ngram: 120 of 200 drafts accepted, 2.20 tokens a step; cost about 50.0 ms more than "
            "it saved",
        ),
        (
            speculation(None),  # no prices
            METHODS,
            220,
            "ngram: 120 of 200 drafts accepted, 2.20 tokens a step",
        ),
    ],
)
def test_a_sentence_for_people(told, methods, num_tokens, words):
    one = ended(told, num_tokens=num_tokens)
    assert draft_words(one, methods) == words
    told_json = timeline(one, of("r", []), tells_other_salts=False, methods=methods)
    assert told_json["drafts"] == words and (told_json["speculation"] is None) == (told is None)


def speculating(start, requests, drafts=None):
    """As `step`; `requests` maps ids to (new, past, rows)."""
    made = step(start, {name: shape[:2] for name, shape in requests.items()})
    shape = BatchShape(tuple(RequestShape(*each) for each in requests.values()))
    return made._replace(shape=shape, drafts=drafts)


STEPS = [
    speculating(1.0, {"a": (8, 0, 1)}),
    # Three drafts, none accepted; two, both accepted; then four, one accepted; then a plain step.
    speculating(2.0, {"a": (4, 8, 4)}, StepDrafts(Chains.of(3, 0), 1, 0.25, 0.1)),
    speculating(3.0, {"a": (3, 9, 3)}, StepDrafts(Chains.of(2, 2))),
    speculating(4.0, {"a": (5, 12, 5)}, StepDrafts(Chains.of(4, 1))),
    speculating(5.0, {"a": (1, 14, 1)}),
]


def ended_a(num_tokens):
    request, update = final_update(None, num_tokens, end=6.0)
    request.request_id = "a"
    return History().record_update(request, update)


def test_a_rejected_draft_is_no_preemption_in_the_timeline():
    found, is_whole = segments(ended_a(8), of("a", STEPS))
    assert [(s.kind, s.num_steps, s.num_tokens, s.num_drafts) for s in found] == [
        ("wait", 0, 0, 0),
        ("prompt", 1, 8, 0),
        ("decode", 4, 13, 9),
    ]
    assert is_whole and found[-1].shown(0.0)["drafts"] == 9


def test_a_preemption_between_drafts_is_one():
    steps = [*STEPS[:3], speculating(9.0, {"a": (12, 0, 1)}), speculating(10.0, {"a": (2, 12, 2)})]
    request, update = final_update(None, 8, end=11.0)
    request.request_id = "a"
    found, _ = segments(History().record_update(request, update), of("a", steps))
    kinds = [s.kind for s in found]
    assert kinds[:4] == ["wait", "prompt", "decode", "wait"] and kinds[-1] == "decode"


def test_the_trace_has_drafting_as_a_span_within_its_step():
    events = [e for e in trace([kept(s) for s in STEPS], [], None) if e["ph"] == "X"]
    (span,) = [e for e in events if e["name"] == "drafting"]
    whole = next(e for e in events if e["ts"] == 2e6)
    assert whole["args"]["drafts"] == 3 and whole["args"]["accepted"] == 0
    assert (whole["args"]["drafting_ms"], whole["args"]["verifying_ms"]) == (250.0, 100.0)
    assert whole["ts"] <= span["ts"] and span["dur"] == 250_000.0
    assert span["ts"] + span["dur"] == whole["ts"] + whole["dur"]
    assert "drafts" not in next(e for e in events if e["ts"] == 5e6)["args"]


def samples(metrics):
    return {
        (s.name, s.labels.get("position")): s.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for s in family.samples
        if "spec_decode" in s.name and not s.name.endswith("_created")
    }


def test_metrics_have_vllm_s_names():
    settings = ServerSettings(served_model_name=MODEL, max_drafts=METHODS)
    metrics = Metrics(settings, CONFIG)
    for one in STEPS:
        metrics.record_step(one)
    assert samples(metrics) == {
        ("vllm:spec_decode_num_drafts_total", None): 3,
        ("vllm:spec_decode_num_draft_tokens_total", None): 9,
        ("vllm:spec_decode_num_accepted_tokens_total", None): 3,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"): 2,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"): 1,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "2"): 0,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "3"): 0,
        ("duetto:spec_decode_drafting_seconds_total", None): 0.25,
        ("duetto:spec_decode_verifying_seconds_total", None): 0.1,
    }
    off = Metrics(ServerSettings(served_model_name=MODEL), CONFIG)
    off.record_step(STEPS[0])
    assert not samples(off)


def test_the_log_tells_acceptance_where_drafts_ran(caplog):
    caplog.set_level(logging.INFO, logger="duetto")

    async def run(steps, told):
        journal = Journal(ServerSettings(served_model_name=MODEL))
        request, update = final_update(told)
        journal.record_arrival([request], "")
        for one in steps:
            journal.record_step(one)
        journal.record_update(request, update, History().record_update(request, update))
        journal._tell_throughput()
        journal.stop()
        return [r.getMessage() for r in caplog.records[-2:]]

    line, throughput = asyncio.run(run(STEPS, speculation()))
    assert line.endswith(" tenant=- drafts=200 accepted=120")
    assert throughput.endswith(" draft_acceptance=33.3% mean_acceptance_length=2.00")
    line, throughput = asyncio.run(run(STEPS[:1], None))
    assert "drafts" not in line and "acceptance" not in throughput
