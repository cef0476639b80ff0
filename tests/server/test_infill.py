"""`suffix` of completions, and llama.cpp's `/infill`: what runs, comes back, and is refused."""

import json
from dataclasses import replace

import pytest
from fakes import ByteCodec
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, chunks, make_app, post
from starlette.testclient import TestClient

PATH = "/v1/completions"
MARKERS = {"<|fim_prefix|>": 257, "<|fim_suffix|>": 258, "<|fim_middle|>": 259, "<|file_sep|>": 260}
PRE, SUF, MID, FILE = MARKERS.values()


class InfillCodec(ByteCodec):
    """With tokens for filling in the middle; nothing a text spells is one of them."""

    vocab_size = 261

    def token_id(self, token: str) -> int | None:
        return MARKERS.get(token)


class Listening(SpeakingExecutor):
    """Keeps the prompts."""

    def __init__(self, *said) -> None:
        super().__init__(*said)
        self.prompts = []

    def submit(self, batch):
        self.prompts += [r.token_ids for r in batch.requests if not r.num_computed_tokens]
        return super().submit(batch)


@pytest.fixture(scope="module")
def made():
    executor = Listening("mid")
    config = replace(CONFIG, enable_prefix_caching=False)  # or of a prompt only a part is computed
    with TestClient(make_app(executor, config=config, codec=InfillCodec())[0]) as client:
        yield client, executor


@pytest.fixture
def client(made):
    made[1].prompts.clear()
    return made[0]


def body(**more):
    return {"model": MODEL, "prompt": "ab", "suffix": "yz", "max_tokens": 8, **more}


def refusal(client, given, path=PATH):
    reply = client.post(path, json=given)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def prompt_of(before: str, behind: str) -> tuple[int, ...]:
    return (PRE, *before.encode(), SUF, *behind.encode(), MID)


def test_the_middle_of_a_text(made, client):
    reply = post(client, PATH, body())
    assert reply["choices"][0]["text"] == "mid"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert made[1].prompts == [prompt_of("ab", "yz")]
    assert reply["usage"]["prompt_tokens"] == 7


def test_streamed_and_with_several_prompts(made, client):
    events = chunks(client, PATH, body())
    assert "".join(event["choices"][0]["text"] for event in events) == "mid"
    reply = post(client, PATH, body(prompt=["a", "b"], n=2))
    assert [choice["text"] for choice in reply["choices"]] == ["mid"] * 4
    assert {*made[1].prompts} == {prompt_of(before, "yz") for before in ("ab", "a", "b")}


def test_ids_stand_before_the_hole_as_they_are(made, client):
    post(client, PATH, body(prompt=[97, 98]))
    post(client, PATH, body(prompt=""))
    assert made[1].prompts == [prompt_of("ab", "yz"), prompt_of("", "yz")]


def test_what_spells_a_marker_is_text(made, client):
    post(client, PATH, body(prompt="<|fim_middle|>", suffix="<|fim_prefix|>"))
    assert made[1].prompts == [prompt_of("<|fim_middle|>", "<|fim_prefix|>")]


@pytest.mark.parametrize("end", [FILE, MID])
def test_it_ends_where_the_model_begins_another_file(client, end):
    """As at its end of sequence: no reason is told, and nothing is shown of it."""
    bias = {"logit_bias": {str(end): 1}}
    (choice,) = post(client, PATH, body(**bias))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    (choice,) = post(client, PATH, body(ignore_eos=True, **bias))["choices"]
    assert choice["finish_reason"] == "length"
    (choice,) = post(client, PATH, body(suffix=None, **bias))["choices"]
    assert choice["finish_reason"] == "length"  # without a hole these end nothing


def test_rendered_it_is_what_would_run(client):
    (entry,) = post(client, PATH + "/render", body())
    assert entry["token_ids"] == list(prompt_of("ab", "yz"))


def test_an_empty_suffix_asks_for_nothing(made, client):
    post(client, PATH, body(suffix=""))
    post(client, PATH, body(suffix=None, prompt="abc"))
    assert made[1].prompts == [(97, 98), (97, 98, 99)]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"suffix": 3}, "suffix", "Expected"),
        ({"suffix": ["x"]}, "suffix", "Expected"),
        ({"echo": True}, "echo", "does not go with suffix"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "does not go with suffix"),
        ({"reuse": "all"}, "reuse", "does not go with suffix"),
        ({"prompt": {"segments": ["a"]}}, "prompt.segments", "does not go with suffix"),
        ({"prompt": [{"segments": ["a"]}]}, "prompt.segments", "does not go with suffix"),
        ({"prompt": [300]}, "prompt", "outside the vocabulary"),
        ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
        ({"suffix": "x" * 600}, "prompt", "512 tokens"),
        ({"prompt": "x" * 300, "suffix": "y" * 300}, "prompt", "at least 600"),
        ({"prompt": "x" * 250, "suffix": "y" * 258}, "max_tokens", "519"),
    ],
)
def test_what_does_not_go_together_is_named(client, more, param, words):
    error = refusal(client, body(**more))
    assert error["param"] == param and words in error["message"], error


def test_a_model_without_the_tokens_says_so():
    with TestClient(make_app(SpeakingExecutor("ok"))[0]) as client:
        error = refusal(client, body())
        assert error["param"] == "suffix"
        assert "this model's tokenizer has no tokens" in error["message"]
        assert CONFIG.max_model_len == 512  # which the cases above count with


