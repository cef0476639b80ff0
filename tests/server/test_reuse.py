"""Segments and reuse through the API, over a real (random) model.

The oracle is the offline door on the same checkpoint: another engine, alone, without HTTP.
"""

import json
import shutil
from dataclasses import replace

import openai
import pytest
from program.rewrites.models import odd
from server.fakes_server import chunks, post, running
from starlette.testclient import TestClient

from duetto import LLM, SamplingParams
from duetto.build import build, reuse_choice, reuse_rules
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import ReuseLimits, ReuseRules, insisted, parse_reuse
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

NAME = "tiny"
TEXTS = ["def add(a, b):\n    return a + b\n", "class Engine:\n    pass\n" * 3, "import os\n" * 5]
QUESTION = "what does it import?"
TEMPLATE = (
    "{%- for d in documents or [] %}<doc>{{ d.text }}</doc>{% endfor %}"
    "{%- for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
)
MARKED = [{"text": text, "reusable": True} for text in TEXTS]
SEGMENTS = {"segments": ["Read:\n", *MARKED, QUESTION]}
ASKED = {"model": NAME, "max_tokens": 8, "temperature": 1.0, "seed": 5, "ignore_eos": True}
COMPLETION = {**ASKED, "prompt": SEGMENTS, "return_token_ids": True}
PARTS = [{"type": "text", "text": text, "cache": "reusable"} for text in TEXTS]
MESSAGES = [{"role": "user", "content": [*PARTS, {"type": "text", "text": QUESTION}]}]
CHAT = {**ASKED, "messages": MESSAGES, "return_token_ids": True}
CHOICES = ("none", "first:4", "hkvd:0.5", "query:0.25:2")
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / NAME
    shutil.copytree(tiny_model, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def built(checkpoint):
    return build(checkpoint, EngineArgs(max_num_seqs=8, max_model_len=512, block_size=8))


@pytest.fixture(scope="module")
def serve(built):
    """Makes a client of a server with such rules; they share one engine, one after the other."""

    def client(**rules):
        app = create_app(
            open_engine=in_thread(built.engine),
            codec=built.codec,
            config=built.scheduler_config,
            settings=ServerSettings(served_model_name=NAME, reuse=ReuseRules(**rules)),
        )
        return TestClient(app)

    return client


@pytest.fixture(scope="module")
def client(serve):
    with serve(why_not=insisted) as made:
        yield made


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint, max_num_seqs=8, max_model_len=512, block_size=8) as made:
        yield made


def offline(llm, given, **more):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True)
    (output,) = llm.generate(given, params, **more)
    return output.outputs[0]


def error_of(reply):
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


