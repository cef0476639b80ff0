"""An id that the model has no row for is a 400 that names its field; one without a token is not."""

import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app
from starlette.testclient import TestClient
from tiny_tokenizers import byte_level_bpe
from tokenizers import AddedToken

from duetto.checkpoints.tokenizer import Tokenizer

IMAGE = "<image_soft_token>"
PATHS = ("/v1/completions", "/v1/chat/completions")


class Chatty(Tokenizer):
    def render_chat(self, messages, *, add_generation_prompt=True, **_):
        return "".join(m["content"] for m in messages)


def codec_of(more_rows):
    """Without a row: its last token. Or the other way round."""
    library = byte_level_bpe()
    library.add_tokens([AddedToken(IMAGE, normalized=False)])
    return Chatty(library, vocab_size=library.get_vocab_size() + more_rows)


@pytest.fixture(scope="module", params=[-1, 271], ids=["fewer rows", "more rows"])
def served(request):
    codec = codec_of(request.param)
    with TestClient(make_app(SpeakingExecutor(), codec=codec)[0]) as client:
        yield client, codec, request.param < 0


def check(reply, is_refused, param):
    if not is_refused:
        assert reply.status_code == 200, reply.text
        return
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and error["message"]


def body(path, prompt="the dog", **more):
    if path == "/v1/completions":
        return {"model": MODEL, "prompt": prompt, "max_tokens": 1, **more}
    message = {"role": "user", "content": prompt}
    return {"model": MODEL, "messages": [message], "max_tokens": 1, **more}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_an_id_in_a_field(served, path, field):
    client, codec, _ = served
    for token_id, is_refused in ((codec.vocab_size - 1, False), (codec.vocab_size, True)):
        value = {str(token_id): 1.0} if field == "logit_bias" else [token_id, 5]
        check(client.post(path, json=body(path, **{field: value})), is_refused, field)


@pytest.mark.parametrize("path", PATHS)
def test_a_text_that_spells_it(served, path):
    client, _, lacks = served
    text = f"look: {IMAGE}"
    reply = client.post(path, json=body(path, text))
    check(reply, lacks, "prompt" if path == "/v1/completions" else "messages")
    if lacks:
        assert IMAGE in reply.json()["error"]["message"]
    check(client.post(path, json=body(path, bad_words=[IMAGE])), lacks, "bad_words")
    check(client.post("/tokenize", json={"prompt": text}), lacks, "prompt")


def test_ids_as_a_prompt(served):
    client, codec, _ = served
    for token_id, is_refused in ((codec.vocab_size - 1, False), (codec.vocab_size, True)):
        for prompt in ([token_id], [5, token_id], [[5], [token_id]]):
            reply = client.post("/v1/completions", json=body("/v1/completions", prompt))
            check(reply, is_refused, "prompt")
        check(client.post("/detokenize", json={"tokens": [5, token_id]}), is_refused, "tokens")


def test_an_id_without_a_token_shows_as_nothing():
    codec = codec_of(271)
    with TestClient(make_app(SpeakingExecutor(), codec=codec)[0]) as client:
        ids = codec.encode("the dog")
        padded = [codec.vocab_size - 1, *ids, codec.vocab_size - 2]
        assert client.post("/detokenize", json={"tokens": padded}).json() == {"prompt": "the dog"}
        asked = body("/v1/completions", padded, echo=True, logprobs=0, max_tokens=0)
        (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
        assert choice["text"] == "the dog"
        assert choice["logprobs"]["tokens"][0] == choice["logprobs"]["tokens"][-1] == ""
        assert choice["logprobs"]["text_offset"][-1] == len("the dog")
