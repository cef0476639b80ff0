"""Keys, ids, origins and labels: what surrounds every request."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.fakes_server import MODEL, SpeakingExecutor, make_app
from starlette.routing import Route
from starlette.testclient import TestClient

from duetto.core.errors import ConfigError
from duetto.server.http.middleware import MAX_ID_CHARS, OPEN_PATHS
from duetto.server.settings import ServerSettings

KEY, OTHER = "sk-one", "sk-two"
COMPLETION = {"model": MODEL, "prompt": "a prompt of more than one block", "max_tokens": 1}


@pytest.fixture(scope="module")
def app():
    return make_app(SpeakingExecutor("ok"), api_keys=(KEY, OTHER))[0]


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as made:
        yield made


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_the_open_ones_needs_a_key(client, app):
    """A new route without a decision fails here."""
    assert all(type(route) is Route for route in app.routes)
    open_paths = set()
    for route in app.routes:
        path = route.path.replace("{id:path}", MODEL)
        for method in sorted(route.methods):
            status = client.request(method, path).status_code
            assert (status == 401) == (path not in OPEN_PATHS), (method, path, status)
            if status != 401:
                open_paths.add(path)
    assert open_paths == {"/health", "/ping", "/version", "/metrics"}


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1/models/", "/v1/%6dodels", "/health/", "/health/../v1/models", "/HEALTH",
     "/v1/models?x=/health", "/nope", "/health%00"],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_around_the_key(client, path):
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"Host": "x/health?"}).status_code == 401


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer sk-on", "Bearer sk-onee", "Bearer SK-ONE", "Basic sk-one",
     "sk-one", "Bearer sk-one, sk-two", "Bearer sk-ön"],
)  # fmt: skip
def test_a_wrong_key_is_401(client, value):
    reply = client.get("/v1/models", headers={"Authorization": value.encode("latin-1")})
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_each_key_is_accepted_and_shares_no_cache_with_another(client):
    def cached(key):
        reply = client.post("/v1/completions", json=COMPLETION, headers=bearer(key))
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(KEY), cached(KEY), cached(OTHER), cached(OTHER)] == [0, 28, 0, 28]
    assert client.get("/v1/models", headers={"Authorization": f"bearer  {KEY}"}).is_success


def test_the_callers_id_is_echoed_as_a_label(client):
    assert (
        client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    )
    for path in ("/health", "/nope", "/v1/models"):
        made = client.get(path).headers["X-Request-Id"]
        assert len(made) == 32 and made != client.get(path).headers["X-Request-Id"]


@pytest.mark.parametrize("sent", [b"a\tb c", b"x" * 5000, b"\xff\xfe", b'{"a":1}', b" "])
def test_an_id_cannot_forge_anything(client, sent):
    got = client.get("/health", headers={"X-Request-Id": sent}).headers["X-Request-Id"]
    assert 1 <= len(got) <= MAX_ID_CHARS and got.isascii() and not set(got) & set(' \t{}"')


def test_two_requests_with_one_id_do_not_meet(client):
    headers = {**bearer(KEY), "X-Request-Id": "same"}
    ids = {client.post("/v1/completions", json=COMPLETION, headers=headers).json()["id"]
           for _ in range(2)}  # fmt: skip
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8080", True),
        ("http://localhost.evil.example", False),
        ("http://evil.example", False),
        ("http://127.0.0.1.evil.example:80", False),
        ("null", False),
    ],
)
def test_only_local_pages_may_read_replies(client, origin, allowed):
    reply = client.get("/health", headers={"Origin": origin})
    assert reply.headers.get("access-control-allow-origin") == (origin if allowed else None)
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    assert client.options("/v1/completions", headers=ask).is_success == allowed


LISTED = (
    "https://app.example",
    "https://ported.example:8443",
    "http://PLAIN.example:80",
    "chrome-extension://abcdefghijklmnop",
    "tauri://localhost",
    "app://.",
    "vscode-webview://*",
    "null",
    "file://",
    "http://[fd00::1]:3000",
    "http://[2001:db8::1]:80",
)


@pytest.mark.parametrize(
    ("listed", "origin", "allowed"),
    [
        (LISTED, "https://app.example", True),
        (LISTED, "http://app.example", False),
        (LISTED, "https://app.example:444", False),
        (LISTED, "https://app.example.evil", False),
        (LISTED, "https://appxexample", False),
        (LISTED, "https://ported.example:8443", True),
        (LISTED, "https://ported.example", False),
        (LISTED, "http://plain.example", True),
        (LISTED, "chrome-extension://abcdefghijklmnop", True),
        (LISTED, "chrome-extension://other", False),
        (LISTED, "tauri://localhost", True),
        (LISTED, "app://.", True),
        (LISTED, "app://x", False),
        (LISTED, "vscode-webview://0kd9b", True),
        (LISTED, "null", True),
        (LISTED, "file://", True),
        (LISTED, "http://[fd00::1]:3000", True),
        (LISTED, "http://[fd00::1]", False),
        (LISTED, "http://[2001:db8::1]", True),
        (LISTED, "http://localhost:3000", False),
        (("*",), "https://any.example", True),
        (("*", "null"), "null", True),
        ((), "http://localhost:3000", True),
        ((), "null", False),
        ((), "chrome-extension://abcdefghijklmnop", False),
    ],
)
def test_the_operator_lists_the_origins(listed, origin, allowed):
    with TestClient(make_app(SpeakingExecutor("ok"), allowed_origins=listed)[0]) as client:
        shown = client.get("/health", headers={"Origin": origin}).headers.get(
            "access-control-allow-origin"
        )
        assert shown in ((origin, "*") if allowed else (None,))
        ask = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "content-type,x-stainless-os",
               "Access-Control-Request-Private-Network": "true"}  # fmt: skip
        assert client.options("/v1/chat/completions", headers=ask).is_success == allowed
        reply = client.post(
            "/v1/completions",
            content=json.dumps(COMPLETION),
            headers={"Origin": origin, "Content-Type": "text/plain"},
        )
        assert reply.status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    "origin",
    ["app.example", "https://app.example/", "https://", "http://*", "https://*.example", "https:",
     "", "https://a.example,https://b.example", '["*"]', "https://u@a.example", "a b://c",
     "https://münchen.example", "http://[::1]x", "http://[::1]:"],
)  # fmt: skip
def test_what_is_no_origin_is_refused_at_start(origin):
    with pytest.raises(ConfigError, match="--allowed-origins"):
        ServerSettings(served_model_name=MODEL, allowed_origins=("null", origin))


SIMPLE = ["text/plain", "text/plain;charset=UTF-8", "TEXT/PLAIN; a=application/json", None,
          "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]  # fmt: skip


def send(client, kind, headers):
    body = json.dumps(COMPLETION)
    kinds = {} if kind is None else {"Content-Type": kind}
    return client.post("/v1/completions", content=body, headers={**kinds, **headers})


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://localhost.evil.example"}, 403),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, 200),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_a_foreign_page_cannot_make_a_keyless_server_compute(kind, headers, status):
    """A browser asks first only where the request is not simple; these it sends at once."""
    executor = SpeakingExecutor("ok")
    with TestClient(make_app(executor)[0]) as client:
        reply = send(client, kind, headers)
        assert reply.status_code == status
        if status == 403:
            assert reply.json()["error"]["code"] == "origin_not_allowed"
            assert "--allowed-origins" in reply.json()["error"]["message"]
            assert executor.num_steps == 0
        assert client.get("/v1/models", headers=headers).is_success


def test_where_every_page_may_none_is_foreign():
    with TestClient(make_app(SpeakingExecutor("ok"), allowed_origins=("*",))[0]) as client:
        assert send(client, "text/plain", {"Sec-Fetch-Site": "cross-site"}).is_success


def test_what_a_browser_asks_about_first_is_left_to_the_browser(client):
    foreign = {"Origin": "https://evil.example"}
    with TestClient(make_app(SpeakingExecutor("ok"))[0]) as keyless:
        assert send(keyless, "application/json", foreign).is_success
    assert send(client, "text/plain", {**foreign, **bearer(KEY)}).is_success
    assert send(client, "text/plain", foreign).status_code == 401


@pytest.fixture(scope="module")
def local():
    with TestClient(make_app(SpeakingExecutor("ok"), only_local_hosts=True)[0]) as made:
        yield made


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:8000", "[::1]", "[::1]:8000"],
)
def test_a_local_server_answers_to_its_own_names(local, host):
    assert local.post("/v1/completions", json=COMPLETION, headers={"Host": host}).is_success


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
     "192.168.1.5", "0.0.0.0", "[::]", "", ":8000", "127.0.0.1:8000@evil.example", "[::1].evil",
     "evil.example#localhost", "2130706433", "localhost:8000:9"],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_refused(local, host):
    """DNS rebinding: a page of a foreign name, whose address has become ours, is same-origin."""
    for reply in (
        local.get("/v1/models", headers={"Host": host}),
        local.get("/metrics", headers={"Host": host}),
        local.post("/v1/completions", json=COMPLETION, headers={"Host": host}),
    ):
        assert reply.status_code == 403
        error = reply.json()["error"]
        assert error["code"] == "host_not_allowed" and "--api-key" in error["message"]
    assert local.get("/health", headers={"Host": host}).is_success
    assert local.get("/ping", headers={"Host": host}).is_success


def test_of_two_hosts_both_must_be_local(local):
    hosts = [("Host", "localhost"), ("Host", "evil.example")]
    assert local.get("/v1/models", headers=hosts).status_code == 403


def test_a_server_with_a_key_answers_to_every_name(client):
    headers = {**bearer(KEY), "Host": "evil.example"}
    assert client.get("/v1/models", headers=headers).is_success


def test_labels_come_from_closed_sets(client):
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        client.request("BREW" if path == "/a" else "GET", path, headers=bearer(KEY))
    text = client.get("/metrics").text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    seen = {(s.labels["handler"], s.labels["method"], s.labels["status"])
            for s in families["http_requests"].samples}  # fmt: skip
    assert ("other", "other", "4xx") in seen
    assert ("/v1/models/{id}", "GET", "4xx") in seen
    assert not [s for s in seen if s[0] in ("/a", "/b", "/v1/models/x") or s[1] == "BREW"]