@pytest.mark.parametrize("reuse", [None, False, "off", *CHOICES])
def test_a_completion_of_segments(client, llm, reuse):
    body = post(client, "/v1/completions", {**COMPLETION, "reuse": reuse})
    expected = offline(llm, SEGMENTS, reuse=reuse)
    (choice,) = body["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert ("reuse" in body["timings"]) == (reuse in CHOICES)
    streamed = chunks(client, "/v1/completions", {**COMPLETION, "reuse": reuse})
    assert [i for c in streamed[1:] for i in c["choices"][0]["token_ids"]] == expected.token_ids
    assert ("reuse" in streamed[-1]["timings"]) == ("reuse" in body["timings"])


@pytest.mark.parametrize(
    "reuse", [None, "none", {"method": "query", "ratio": 0.25, "num_rounds": 2}]
)
def test_a_chat_with_marked_parts(client, llm, reuse):
    body = post(client, "/v1/chat/completions", {**CHAT, "reuse": reuse})
    prompt = llm.chat_prompt(MESSAGES)
    assert body["choices"][0]["token_ids"] == offline(llm, prompt, reuse=reuse).token_ids
    ids = [i for s in prompt["segments"] for i in s["token_ids"]]
    assert body["prompt_token_ids"] == ids
    assert post(client, "/tokenize", {"messages": MESSAGES})["tokens"] == ids


def test_documents_of_a_chat(client, llm):
    documents = [{"title": "t", "text": text} for text in TEXTS]
    asked = [{"role": "user", "content": QUESTION}]
    body = {**CHAT, "messages": asked, "documents": documents, "reuse": "none"}
    found = post(client, "/v1/chat/completions", body)
    prompt = llm.chat_prompt(asked, documents=documents)
    assert found["choices"][0]["token_ids"] == offline(llm, prompt, reuse="none").token_ids
    assert found["timings"]["reuse"]["reused"] > 0
    tokens = post(client, "/tokenize", {"messages": asked, "documents": documents})["tokens"]
    assert tokens == found["prompt_token_ids"]


def test_timings_say_what_was_reused(client):
    """And only what is exact counts as cached."""
    body = {**COMPLETION, "reuse": "first:4", "cache_salt": "new"}
    for missing in (True, False):
        found = post(client, "/v1/completions", body)
        told, usage = found["timings"]["reuse"], found["usage"]
        assert told["choice"] == "first:4" and told["why_not"] is None
        assert told["reused"] > 40
        assert told["missing"] == (told["reused"] + 12 if missing else 0)
        # What is computed before the first token that is reused is exact, and published.
        assert told["exact"] == (0 if missing else 8)
        assert told["recomputed"] == (12 if missing else 8)
        parts = [told[name] for name in ("exact", "reused", "recomputed", "computed")]
        assert sum(parts) == usage["prompt_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": told["exact"]}
        timings = found["timings"]
        assert timings["cache_n"] == told["exact"]
        assert timings["prompt_n"] == usage["prompt_tokens"] - told["exact"] - told["reused"]


def test_several_prompts_and_answers(client):
    body = {**COMPLETION, "prompt": [SEGMENTS, {"segments": ["a", MARKED[0], "b"]}], "n": 2}
    found = post(client, "/v1/completions", {**body, "reuse": "none"})
    assert len(found["choices"]) == 4
    counts = [choice["timings"]["reuse"]["reused"] for choice in found["choices"]]
    assert counts[0] == counts[1] > counts[2] == counts[3] > 0
    alone = post(client, "/v1/completions", {**COMPLETION, "reuse": "none"})
    assert found["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


def test_the_servers_choice_is_for_what_is_marked(serve):
    with serve(default=parse_reuse("first:4"), why_not=insisted) as client:
        found = post(client, "/v1/completions", COMPLETION)
        assert found["timings"]["reuse"]["choice"] == "first:4"
        plain = post(client, "/v1/completions", {**COMPLETION, "prompt": "x"})
        assert "reuse" not in plain["timings"]
        off = post(client, "/v1/completions", {**COMPLETION, "reuse": False})
        assert "reuse" not in off["timings"]
        own = post(client, "/v1/completions", {**COMPLETION, "reuse": "none"})
        assert own["timings"]["reuse"]["choice"] == "none"


@pytest.mark.parametrize("path", PATHS)
def test_what_nobody_vouches_for_is_refused(serve, path):
    with serve() as client:
        error = error_of(client.post(path, json={**PATHS[path], "reuse": "first:4"}))
        assert error["param"] == "reuse" and "--allow-unmeasured-reuse" in error["message"]
        choice = {"method": "none", "on_unsupported": "compute"}
        found = post(client, path, {**PATHS[path], "reuse": choice})
        plain = post(client, path, PATHS[path])
        assert found["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
        told = found["timings"]["reuse"]
        assert told["reused"] == 0 and "changes answers" in told["why_not"]


DOCUMENTS = {
    **CHAT,
    "messages": [{"role": "user", "content": QUESTION}],
    "documents": [{"text": text} for text in TEXTS],
}


@pytest.mark.parametrize("path_and_body", [*PATHS.items(), ("/v1/chat/completions", DOCUMENTS)])
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ReuseLimits(window=8), "not moved: a segment of"),
        (ReuseLimits("no rotation"), "not moved: no rotation"),
        (ReuseLimits(no_deviation="one layer"), "method hkvd cannot choose: one layer"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_refused_or_computed(serve, limits, words, path_and_body):
    """At every door: segments, parts of a chat, documents."""
    path, body = path_and_body
    with serve(why_not=insisted, limits=limits) as client:
        error = error_of(client.post(path, json={**body, "reuse": "hkvd:0.5"}))
        assert error["param"] == "reuse" and words in error["message"]
        choice = {"method": "hkvd", "ratio": 0.5, "on_unsupported": "compute"}
        found = post(client, path, {**body, "reuse": choice})
        assert words in found["timings"]["reuse"]["why_not"]
        plain = post(client, path, body)
        assert found["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    with serve(default=parse_reuse(choice), why_not=insisted, limits=limits) as client:
        assert words in post(client, path, body)["timings"]["reuse"]["why_not"]


LONG = {"segments": [{"text": "abcd " * 400, "reusable": True}]}
TWICE = [{"role": "user", "content": [{"type": "text", "text": " a ", "cache": "reusable"}]}]


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        *(
            (path, change, field)
            for path in PATHS
            for change, field in (
                ({"reuse": 5}, "reuse"),
                ({"reuse": True}, "reuse"),
                ({"reuse": "best"}, "reuse.method"),
                ({"reuse": {"method": "first"}}, "reuse.num_first"),
                ({"reuse": {"method": "hkvd", "ratio": 1.5}}, "reuse.ratio"),
                ({"reuse": {"method": "query", "ratio": 0.1, "num_rounds": 0}}, "reuse.num_rounds"),
                ({"reuse": "query:0.1:99"}, "reuse.num_rounds"),
                *(
                    ({"reuse": {"method": method, "ratio": ratio}}, "reuse.ratio")
                    for method in ("hkvd", "query")
                    for ratio in (-0.1, True, "0.5", [0.5])
                ),
                *(
                    ({"reuse": word}, "reuse.ratio")
                    for word in ("hkvd:nan", "query:inf", "query:x")
                ),
                ({"reuse": {"method": "none", "x": 1}}, "reuse.x"),
                ({"reuse": "none", "prompt_logprobs": 0}, "prompt_logprobs"),
            )
        ),
        ("/v1/completions", {"reuse": "none", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": LONG, "reuse": "none"}, "prompt"),
        ("/v1/completions", {"prompt": {"segments": []}}, "prompt.segments"),
        ("/v1/completions", {"prompt": {"segments": ["a", {}]}}, "prompt.segments[1]"),
        ("/v1/completions", {"prompt": {"segments": [5]}}, "prompt.segments[0]"),
        ("/v1/completions", {"prompt": {"segment": ["a"]}}, "prompt.segment"),
        (
            "/v1/completions",
            {"prompt": {"segments": [{"text": "a", "reusabel": True}]}},
            "prompt.segments[0].reusabel",
        ),
        ("/v1/completions", {"prompt": [SEGMENTS, "a"]}, "prompt"),
        (
            "/v1/completions",
            {"prompt": [SEGMENTS, {"segments": [{"text": "a", "token_ids": [1]}]}]},
            "prompt[1].segments[0]",
        ),
        ("/v1/completions", {"prompt": {"segments": [[10**6]]}}, "prompt"),
        ("/v1/completions", {"documents": [{"text": "a"}]}, "documents"),
        ("/v1/chat/completions", {"documents": ["a"]}, "documents[0]"),
        ("/v1/chat/completions", {"messages": TWICE, "reuse": "none"}, "messages[0].content[0]"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{**PARTS[0], "cache": "for ever"}]}]},
            "messages[0].content[0].cache",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(client, path, change, field):
    error = error_of(client.post(path, json={**PATHS[path], **change}))
    assert error["param"] == field and error["message"]


@pytest.mark.parametrize(
    ("ratio", "param"),
    [
        ("NaN", "ratio"),
        ("-Infinity", "ratio"),
        ("9" * 5000, "reuse[...]"),
        ("9" * 30, "reuse.ratio"),
    ],
    ids=lambda value: value[:9],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_ratio_that_is_no_json_or_no_number_is_refused(client, path, ratio, param):
    body = json.dumps({**PATHS[path], "reuse": {"method": "query", "ratio": "?"}})
    error = error_of(client.post(path, content=body.replace('"?"', ratio)))
    assert error["param"] == param


FAR_TOO_LONG = [{"text": "abcd " * 100, "reusable": True} for _ in range(4)]


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        ("/v1/completions", {"prompt": {"segments": FAR_TOO_LONG}}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{**PARTS[0], "text": "abcd " * 400}]}]},
            "messages",
        ),
        ("/v1/chat/completions", {"documents": [{"text": "abcd " * 400}]}, "messages"),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_unsupported", ["refuse", "compute"])
