"""A tokenizer library that panics costs one request its answer; the server serves the next."""

import pytest
from fakes import FunctionExecutor
from server.fakes_server import CONFIG, MODEL, has_all_blocks
from starlette.testclient import TestClient
from tiny_tokenizers import character_level
from tokenizers import Regex, decoders, normalizers

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.scheduler.scheduler import Scheduler
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

LONG_RUN = "o" * 3000 + "g"


class Chatty(Tokenizer):
    def render_chat(self, messages, *, add_generation_prompt=True, **_):
        return "".join(m["content"] for m in messages)


@pytest.fixture(scope="module")
def served():
    """A space alone cannot be decoded, a long run of o cannot be encoded."""
    library = character_level()
    library.normalizer = normalizers.Replace(Regex("(o+)+$"), "o")
    library.decoder = decoders.Sequence([decoders.Strip(" ", 1, 1), decoders.Fuse()])
    space, letter = library.token_to_id(" "), library.token_to_id("g")
    codec = Chatty(library)
    executor = FunctionExecutor(lambda _id, _n: executor.token_id)
    executor.token_id = letter
    engine = Engine(
        Scheduler(CONFIG),
        executor,
        decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
    )
    settings = ServerSettings(served_model_name=MODEL)
    app = create_app(open_engine=in_thread(engine), codec=codec, config=CONFIG, settings=settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, engine, executor, space, letter


def check_serves(client, executor, letter):
    executor.token_id = letter
    body = {"model": MODEL, "prompt": "dog", "max_tokens": 3}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "ggg"
    assert client.get("/health").status_code == 200


def test_what_cannot_be_encoded_or_decoded_is_refused(served):
    client, engine, executor, space, letter = served
    chat = [{"role": "user", "content": LONG_RUN}]
    refused = [
        ("/v1/completions", {"prompt": LONG_RUN}, "prompt"),
        ("/v1/completions", {"prompt": ["dog", LONG_RUN]}, "prompt"),
        ("/v1/completions", {"prompt": "dog", "bad_words": ["o" * 1000 + "g"]}, "bad_words"),
        ("/v1/completions", {"prompt": [space, letter], "echo": True}, "prompt"),
        ("/v1/chat/completions", {"messages": chat}, "messages"),
        ("/tokenize", {"prompt": LONG_RUN}, "prompt"),
        ("/tokenize", {"messages": chat}, "messages"),
        ("/detokenize", {"tokens": [letter, space]}, "tokens"),
    ]
    for path, body, param in refused:
        reply = client.post(path, json={"model": MODEL, **body})
        assert reply.status_code == 400, (path, body, reply.text)
        assert reply.json()["error"]["param"] == param
        check_serves(client, executor, letter)
    assert has_all_blocks(engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_that_cannot_be_decoded_is_an_error_of_its_own(served, path, stream):
    client, engine, executor, space, letter = served
    executor.token_id = space
    asked = {"prompt": "dog"} if "chat" not in path else {}
    asked |= {"messages": [{"role": "user", "content": "dog"}]} if "chat" in path else {}
    reply = client.post(path, json={"model": MODEL, "max_tokens": 3, "stream": stream, **asked})
    assert "error" in reply.text and (stream or reply.status_code == 500)
    check_serves(client, executor, letter)
    assert has_all_blocks(engine)


def test_a_prompt_of_ids_that_cannot_be_decoded(served):
    client, engine, executor, space, letter = served
    reply = client.post("/v1/completions", json={"model": MODEL, "prompt": [space]})
    assert reply.status_code in (400, 500) and "decode" in reply.json()["error"]["message"]
    check_serves(client, executor, letter)
    told = client.post("/tokenize", json={"prompt": "g g", "return_token_strs": True}).json()
    assert told["token_strs"] == ["g", " ", "g"]
    assert has_all_blocks(engine)
