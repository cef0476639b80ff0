"""`duetto explain` asks a running server and says it readably."""

import json
import urllib.request

import pytest
from rich.console import Console
from server.fakes_server import MODEL, SpeakingExecutor, make_app, post, running, wait_until
from starlette.testclient import TestClient

from duetto.cli.explain import explain, show
from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import ReuseRules, insisted

KEY = "sk-mine"


def ask(url, prompt, key=None):
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 30}).encode()
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def server():
    executor = SpeakingExecutor("Hi!", step_s=0.001)
    app, _ = make_app(executor)
    with running(app) as url:
        executor.step_s = 0.05
        slow = ask(url, "the slow one, with a long prompt")
        executor.step_s = 0.001
        fast = ask(url, "x")
        wait_until(lambda: len(app.state.relay.history.steps()) == 8)
        yield url, slow, fast


def test_the_slowest_request_is_explained(server, capsys):
    url, slow, _ = server
    explain(url=url)
    shown = capsys.readouterr().out
    assert slow["id"].removeprefix("cmpl-") in shown
    assert "went to" in shown and "prefix cache: 0 tokens came from the cache" in shown
    assert "reuse: no part of the prompt is marked reusable" in shown
    assert "its prompt" in shown and "decoded" in shown


def test_one_request_is_explained_by_its_id(server, capsys):
    url, _, fast = server
    explain(fast["id"], url=url, json_output=True)
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    assert choice["prompt_tokens"] == 1 and choice["cache_miss"]["reason"] == "too_short"


def test_a_request_that_runs_is_shown(capsys):
    show(
        {
            "id": "r",
            "finish_reason": None,
            "prompt_tokens": 8,
            "why": "it is still running, for 4.00 s: it waits in the queue.",
            "segments": [{"kind": "wait", "start_ms": 0.0, "ms": 4000.0}],
        },
        Console(highlight=False),
    )
    shown = capsys.readouterr().out
    assert "r: 8 prompt tokens" in shown and "still running" in shown and "waited" in shown


def test_reuse_has_a_line_where_it_was_asked_for(capsys):
    text = {"text": "twelve bytes", "reusable": True}
    app, _ = make_app(SpeakingExecutor("Hi!"), reuse=ReuseRules(why_not=insisted))

    def shown(client, *segments):
        body = {"model": MODEL, "prompt": {"segments": [*segments]}, "reuse": "first:2"}
        reply = post(client, "/v1/completions", body)
        wait_until(lambda: client.get(f"/v1/requests/{reply['id']}/timeline").is_success)
        timeline = client.get(f"/v1/requests/{reply['id']}/timeline").json()
        show(timeline["choices"][0], Console(highlight=False, width=200))
        return capsys.readouterr().out

    with TestClient(app) as client:
        found = shown(client, "ab", text, "?")
        assert (
            "reuse: first:2: 10 tokens of segments reused, 2 computed in their place; 12 " in found
        )
        assert "tokens 2 to 13: all were computed alone: nothing remembered begins" in found
        assert "tokens 2 to 13: their own KV was there" in shown(client, "ab", text, "?")
        assert "reuse: first:2: none, as nothing is marked" in shown(client, "ab")


@pytest.mark.parametrize("num_drafts", [0, 37])
def test_drafts_have_a_column_where_there_were_any(capsys, num_drafts):
    segment = {
        "kind": "decode", "start_ms": 0.0, "ms": 9.0, "steps": 20, "tokens": 57,
        "drafts": num_drafts, "others_prompt_tokens": 0, "steps_expected_ms": None,
        "of_roof": None, "longest_step_ms": 1.0,
    }  # fmt: skip
    wait = {"kind": "wait", "start_ms": 0.0, "ms": 1.0}
    told = {"id": "r", "finish_reason": None, "prompt_tokens": 8, "why": "so far."}
    show(told | {"segments": [wait, segment]}, Console(highlight=False))
    shown = capsys.readouterr().out
    assert ("drafts" in shown) == ("37" in shown) == bool(num_drafts)


def test_the_steps_are_written_for_perfetto(server, tmp_path):
    url, _, _ = server
    explain(url=url, trace=tmp_path / "steps.json")
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" and e["pid"] == 1 for e in events) == 8


def test_a_request_is_named_as_its_client_and_the_log_name_it(capsys):
    app, _ = make_app(SpeakingExecutor("Hi!"))
    with running(app) as url:
        body = json.dumps({"model": MODEL, "prompt": "y", "max_tokens": 3, "n": 2}).encode()
        headers = {"Content-Type": "application/json", "X-Request-Id": "my-label"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/completions", body, headers)
        ) as reply:
            assert json.load(reply)["id"] == "cmpl-my-label"
        explain("my-label", url=url)
        shown = capsys.readouterr().out
        assert "my-label-0: 1 prompt tokens" in shown and "my-label-1: 1 prompt tokens" in shown


def test_what_cannot_be_explained_is_one_line(server):
    url, _, _ = server
    with pytest.raises(ConfigError, match="v1/requests/nope/timeline: no request of this id"):
        explain("nope", url=url)
    with pytest.raises(ConfigError, match="no request of this id"):
        explain("nope/../x", url=url)
    with pytest.raises(ConfigError, match="is `duetto serve` running"):
        explain(url="http://127.0.0.1:1")


def test_a_key_is_needed_where_the_server_asks_for_one(monkeypatch, capsys):
    monkeypatch.delenv("DUETTO_API_KEY", raising=False)
    app, _ = make_app(SpeakingExecutor("Hi!"), api_keys=(KEY,))
    with running(app) as url:
        with pytest.raises(ConfigError, match="API key"):
            explain(url=url)
        with pytest.raises(ConfigError, match="nothing to explain"):
            explain(url=url, api_key=KEY)
        ask(url, "x", KEY)
        monkeypatch.setenv("DUETTO_API_KEY", KEY)
        explain(url=url)
        assert "went to" in capsys.readouterr().out