def test_segments_that_exceed_the_context_are_refused_however(
    client, path, change, field, on_unsupported
):
    choice = {"method": "none", "on_unsupported": on_unsupported}
    error = error_of(client.post(path, json={**PATHS[path], **change, "reuse": choice}))
    assert error["param"] == field and "maximum context length is 512" in error["message"]


def test_segments_that_fit_but_not_beside_the_prompt(checkpoint):
    """Are refused with the numbers, or all is computed."""
    args = EngineArgs(max_num_seqs=1, max_model_len=512, block_size=8)
    small = build(checkpoint, args)
    app = create_app(
        open_engine=in_thread(small.engine),
        codec=small.codec,
        config=small.scheduler_config,
        settings=ServerSettings(served_model_name=NAME, reuse=ReuseRules(why_not=insisted)),
    )
    marked = [{"text": "abcd " * (40 + n), "reusable": True} for n in range(3)]
    body = {**COMPLETION, "prompt": {"segments": ["a", *marked, "b"]}}
    with TestClient(app) as client:
        error = error_of(client.post("/v1/completions", json={**body, "reuse": "none"}))
        assert error["param"] == "reuse" and "blocks of KV and its segments" in error["message"]
        choice = {"method": "none", "on_unsupported": "compute"}
        found = post(client, "/v1/completions", {**body, "reuse": choice})
        assert "blocks of KV and its segments" in found["timings"]["reuse"]["why_not"]
        plain = post(client, "/v1/completions", body)
        assert found["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]


def test_documents_are_for_chats(client):
    error = error_of(client.post("/tokenize", json={"prompt": "a", "documents": [{"text": "a"}]}))
    assert error["param"] == "documents"


def test_a_prompt_that_is_scored_is_computed_in_full_if_that_is_asked(client):
    choice = {"method": "none", "on_unsupported": "compute"}
    body = {**COMPLETION, "prompt_logprobs": 0, "reuse": choice}
    found = post(client, "/v1/completions", body)
    assert "exact KV" in found["timings"]["reuse"]["why_not"]
    assert len(found["choices"][0]["prompt_logprobs"]) == found["usage"]["prompt_tokens"]


def test_segments_may_be_echoed(client, llm):
    for reuse in (None, "none"):
        found = post(client, "/v1/completions", {**COMPLETION, "echo": True, "reuse": reuse})
        text = "".join(["Read:\n", *TEXTS, QUESTION])
        assert found["choices"][0]["text"].startswith(text)
    body = {**COMPLETION, "echo": True, "logprobs": 0}
    scored = post(client, "/v1/completions", body)["choices"][0]["logprobs"]
    assert "".join(scored["tokens"]).startswith(text)


def test_what_a_template_changes_is_an_ordinary_prompt_without_reuse(client):
    plain = [{"role": "user", "content": " a "}]
    found = post(client, "/v1/chat/completions", {**CHAT, "messages": TWICE})
    expected = post(client, "/v1/chat/completions", {**CHAT, "messages": plain})
    assert found["prompt_token_ids"] == expected["prompt_token_ids"]


def test_openais_own_client_can_ask(built):
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(served_model_name=NAME, reuse=ReuseRules(why_not=insisted)),
    )
    extra = {"ignore_eos": True, "reuse": {"method": "first", "num_first": 4}}
    with (
        running(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=4, extra_body=extra
        )
        completion = client.completions.create(
            model=NAME, prompt=SEGMENTS, max_tokens=4, extra_body=extra
        )
    for reply in (chat, completion):
        assert reply.timings["reuse"]["reused"] > 40


def test_the_timeline_says_it_too(client):
    found = post(client, "/v1/completions", {**COMPLETION, "reuse": "first:4"})
    shown = client.get(f"/v1/requests/{found['id']}/timeline").json()["choices"][0]
    assert shown["reuse"] == found["timings"]["reuse"]
    plain = post(client, "/v1/completions", COMPLETION)
    shown = client.get(f"/v1/requests/{plain['id']}/timeline").json()["choices"][0]
    assert shown["reuse"] is None


def test_the_rules_that_flags_make(built):
    choice = reuse_choice("first:4")
    with pytest.raises(ConfigError, match=r"--reuse first:4: .* --allow-unmeasured-reuse"):
        reuse_rules(built, choice, allow_unmeasured=False)
    rules = reuse_rules(built, choice, allow_unmeasured=True)
    assert rules.default == replace(choice, on_unsupported="compute")
    assert rules.why_not(choice) is None and rules.limits == ReuseLimits()
    strict = reuse_rules(built, None, allow_unmeasured=False)
    assert strict.default is None and strict.why_not(choice) is not None
    assert reuse_choice("off") is None
    with pytest.raises(ConfigError, match="--reuse best: 'best' is not one of none, first"):
        reuse_choice("best")
    built_of_one = replace(built, model=replace(built.model, program=odd(num_hidden_layers=1)[0]))
    with pytest.raises(ConfigError, match=r"--reuse hkvd:0.5: .* this model has 1"):
        reuse_rules(built_of_one, reuse_choice("hkvd:0.5"), allow_unmeasured=True)
    uncached = replace(built.scheduler_config, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        reuse_rules(replace(built, scheduler_config=uncached), choice, allow_unmeasured=True)