# --- llama.cpp's own route -----------------------------------------------------------------------

INFILL = "/infill"
MIDDLE = ("mid", "eos", "")


def infill(**more):
    return {"input_prefix": "ab", "input_suffix": "yz", "n_predict": 8, **more}


def streamed(client, given) -> list[dict]:
    reply = client.post(INFILL, json={**given, "stream": True})
    assert reply.status_code == 200, reply.text
    events = reply.text.split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_llamacpps_reply(made, client):
    reply = post(client, INFILL, infill())
    assert made[1].prompts == [prompt_of("ab", "yz")]
    assert (reply["content"], reply["stop"], reply["stop_type"]) == ("mid", True, "eos")
    counts = ("tokens_predicted", "tokens_evaluated", "tokens_cached", "truncated", "tokens")
    assert [reply[name] for name in counts] == [4, 7, 0, False, []]
    assert (reply["model"], reply["has_new_line"], reply["stopping_word"]) == (MODEL, False, "")
    assert reply["generation_settings"]["n_predict"] == 8
    assert reply["timings"]["predicted_n"] == 4
    assert "ab" in reply["prompt"]


def test_llamacpps_stream(client):
    *events, last = streamed(client, infill())
    assert "".join(event["content"] for event in [*events, last]) == "mid"
    assert not any(event["stop"] for event in events) and last["stop"]
    assert [i for event in [*events, last] for i in event["tokens"]] == [*b"mid", 256]
    assert (last["stop_type"], last["tokens_predicted"], last["tokens_evaluated"]) == ("eos", 4, 7)


def test_what_stands_before_and_other_files(made, client):
    extra = [{"filename": "a.py", "text": "x"}, {"text": "y"}]
    post(client, INFILL, infill(prompt="cd", input_extra=extra))
    post(client, INFILL, infill(input_prefix="", input_suffix="", input_extra=[]))
    files = (FILE, *b"a.py\nx", FILE, *b"tmp\ny", FILE, *b"filename\n")
    assert made[1].prompts == [(*files, *prompt_of("abcd", "yz")), prompt_of("", "")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"n_predict": 2}, ("mi", "limit", "")),
        ({"stop": ["d"]}, ("mi", "word", "d")),
        ({"stop": "d"}, ("mi", "word", "d")),
        ({"n_predict": -1, "seed": -1, "stop": [], "id_slot": 0, "cache_prompt": True}, MIDDLE),
        ({"temperature": 0, "top_k": 40, "top_p": 0.9, "min_p": 0, "repeat_penalty": 1.1}, MIDDLE),
        ({"n_indent": 0, "t_max_predict_ms": 0, "samplers": [], "model": MODEL}, MIDDLE),
    ],
)
def test_its_names_of_sampling(client, more, said):
    reply = post(client, INFILL, infill(**more))
    assert (reply["content"], reply["stop_type"], reply["stopping_word"]) == said


def test_its_fields_are_chosen_by_the_client(client):
    fields = ["content", "timings/predicted_n", "gone", "timings/gone", "content/x"]
    reply = post(client, INFILL, infill(response_fields=fields, return_tokens=True))
    assert reply == {"content": "mid", "timings/predicted_n": 4}
    assert post(client, INFILL, infill(return_tokens=True))["tokens"] == [*b"mid", 256]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"input_prefix": None}, "input_prefix", "Expected"),
        ({"input_suffix": 3}, "input_suffix", "Expected"),
        ({"input_extra": {}}, "input_extra", "Expected"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra[0].text", "is required"),
        ({"input_extra": [{"text": "a", "path": "b"}]}, "input_extra[0].path", "not a known field"),
        ({"prompt": ["a"]}, "prompt", "Expected"),
        ({"n_predict": 0}, "n_predict", "1"),
        ({"n_predict": -2}, "n_predict", "1"),
        ({"n_predict": 10**9}, "n_predict", "512 tokens"),
        ({"repeat_penalty": -1}, "repeat_penalty", ""),
        ({"temperature": -1}, "temperature", ""),
        ({"logit_bias": {"900": 1}}, "logit_bias", "outside the vocabulary"),
        ({"n_indent": 4}, "n_indent", "accepted: 0"),
        ({"samplers": ["top_k"]}, "samplers", "accepted: []"),
        ({"t_max_predict_ms": 500}, "t_max_predict_ms", "accepted: 0"),
        ({"n_probs": 3}, "n_probs", "accepted: 0"),
        ({"response_fields": "content"}, "response_fields", "Expected"),
        ({"input_suffix": "x" * 600}, "input_prefix", "512 tokens"),
        ({"input_extra": [{"text": "x" * 600}]}, "input_prefix", "512 tokens"),
        ({"inputs": "x"}, "inputs", "is not a known field"),
    ],
)
def test_what_is_wrong_with_an_infill_is_named(client, more, param, words):
    error = refusal(client, infill(**more), INFILL)
    assert error["param"] == param and words in error["message"], error


def test_an_infill_of_a_model_without_the_tokens():
    with TestClient(make_app(SpeakingExecutor("ok"))[0]) as client:
        error = refusal(client, infill(), INFILL)
        assert error["param"] == "input_suffix"
        assert "this model's tokenizer has no tokens" in error["message"]
