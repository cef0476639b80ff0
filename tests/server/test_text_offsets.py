"""What the tokens of an answer and of an echoed prompt show, and where, with real tokenizers.

For every token, text[offset : next offset] is what it added to the text that is shown.
"""

from itertools import chain, pairwise

import pytest
from server.fakes_server import CONFIG, MODEL, SpeakingExecutor, chunks, post
from starlette.testclient import TestClient
from tiny_tokenizers import (
    ALL_KINDS,
    KINDS,
    TEXT,
    byte_fallback_bpe,
    byte_level_bpe,
    gemma_like,
    mistral_like,
    phi3_like,
    qwen_like,
)

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.batch import SampledToken, TokenLogprob
from duetto.engine.engine import Engine
from duetto.engine.thread import in_thread
from duetto.scheduler.scheduler import Scheduler
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

PATH = "/v1/completions"


class Reciting(SpeakingExecutor):
    """Answers with the ids that it is told to."""

    ids: tuple[int, ...] = ()

    def _sample(self, asked):
        token_id = self.ids[asked.num_output_tokens % len(self.ids)]
        top = ((token_id, -0.5), ((token_id + 1) % 100, -1.5))
        return SampledToken(token_id, TokenLogprob(token_id, -0.5, 1, top))


class Chatty(Tokenizer):
    def render_chat(self, messages, *, add_generation_prompt=True, **_):
        return "".join(m["content"] for m in messages)


def serving(make):
    codec, executor = Chatty(make(), eos_token_ids=[2]), Reciting()
    engine = Engine(
        Scheduler(CONFIG),
        executor,
        decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
    )
    settings = ServerSettings(served_model_name=MODEL)
    app = create_app(open_engine=in_thread(engine), codec=codec, config=CONFIG, settings=settings)
    return TestClient(app), codec, executor


def completed(client, executor, output, **more):
    """The text and the four lists, whole and streamed where that may be asked for."""
    executor.ids = tuple(output)
    body = {"model": MODEL, "logprobs": 1, "max_tokens": len(output), "ignore_eos": True, **more}
    choice = post(client, PATH, body)["choices"][0]
    text, shown = choice["text"], choice["logprobs"]
    if not more.get("echo"):
        parts = [c["choices"][0] for c in chunks(client, PATH, body)]
        assert "".join(part["text"] for part in parts) == text
        for name, values in shown.items():
            assert [*chain(*(p["logprobs"][name] for p in parts if p["logprobs"]))] == values
    assert len({len(values) for values in shown.values()}) == 1
    for name, top in zip(shown["tokens"], shown["top_logprobs"], strict=True):
        assert top is None or name in top
    return text, shown


def parts_of(text, shown):
    """What each token added; checks that they tile the text."""
    offsets = shown["text_offset"]
    assert offsets == sorted(offsets)
    parts = [text[a:b] for a, b in pairwise([*offsets, len(text)])]
    assert "".join(parts) == text[offsets[0] :]
    return parts


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tokens_tile_the_answer_and_the_echo(kind):
    client, codec, executor = serving(ALL_KINDS[kind])
    with client:
        for prompt, answer in (("The dog", " and the quick fox"), ("a<s>é", "世界 🙂 dog\n    x")):
            output = codec.encode(answer, add_special_tokens=False)
            text, shown = completed(client, executor, output, prompt=prompt)
            plain = parts_of(text, shown)
            check_names(shown, plain)

            whole, shown = completed(client, executor, output, prompt=prompt, echo=True)
            assert whole == prompt + text
            parts = parts_of(whole, shown)
            assert parts[-len(output) :] == plain
            assert "".join(parts[: -len(output)]) == prompt
            if kind in KINDS:  # which do not change what they encode
                check_names(shown, parts)

            ids = codec.encode(prompt)
            whole, shown = completed(client, executor, output, prompt=ids, echo=True)
            assert whole == codec.decode(ids, skip_special_tokens=False) + text
            parts = parts_of(whole, shown)
            assert parts[-len(output) :] == plain
            check_names(shown, parts)


def check_names(shown, parts):
    """A token is named as it is shown, if it is shown, and no character begins before it."""
    begun = False
    for name, part in zip(shown["tokens"], parts, strict=True):
        assert begun or name.startswith("bytes:") or part in (name, "") or "<unk>" in name
        begun = name.startswith("bytes:")


