"""Chat prompts of exact lengths, with tokenizers of every kind and templates of several."""

import asyncio
import json
from collections.abc import Callable

import httpx2
import pytest
import tiny_tokenizers
from numpy.random import default_rng
from tokenizers import Tokenizer

from duetto.measure import prompts
from duetto.measure.client import Target
from duetto.measure.prompts import _Tokenizer, chat_workload, fitted
from duetto.measure.workload import Lengths, SharedPrefixes, random_workload

TARGET = Target(base_url="http://server", model="m", is_chat=True)
KINDS = ("byte_level_bpe", "byte_fallback_bpe", "unigram", "character_level", "gemma_like",
         "phi3_like", "mistral_like", "qwen_like", "gpt2_like")  # fmt: skip
TEMPLATES = {
    "plain": "<s>user: {}\nassistant: ",
    "without a space": "{}",
    "a word at the end of the text": "[INST] {} [/INST]",
}


def http(tokenizer: Tokenizer, render: Callable[[str], str], bodies: list) -> httpx2.AsyncClient:
    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        bodies.append(body)
        if request.url.path == "/detokenize":
            text = tokenizer.decode(body["tokens"], skip_special_tokens=False)
            return httpx2.Response(200, json={"prompt": text})
        if "messages" in body:
            text = render(body["messages"][0]["content"])
        else:
            text = body["prompt"]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return httpx2.Response(200, json={"count": len(ids), "tokens": ids})

    transport = httpx2.MockTransport(answer)
    return httpx2.AsyncClient(transport=transport, base_url=TARGET.base_url)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("trims", [False, True])
def test_lengths_are_exact(kind: str, template: str, trims: bool) -> None:
    tokenizer = getattr(tiny_tokenizers, kind)()

    def render(text: str) -> str:
        return TEMPLATES[template].format(text.strip() if trims else text)

    rng, bodies = default_rng(0), []
    for length in (40, 61, 200):
        ids = rng.integers(tokenizer.get_vocab_size(), size=length).tolist()
        asking = _Tokenizer(http(tokenizer, render, bodies), TARGET)

        async def fit(ids=ids, asking=asking):
            return await fitted(ids, await asking.growth(ids), asking)

        made = asyncio.run(fit())
        counted = tokenizer.encode(render(made.text), add_special_tokens=False).ids
        assert len(counted) == made.num_tokens == length
    assert len(bodies) < 3 * 60  # questions to the server


def test_shared_prefixes_stay_shared() -> None:
    tokenizer = tiny_tokenizers.byte_level_bpe()
    made = random_workload(
        3,
        input_lengths=Lengths(40),
        output_lengths=Lengths(1),
        vocab_size=tokenizer.get_vocab_size(),
        prefixes=SharedPrefixes(60),
    )
    client = http(tokenizer, TEMPLATES["plain"].format, [])
    done = asyncio.run(chat_workload(client, TARGET, made))
    texts = [request.prompt_text or "" for request in done.requests]
    assert len(set(texts)) == 3
    num_shared = next(i for i, each in enumerate(zip(*texts, strict=False)) if len(set(each)) > 1)
    assert num_shared >= 0.4 * len(texts[0])
    assert [request.num_prompt_tokens for request in done.requests] == [100] * 3


def test_the_template_gets_the_arguments_of_the_run() -> None:
    bodies: list = []
    client = http(tiny_tokenizers.byte_level_bpe(), TEMPLATES["plain"].format, bodies)
    target = Target(
        base_url="http://server",
        model="m",
        is_chat=True,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "top_p": 0.5},
    )
    asyncio.run(fitted([50] * 40, 1.0, _Tokenizer(client, target)))
    asked = [body for body in bodies if "messages" in body]
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in asked)
    assert not any("top_p" in body for body in bodies)


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RETRY_S", 0.0)
    replies = [429, 503, 200]

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(replies.pop(0), json={"count": 7})

    transport = httpx2.MockTransport(answer)
    client = httpx2.AsyncClient(transport=transport, base_url=TARGET.base_url)
    assert asyncio.run(_Tokenizer(client, TARGET).prompt("a")).num_tokens == 7
