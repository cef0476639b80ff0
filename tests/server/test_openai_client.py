"""The `openai` package, unmodified, against a real server on a real socket."""

import asyncio

import openai
import pytest
from server.fakes_server import MODEL, SpeakingExecutor, make_app, running

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client():
    app, _ = make_app(SpeakingExecutor(TEXT), api_keys=("sk-test",))
    with (
        running(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def seeded():
    app, _ = make_app(SpeakingExecutor())
    with (
        running(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def test_models(client):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert got.choices[0].message.content == TEXT and got.choices[0].finish_reason == "stop"
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.model_extra["timings"]["predicted_n"] == got.usage.completion_tokens
    assert len(got._request_id) == 32


def test_chat_streamed_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 15


def test_completion_whole_and_streamed(client):
    got = client.completions.create(model=MODEL, prompt="abc", max_tokens=5)
    assert (got.choices[0].text, got.choices[0].finish_reason) == ("Hello", "length")
    chunks = list(client.completions.create(model=MODEL, prompt="abc", max_tokens=50, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == TEXT


def test_stop(client):
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=["wö"])
    assert got.choices[0].message.content == "Hello, "
    assert got.choices[0].finish_reason == "stop"
    got = client.completions.create(model=MODEL, prompt="a", max_tokens=50, stop=",")
    assert got.choices[0].text == "Hello"


def test_logprobs(client):
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=1
    )
    (entry,) = got.choices[0].logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("H", -0.5, [72])
    assert [t.token for t in entry.top_logprobs] == ["H", "I"]
    got = client.completions.create(model=MODEL, prompt="a", max_tokens=2, logprobs=1)
    assert got.choices[0].logprobs.tokens == ["H", "e"]
    assert got.choices[0].logprobs.text_offset == [0, 1]


def test_logit_bias(client):
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logit_bias={"122": 100}, max_tokens=3
    )
    assert got.choices[0].message.content == "zzz"


def test_n_and_seed(seeded):
    def ask(**more):
        got = seeded.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=1, n=2, **more
        )
        return [c.message.content for c in got.choices]

    assert ask(seed=5) == ask(seed=5) and len(set(ask(seed=5))) == 2
    stream = seeded.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, n=2, seed=5, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ask(seed=5)


def test_several_prompts(seeded):
    got = seeded.completions.create(model=MODEL, prompt=["a", "b", "c"], max_tokens=1, seed=0)
    assert [c.index for c in got.choices] == [0, 1, 2]


def test_extra_fields_of_vllm(client):
    got = client.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=50,
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True, "min_tokens": 20},
    )
    assert got.usage.completion_tokens == 50


def test_errors_arrive_as_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[{"type": "function"}])


def test_the_async_client():
    async def story(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            )
            return [c.choices[0].delta.content or "" async for c in stream]

    app, _ = make_app(SpeakingExecutor(TEXT))
    with running(app) as url:
        assert "".join(asyncio.run(story(url))) == TEXT
