"""/load, /server_info, /tokenizer_info, /props, /slots: true, and nothing of other tenants."""

import threading

import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, make_app, post, wait_until
from starlette.testclient import TestClient

KEY, OTHER = "sk-one", "sk-two"
COMPLETION = {"model": MODEL, "prompt": "a secret", "max_tokens": 400}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def busy():
    """A client of a server in which two requests of KEY run, each with a token or more."""
    executor = SpeakingExecutor()
    app, _ = make_app(executor, api_keys=(KEY, OTHER))
    relay = app.state.relay
    with TestClient(app, headers=bearer(KEY)) as client:
        executor.gate.clear()
        body = {**COMPLETION, "n": 2}
        label = {**bearer(KEY), "X-Request-Id": "mine"}
        asking = threading.Thread(
            target=lambda: client.post("/v1/completions", json=body, headers=label)
        )
        asking.start()
        wait_until(lambda: relay.num_live == 2)
        yield client, relay, executor
        executor.step_s = 0.0
        executor.gate.set()
        asking.join(10)
        wait_until(lambda: relay.num_live == 0)


@pytest.fixture
def idle():
    with TestClient(make_app(SpeakingExecutor("ok"), max_num_queued_reqs=3)[0]) as client:
        yield client


def get(client, path, key=None):
    reply = client.get(path, headers=bearer(key) if key else {})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("path", ["/load", "/v1/load"])
def test_the_load_of_a_server_that_rests(idle, path):
    assert get(idle, path) == {
        "server_load": 0,
        "num_running": 0,
        "num_waiting": 0,
        "max_num_seqs": CONFIG.max_num_seqs,
        "max_num_queued_reqs": 3,
    }


def test_the_load_counts_what_was_not_seen_in_a_step_as_waiting(busy):
    client, *_ = busy
    told = get(client, "/load")
    assert (told["server_load"], told["num_running"], told["num_waiting"]) == (2, 0, 2)
    assert not any(slot["is_processing"] for slot in get(client, "/slots"))


def run_a_step(relay, executor):
    before = executor.num_steps
    executor.step_s = 0.05  # nothing is measured: the requests just must not end meanwhile
    executor.gate.set()
    wait_until(lambda: len(relay.started_ids()) == 2 and executor.num_steps > before)
    executor.gate.clear()


def test_slots_that_are_taken_show_numbers_to_their_owner(busy):
    client, relay, executor = busy
    run_a_step(relay, executor)
    assert get(client, "/load")["num_running"] == 2
    slots = get(client, "/slots")
    assert [slot["id"] for slot in slots] == list(range(CONFIG.max_num_seqs))
    assert [slot["is_processing"] for slot in slots] == [True] * 2 + [False] * 6
    assert slots[0]["id_task"] == "mine"
    assert slots[0]["n_prompt_tokens"] == len(COMPLETION["prompt"])
    assert 1 <= slots[0]["next_token"][0]["n_decoded"] <= COMPLETION["max_tokens"]
    assert slots[7] == {
        "id": 7,
        "n_ctx": CONFIG.context_length,
        "speculative": False,
        "is_processing": False,
    }


def test_others_learn_only_that_a_slot_is_taken(busy):
    client, relay, executor = busy
    run_a_step(relay, executor)
    slot = get(client, "/slots", OTHER)[0]
    assert set(slot) == {"id", "n_ctx", "speculative", "is_processing"}
    assert slot["is_processing"]
    for path in ("/slots", "/load", "/props", "/server_info"):
        for key in (KEY, OTHER):
            assert "secret" not in client.get(path, headers=bearer(key)).text


def test_no_free_slot_is_an_error_for_who_asks_so(idle):
    assert get(idle, "/slots?fail_on_no_slot=1") == get(idle, "/slots")
    relay = idle.app.state.relay
    full = [f"r{index}" for index in range(CONFIG.max_num_seqs)]
    relay.started_ids = lambda: frozenset(full)
    relay.history.running = lambda _: [Named(name) for name in full]
    assert idle.get("/slots?fail_on_no_slot=1").status_code == 503
    assert idle.get("/slots").status_code == 200


class Named:
    owner, num_prompt_tokens, num_output_tokens = b"", 1, 1

    def __init__(self, name):
        self.request_id = self.name = name


def test_props_are_what_holds(idle):
    told = get(idle, "/props")
    assert told["total_slots"] == CONFIG.max_num_seqs
    assert told["model_alias"] == MODEL
    settings = told["default_generation_settings"]
    assert settings["n_ctx"] == CONFIG.context_length
    assert settings["params"]["temperature"] == 1.0
    assert idle.post("/props", json={}).status_code == 405


def test_props_show_the_models_own_sampling():
    own = {"temperature": 0.25, "top_k": 7}
    with TestClient(make_app(SpeakingExecutor("ok"), default_sampling=own)[0]) as client:
        params = get(client, "/props")["default_generation_settings"]["params"]
    assert (params["temperature"], params["top_k"]) == (0.25, 7)


def test_the_tokenizer_is_told_as_evaluations_read_it(idle):
    told = get(idle, "/tokenizer_info")
    assert told["eos_token"] == "<end>" and told["bos_token"] is None
    assert told["model_max_length"] == CONFIG.max_model_len
    assert told["chat_template"] == "" and told["tokenizer_class"]


def test_the_server_tells_what_it_was_told(idle):
    told = get(idle, "/server_info")
    assert told["version"] == "1.2.3" and told["served_model_names"] == [MODEL]
    assert told["max_model_len"] == CONFIG.max_model_len
    assert told["runner"] == "generate"
    assert (told["num_blocks"], told["block_size"]) == (CONFIG.num_blocks, CONFIG.block_size)
    body = {"model": MODEL, "prompt": "a"}
    reply = post(idle, "/v1/completions", body)
    assert told["system_fingerprint"] == reply["system_fingerprint"]
