"""Who may wait: at most half of the places are one client's while others ask."""

import socket
import threading
import time

import httpx2
import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, make_app, running, wait_until

from duetto.server.http.errors import ApiError
from duetto.server.http.places import ASKING_S, Places, client_of

LONG = {"model": MODEL, "prompt": "a prompt of more than one block", "max_tokens": 400}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def refusal(places, client, count=1):
    try:
        places.ask(client, count)
    except ApiError as error:
        return error.status
    return None


def fill(places, client, most=1000):
    """Take places one by one until one is refused; how many, and why no more."""
    for number in range(most):
        status = refusal(places, client)
        if status is not None:
            return number, status
        places.take(client, 1)
    return most, None


def test_a_client_that_is_alone_may_have_all(clock):
    places = Places(8, 6, clock)
    assert fill(places, b"a") == (14, 503)


def test_while_others_ask_a_client_has_half_of_the_places_to_wait(clock):
    places = Places(8, 6, clock)
    places.ask(b"b", 1)
    places.take(b"b", 1)
    assert fill(places, b"a") == (7 + 3, 429)  # beside one of b's that runs
    assert fill(places, b"b") == (3 - 1, 429)  # it holds one, which is not known to run
    places.start(b"b")
    assert fill(places, b"b") == (1, 429)
    assert refusal(places, b"c") is None


def test_what_one_held_while_it_was_alone_keeps_nobody_out(clock):
    places = Places(8, 6, clock)
    for _ in range(14):
        places.ask(b"a", 1)
        places.take(b"a", 1)
    for _ in range(8):
        places.start(b"a")
    assert fill(places, b"b") == (3, 429)
    assert refusal(places, b"a") == 429  # and it may have no more than its half again
    assert places.num_held == 8 + 6 + 3  # half as many more as there are places to wait
    assert refusal(places, b"c") == 503
    places.give_back(b"a", 4, has_started=True)
    for _ in range(3):
        places.start(b"a")
    assert refusal(places, b"c") is None


def test_who_asked_a_while_ago_asks_no_more(clock):
    places = Places(8, 6, clock)
    places.ask(b"b", 1)
    clock.now = ASKING_S
    assert fill(places, b"a")[1] == 429
    clock.now = 2 * ASKING_S + 1
    assert fill(places, b"a")[1] == 503


def test_when_to_come_back_follows_from_how_fast_requests_end(clock):
    places = Places(2, 4, clock)
    places.ask(b"b", 1)
    fill(places, b"a")
    with pytest.raises(ApiError) as refused:
        places.ask(b"a", 3)
    assert refused.value.headers["Retry-After"] == "1"  # nothing is known
    for _ in range(3):
        clock.now += 2.0
        places.start(b"a")
        places.give_back(b"a", 1, has_started=True)
    clock.now += 0.5
    with pytest.raises(ApiError) as refused:
        places.ask(b"a", 6)
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    assert refused.value.body["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"client": ("127.0.0.1", 1)}, {"client": ("127.0.0.1", 2)}, True),
        ({"client": ("127.0.0.1", 1)}, {"client": ("127.0.0.2", 1)}, False),
        ({"client": ("2001:db8::1", 1)}, {"client": ("2001:db8::ffff:2", 1)}, True),
        ({"client": ("2001:db8::1", 1)}, {"client": ("2001:db8:0:1::1", 1)}, False),
        ({"client": ("::ffff:10.0.0.1", 1)}, {"client": ("10.0.0.1", 1)}, True),
        ({"client": ("::ffff:10.0.0.1", 1)}, {"client": ("::ffff:10.0.0.2", 1)}, False),
        ({"client": ("testclient", 1)}, {"client": None}, False),
        ({"client": None}, {}, True),
        (
            {"client": ("10.0.0.1", 1), "state": {"tenant": b"k"}},
            {"client": ("10.0.0.2", 1), "state": {"tenant": b"k"}},
            True,
        ),
        ({"state": {"tenant": b"k"}}, {"state": {"tenant": b"l"}}, False),
        (
            {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"1.2.3.4")]},
            {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", b"1.2.3.5")]},
            True,
        ),
    ],
)
def test_who_is_a_client(one, other, same):
    assert (client_of(one) == client_of(other)) == same


def post_from(address, url, body):
    """A request from a source address of this machine; status and headers."""
    transport = httpx2.HTTPTransport(local_address=address)
    with httpx2.Client(transport=transport, timeout=30) as client:
        return client.post(f"{url}/v1/completions", json=body)


def can_be_source(address):
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_flood_of_one_client_leaves_another_its_answers(has_keys):
    if not has_keys and not can_be_source("127.0.0.2"):
        pytest.skip("this system has one loopback address")
    executor = SpeakingExecutor(step_s=0.002)
    keys = {"api_keys": ("one", "two")} if has_keys else {}
    app, engine = make_app(executor, max_num_queued_reqs=16, **keys)
    done = threading.Event()

    def ask(number, url, body):
        if not has_keys:
            return post_from(f"127.0.0.{number + 1}", url, body)
        headers = {"Authorization": f"Bearer {('one', 'two')[number]}"}
        return httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)

    flooded = []

    def flood(url):
        while not done.is_set():
            body = {**LONG, "prompt": "flood", "n": 4, "max_tokens": 300}
            flooded.append(ask(0, url, body))
            if flooded[-1].status_code != 200:
                time.sleep(0.02)

    with running(app) as url:
        threads = [threading.Thread(target=flood, args=(url,)) for _ in range(8)]
        for each in threads:
            each.start()
        wait_until(lambda: app.state.relay.num_live > CONFIG.max_num_seqs)
        steps = []
        for number in range(6):
            before = executor.num_steps
            reply = ask(1, url, {**LONG, "prompt": f"small {number}", "max_tokens": 3})
            assert reply.status_code == 200, reply.text
            steps.append(executor.num_steps - before)
        done.set()
        for each in threads:
            each.join(30)
        wait_until(lambda: not engine.has_work)
        engine.scheduler.check()
    assert sorted(steps)[3] < 100  # an answer of the other's is 300
    refused = [reply for reply in flooded if reply.status_code != 200]
    assert all(reply.status_code in (429, 503) for reply in refused)
    assert any(reply.status_code == 429 for reply in refused)
    assert all(int(reply.headers["Retry-After"]) >= 1 for reply in refused)
