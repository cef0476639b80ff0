"""The `openai` package, unmodified, against a real server of a real (random) model.

The oracle is the offline door on the same checkpoint: another engine, alone, without HTTP.
"""

import time
from dataclasses import dataclass, field

import httpx2
import openai
import pytest
from server.fakes_server import running, wait_until

from duetto import LLM, SamplingParams
from duetto.build import build
from duetto.core.engine_args import EngineArgs
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

NAME = "tiny"
PROMPT = "def f(x):"
MESSAGES = [{"role": "user", "content": "hello"}]
NUM_TOP = 3
ENGINE = {"max_model_len": 512, "max_num_seqs": 8}
WAYS = [(kind, stream) for kind in ("completion", "chat") for stream in (False, True)]


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, **ENGINE) as made:
        yield made


@pytest.fixture(scope="module")
def server(tiny_model):
    """A client, what it talks to, and the base URL."""
    built = build(tiny_model, EngineArgs(**ENGINE))
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(served_model_name=NAME),
    )
    with (
        running(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, built, url


@pytest.fixture
def client(server):
    return server[0]


@dataclass
class Choice:
    """One choice of an answer, whichever way it came."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[object] = field(default_factory=list)  # of each token
    finish_reason: str | None = None


def start(client, kind, **more):
    extra = {"return_token_ids": True, "ignore_eos": True, **more.pop("extra_body", {})}
    if kind == "chat":
        return client.chat.completions.create(
            model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=NUM_TOP,
            extra_body=extra, **more,
        )  # fmt: skip
    return client.completions.create(
        model=NAME, prompt=PROMPT, logprobs=NUM_TOP, extra_body=extra, **more
    )


def ask(client, kind, stream, **more):
    """All choices, and the usage."""
    if stream:
        more["stream_options"] = {"include_usage": True}
    answer = start(client, kind, stream=stream, **more)
    choices = [Choice() for _ in range(more.get("n", 1))]
    for body in answer if stream else [answer]:
        for piece in body.choices:
            _extend(choices[piece.index], piece, kind, stream)
        usage = body.usage  # the last chunk's
    return choices, usage


def _extend(choice, piece, kind, stream):
    if kind == "chat":
        choice.text += (piece.delta if stream else piece.message).content or ""
    else:
        choice.text += piece.text
    choice.token_ids += piece.model_extra.get("token_ids", [])
    choice.finish_reason = piece.finish_reason
    if piece.logprobs is None:
        return
    if kind == "chat":
        choice.logprobs += [entry.logprob for entry in piece.logprobs.content]
        for entry in piece.logprobs.content:
            choice.tops.append([(top.token, top.logprob) for top in entry.top_logprobs])
    else:
        choice.logprobs += piece.logprobs.token_logprobs
        choice.tops += [sorted(top.values(), reverse=True) for top in piece.logprobs.top_logprobs]


def offline(llm, kind, **sampling):
    params = SamplingParams(ignore_eos=True, logprobs=NUM_TOP, **sampling)
    if kind == "chat":
        return llm.chat(MESSAGES, params)[0]
    return llm.generate(PROMPT, params)[0]


CASES = {
    "greedy": {"temperature": 0.0},
    "seed": {"seed": 7, "temperature": 1.3, "top_p": 0.9},
    "n": {"seed": 7, "n": 2},
    "penalties": {"seed": 1, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"seed": 1, "logit_bias": {"97": 5.0}},
}


def expected_top(kind, step):
    """What a step of the offline door looks like online: each endpoint shows it differently."""
    ranked = sorted(step.values(), key=lambda s: s.rank)
    if kind == "chat":
        return [(s.decoded_token, s.logprob) for s in ranked[:NUM_TOP]]
    # The sampled token is there whatever its rank. Names are not compared: half characters differ.
    return sorted((s.logprob for s in ranked), reverse=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "stream"), WAYS)
def test_an_answer_is_that_of_the_offline_door(client, llm, kind, stream, case):
    sampling = {"max_tokens": 12, **CASES[case]}
    choices, usage = ask(client, kind, stream, **sampling)
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {97: 5.0}
    expected = offline(llm, kind, **sampling)
    for choice, output in zip(choices, expected.outputs, strict=True):
        scored = list(zip(output.token_ids, output.logprobs, strict=True))
        assert choice.token_ids == output.token_ids
        assert choice.text == output.text
        assert choice.finish_reason == output.finish_reason == "length"
        assert choice.logprobs == [step[token_id].logprob for token_id, step in scored]
        assert choice.tops == [expected_top(kind, step) for _, step in scored]
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.completion_tokens == 12 * len(choices)


@pytest.mark.parametrize(("kind", "stream"), WAYS)
def test_a_stop_string_ends_the_answer_where_the_offline_door_ends_it(client, llm, kind, stream):
    sampling = {"max_tokens": 24, "seed": 3}
    text = offline(llm, kind, **sampling).outputs[0].text
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isascii())
    (choice,), usage = ask(client, kind, stream, stop=[stop], **sampling)
    (expected,) = offline(llm, kind, stop=stop, **sampling).outputs
    assert choice.text == expected.text == text[: text.index(stop)]
    assert choice.finish_reason == expected.finish_reason == "stop"
    assert usage.completion_tokens == len(expected.token_ids) < 24


@pytest.mark.parametrize(("kind", "stream"), WAYS)
def test_a_seed_repeats_an_answer_and_another_does_not(client, kind, stream):
    def tokens(**more):
        choices, _ = ask(client, kind, stream, max_tokens=12, **more)
        return [choice.token_ids for choice in choices]

    assert tokens(seed=5) == tokens(seed=5) != tokens(seed=6)
    one, two = tokens(seed=5, n=2)
    assert [one] == tokens(seed=5) and one != two
    assert tokens() != tokens()


@pytest.mark.parametrize(("kind", "stream"), WAYS)
def test_a_bias_forces_a_token(client, kind, stream):
    (choice,), _ = ask(client, kind, stream, max_tokens=5, logit_bias={"97": 100}, temperature=0)
    assert choice.token_ids == [97] * 5


def test_masks_that_leave_no_token_are_the_callers_fault(server):
    client, built, _ = server
    masks = {"allowed_token_ids": sorted(built.codec.eos_token_ids), "ignore_eos": False}
    assert start(client, "completion", extra_body=masks).choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        start(client, "completion", extra_body={**masks, "min_tokens": 3})
    assert caught.value.param == "allowed_token_ids"


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_closing_the_clients_stream_frees_the_blocks_within_two_steps(server, kind, monkeypatch):
    client, built, _ = server
    engine = built.engine
    pool, step = engine.scheduler.pool, engine.step
    num_steps = 0

    def slow_step():
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.03)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    stream = start(client, kind, stream=True, max_tokens=400)
    next(stream)
    assert pool.num_free < pool.num_blocks
    before = num_steps
    stream.close()
    wait_until(lambda: not engine.has_work and pool.num_free == pool.num_blocks)
    assert num_steps - before <= 2


def test_text_offsets_point_into_the_text(client):
    got = start(client, "completion", max_tokens=60, seed=11).choices[0]
    whole = [
        (name, offset)
        for name, offset in zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True)
        if not name.startswith("bytes:")
    ]
    assert 10 < len(whole) < 60  # a random model writes half characters too
    for name, offset in whole:
        assert got.text[offset:].startswith(name)


def test_text_parts_are_joined_and_the_template_is_the_offline_doors(server, llm):
    _, _, url = server
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    expected = llm.chat_prompt([{"role": "user", "content": "one\ntwo"}])["prompt_token_ids"]
    for content in (parts, "one\ntwo"):
        body = {"messages": [{"role": "user", "content": content}]}
        assert httpx2.post(f"{url}/tokenize", json=body).json()["tokens"] == expected


@pytest.mark.parametrize("name", ["tokenize", "messages", "add_generation_prompt", "bos_token"])
def test_what_a_template_does_not_read_may_not_be_given_to_it(client, name):
    with pytest.raises(openai.BadRequestError, match=name) as caught:
        start(client, "chat", extra_body={"chat_template_kwargs": {name: True}})
    assert caught.value.param == "chat_template_kwargs"