@pytest.mark.parametrize("make", [byte_fallback_bpe, mistral_like, phi3_like])
def test_the_dummy_space_is_not_in_the_text(make):
    client, codec, executor = serving(make)
    with client:
        output = codec.encode("the", add_special_tokens=False)
        for echo_of in ("the th", codec.encode("the th")[1:]):
            text, shown = completed(client, executor, output, prompt=echo_of, echo=True)
            num = len(shown["tokens"]) - len(output)
            at_start = [name for name in shown["tokens"][:num] if name != "<s>"]
            assert "".join(at_start) == "the th"
            assert text[shown["text_offset"][num - 1] :].startswith("th")
            assert shown["text_offset"][num] == len("the th")


@pytest.mark.parametrize("make", [byte_fallback_bpe, mistral_like, phi3_like])
def test_a_text_that_the_answer_begins_has_no_dummy_space_either(make):
    client, _, executor = serving(make)
    with client:
        output = make().encode("▁the▁th", add_special_tokens=False).ids[1:]
        for prompt in ("", "</s>"):
            text, shown = completed(client, executor, output, prompt=prompt)
            check_names(shown, parts_of(text, shown))
            assert not text.startswith(" ") and "".join(shown["tokens"]) == text


def test_special_tokens_that_the_client_spelt_are_in_the_text():
    client, codec, executor = serving(byte_fallback_bpe)
    with client:
        prompt = "a</s>th</s>e"
        text, shown = completed(client, executor, [5, 2], prompt=prompt, echo=True)
        assert text == prompt + codec.decode([5])
        at = zip(shown["tokens"], shown["text_offset"], parts_of(text, shown), strict=True)
        assert {("</s>", 1, "</s>"), ("th", 5, "th"), ("</s>", 7, "</s>"), ("e", 11, "e")} < {*at}


def test_composition_moves_what_follows():
    client, codec, executor = serving(qwen_like)
    with client:
        prompt = "e\u0301 e\u0301 fox"
        output = codec.encode("dog")
        text, shown = completed(client, executor, output, prompt=prompt, echo=True)
        assert text[shown["text_offset"][-len(output)] :] == "dog"
        at = shown["tokens"].index("x")
        assert text[shown["text_offset"][at]] == "x"


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, gemma_like, qwen_like])
def test_bytes_that_make_a_character_together_begin_where_it_does(make):
    client, codec, executor = serving(make)
    with client:
        output = codec.encode("a界b", add_special_tokens=False)
        text, shown = completed(client, executor, output, prompt="the", max_tokens=len(output))
        at = text.index("界")
        where = [
            offset
            for name, offset in zip(shown["tokens"], shown["text_offset"], strict=True)
            if name.startswith("bytes:")
        ]
        assert len(where) >= 2 and set(where) == {at}
        assert shown["text_offset"][shown["tokens"].index("b")] == at + 1


def test_gemmas_spaces_are_spaces_in_every_place():
    client, codec, executor = serving(gemma_like)
    with client:
        output = codec.encode("a▁▁▁▁b", add_special_tokens=False)
        text, shown = completed(client, executor, output, prompt="the")
        assert text == "a    b" and shown["tokens"] == ["a", "    ", "b"]
        assert shown["text_offset"] == [0, 1, 5]
        asked = {"messages": [{"role": "user", "content": "th▁▁▁▁e"}], "prompt_logprobs": 0}
        asked |= {"model": MODEL, "logprobs": True, "top_logprobs": 1, "max_tokens": 3}
        body = post(client, "/v1/chat/completions", asked)
        content = body["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["a", "    ", "b"]
        assert bytes(chain(*(entry["bytes"] for entry in content))) == b"a    b"
        assert content[1]["top_logprobs"][0]["token"] == "    "
        scored = [next(iter(e.values()))["decoded_token"] for e in body["prompt_logprobs"][1:]]
        assert scored == ["    ", "e"]
        told = post(client, "/tokenize", {"prompt": "th▁▁▁▁e", "return_token_strs": True})
        assert told["token_strs"] == ["<s>", "th", "    ", "e"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_token_strs_join_to_what_the_tokens_decode_to(kind):
    client, codec, _ = serving(ALL_KINDS[kind])
    with client:
        for text in (*TEXT[:4], "the    th", "世"):
            for special in (True, False):
                asked = {"prompt": text, "return_token_strs": True, "add_special_tokens": special}
                told = post(client, "/tokenize", asked)
                joined, tokens = "".join(told["token_strs"]), told["tokens"]
                whole = codec.decode(tokens, skip_special_tokens=False)
                assert joined == whole or "\ufffd" in joined
                assert len(told["token_strs"]) == len(tokens)
