"""`duetto cache` asks a running server, and says it readably or as JSON."""

import io
import json
import sys
import urllib.request

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running

from duetto.cli.app import app as commands
from duetto.cli.cache import CacheServer, TextOptions, drop, lookup, ls, pin, unpin
from duetto.core.errors import ConfigError

PROMPT = "a prompt of more than one block"


@pytest.fixture(scope="module")
def server():
    app, _ = make_app(SpeakingExecutor("Hi!"))
    with running(app) as url:
        yield CacheServer(url=url)


@pytest.fixture(autouse=True)
def nothing_is_pinned(server):
    yield
    for each in server.ask("/v1/cache?limit=100")["data"]:
        server.ask("/v1/cache/drop", {"id": each["id"]})


def compute(server, prompt=PROMPT):
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with urllib.request.urlopen(request) as reply:
        reply.read()


def test_from_looking_up_to_dropping(server, capsys):
    def shown():
        return capsys.readouterr().out.strip()

    lookup(PROMPT, server=server)
    assert shown() == "0 of 31 tokens need not be computed"
    compute(server)
    lookup(PROMPT, server=server)
    first, second = shown().split("\n")
    assert first == "28 of 31 tokens need not be computed"
    assert second == "  0 ... 27: exact, in memory, priority 35"
    pin(PROMPT, ttl=600.4, server=server)
    said = shown()
    assert ": 28 tokens, 28 of them there, pinned, for 600 s; 7 of at most 64 blocks" in said
    name = said.split(":")[0]
    pin(PROMPT[:12], priority=80, server=server)
    shown()
    ls(server=server)
    listed = shown()
    assert name in listed and "priority 80" in listed and " s  " in listed
    assert listed.endswith("2 pins: 7 of at most 64 blocks are kept")
    drop(id=name, server=server)
    assert shown() == "4 blocks dropped; 3 stay, as other pins keep them"
    unpin(PROMPT[:12], server=server)
    assert "has ended; 0 of at most 64 blocks are kept" in shown()
    ls(server=server)
    assert shown() == "0 pins: 0 of at most 64 blocks are kept"


def test_of_what_is_marked_it_is_said_how_much_is_there(server, capsys, tmp_path):
    compute(server, "12345678")
    parts = [
        {"type": "text", "text": "12345678", "cache": "reusable"},
        {"type": "text", "text": "x"},
    ]
    (tmp_path / "m").write_text(json.dumps([{"role": "user", "content": parts}]))
    lookup(what=TextOptions(messages=tmp_path / "m"), server=server)
    *_, last = capsys.readouterr().out.strip().split("\n")
    assert last == "  reusable at 33 ... 40: 8 of its 8 tokens are there"


def test_json_is_what_the_server_says(server, capsys):
    def document():
        return json.loads(capsys.readouterr().out)

    pin(PROMPT, as_json=True, server=server)
    made = document()
    assert made["object"] == "cache.pin"
    ls(as_json=True, server=server)
    assert [each["id"] for each in document()["data"]] == [made["id"]]
    lookup(PROMPT, as_json=True, server=server)
    assert document()["object"] == "cache.lookup"
    unpin(id=made["id"], as_json=True, server=server)
    assert document()["deleted"]
    drop(PROMPT, as_json=True, server=server)
    assert document()["object"] == "cache.drop"


def test_many_pins_are_all_listed(server, capsys, monkeypatch):
    monkeypatch.setattr("duetto.cli.cache.PAGE", 2)
    for number in range(5):
        pin(what=TextOptions(token_ids=(number + 100,) * 4), server=server)
    capsys.readouterr()
    ls(as_json=True, server=server)
    assert len(json.loads(capsys.readouterr().out)["data"]) == 5


def test_a_text_comes_from_a_file_messages_ids_or_stdin(server, capsys, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(PROMPT)
    (tmp_path / "messages").write_text(json.dumps([{"role": "user", "content": "hi"}]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    for what, num_tokens in (
        (TextOptions(), 31),
        (TextOptions(file=tmp_path / "text"), 31),
        (TextOptions(file=tmp_path / "text", segment=True, cache_salt="x"), 31),
        (TextOptions(token_ids=(1, 2, 3)), 3),
        (TextOptions(token_ids=(1, 2, 3), segment=True), 3),
        (TextOptions(messages=tmp_path / "messages"), len("user: hi\nassistant: ")),
        (
            TextOptions(messages=tmp_path / "messages", add_generation_prompt=False),
            len("user: hi\n"),
        ),
    ):
        lookup(what=what, as_json=True, server=server)
        assert json.loads(capsys.readouterr().out)["num_tokens"] == num_tokens


def test_what_is_wrong_is_one_line(server, tmp_path):
    (tmp_path / "x").write_text('{"role": "user"}')
    for what, words in (
        (TextOptions(token_ids=(1,)), "--token-ids: with the text; give one of them"),
        (TextOptions(file=tmp_path / "none"), "--file: with the text"),
    ):
        with pytest.raises(ConfigError, match=words):
            lookup("text", what=what, server=server)
    for what, words in (
        (TextOptions(file=tmp_path / "none"), "--file .*none: cannot be read as text"),
        (TextOptions(messages=tmp_path / "x"), "--messages .*: must be a JSON list"),
        (TextOptions(messages=tmp_path / "x", segment=True), "--segment: with --messages"),
        (TextOptions(token_ids=(1,), add_generation_prompt=False), "needs --messages"),
    ):
        with pytest.raises(ConfigError, match=words):
            lookup(what=what, server=server)
    with pytest.raises(ConfigError, match="v1/cache/unpin: no pin of this id or text is there"):
        unpin(id="pin-999", server=server)
    with pytest.raises(ConfigError, match="priority: must be from 0 to 100"):
        pin(PROMPT, priority=101, server=server)
    with pytest.raises(ConfigError, match="is `duetto serve` running"):
        ls(server=CacheServer(url="http://127.0.0.1:1"))


def test_the_command_line_binds(capsys):
    command, bound, _ = commands.parse_args(
        ["cache", "pin", "text", "--ttl", "90s", "--priority", "80", "--url", "localhost:1"]
    )
    assert command is pin
    assert bound.arguments["ttl"] == 90.0 and bound.arguments["priority"] == 80
    assert bound.arguments["server"].url == "localhost:1"


@pytest.mark.parametrize(
    ("text", "ttl", "key", "message"),
    [
        (PROMPT, float("inf"), None, "this cannot be sent"),
        (PROMPT, float("nan"), None, "this cannot be sent"),
        ("a\udcff", None, None, "this cannot be sent"),
        (PROMPT, None, "é☃", "--api-key: must be ASCII"),
    ],
)
def test_what_cannot_be_sent_is_one_line(server, text, ttl, key, message):
    with pytest.raises(ConfigError, match=message):
        pin(text, ttl=ttl, server=CacheServer(url=server.url, api_key=key))
