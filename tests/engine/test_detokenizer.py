"""The stream of text equals what decoding everything at once gives, however it is cut."""

import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from os.path import commonprefix

import pytest
from fakes import ByteCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import ALL_KINDS, KINDS, TEXT, byte_fallback_bpe, byte_level_bpe

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.sampling_params import SamplingParams
from duetto.engine.detokenizer import Detokenizer, TextDelta, TokenPlaces, _Search

Decode = Callable[[Sequence[int], bool], str]
tokenizer_of = cache(lambda kind: KINDS[kind]())
codec_of = cache(lambda kind: Tokenizer(KINDS[kind]()))


def decode_of(kind: str) -> Decode:
    codec = codec_of(kind)
    return lambda ids, skip: codec.decode(ids, skip_special_tokens=skip)


def bytes_decode(ids: Sequence[int], skip: bool) -> str:
    """Token ids are bytes; 256 is a special token."""
    parts = bytes(i for i in ids if i < 256).decode(errors="replace")
    return parts + ("" if skip else "<end>" * sum(i == 256 for i in ids))


def whole_text(decode: Decode, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """The slow twin: decode all, and take what the prompt alone does not show."""
    before, text = decode(prompt, skip), decode([*prompt, *output], skip)
    start = len(before)
    if before.endswith("\ufffd"):  # a prompt that ends within a character, or really with U+FFFD
        start = len(commonprefix((before, text)))  # noqa: RUF071
        whole = [decode(prompt[:-k], skip) for k in (1, 2, 3) if k <= len(prompt)]
        whole = [t for t in whole if not t.endswith("\ufffd")]
        start = max(start, len(whole[0]) if whole else len(before))
    return text[start:]


def first_stop(
    decode: Decode, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> TextDelta:
    """The slow twin with stop strings: decode all again after every token."""
    for n in range(1, len(output) + 1):
        text = whole_text(decode, prompt, output[:n], params.skip_special_tokens)
        if n < len(output):
            text = text.rstrip("\ufffd")
        found = [(text.find(s), -len(s), s) for s in params.stop if s in text]
        if found:
            start, negative_length, stop = min(found)
            end = start - negative_length if params.include_stop_str_in_output else start
            return TextDelta(text[:end], n, stop)
    text = whole_text(decode, prompt, output, params.skip_special_tokens)
    return TextDelta(text, len(output))


def run(
    decode: Decode,
    prompt: Sequence[int],
    chunks: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
) -> tuple[list[str], TextDelta]:
    """Push chunk by chunk; return the pieces, and their sum as one delta."""
    detokenizer = Detokenizer(decode, prompt, params or SamplingParams())
    pieces, num_tokens = [], 0
    for i, chunk in enumerate(chunks):
        delta = detokenizer.push(chunk, is_last=i == len(chunks) - 1)
        pieces.append(delta.text)
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            return pieces, TextDelta("".join(pieces), num_tokens, delta.stop)
    return pieces, TextDelta("".join(pieces), num_tokens)


def split(rng: random.Random, ids: Sequence[int]) -> list[Sequence[int]]:
    chunks, start = [], 0
    while start < len(ids):
        size = rng.choice((0, 1, 1, 1, 2, 3, 8))
        chunks.append(ids[start : start + size])
        start += size
    return [*chunks, ()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_random_ids_is_the_decode_of_all(kind: str, skip: bool) -> None:
    decode = decode_of(kind)
    vocab_size = tokenizer_of(kind).get_vocab_size()
    rng = random.Random(f"{kind}{skip}")
    for _ in range(150):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(12))]
        output = [rng.randrange(vocab_size + 3) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(skip_special_tokens=skip)
        _, got = run(decode, prompt, split(rng, output), params)
        assert got.text == whole_text(decode, prompt, output, skip)
        assert got.num_tokens == len(output)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_of_real_text_never_shows_half_a_character(kind: str) -> None:
    decode = decode_of(kind)
    ids = tokenizer_of(kind).encode("\n".join(TEXT), add_special_tokens=False).ids
    rng = random.Random(kind)
    for _ in range(20):
        at = rng.randrange(len(ids))
        pieces, got = run(decode, ids[:at], split(rng, ids[at:]))
        assert "\ufffd" not in got.text
        assert got.text == whole_text(decode, ids[:at], ids[at:], True)
        assert max(map(len, pieces[:-1]), default=0) > 0 or len(ids) - at < 9, "nothing streamed"


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bytes_in_any_chunks(data: st.DataObject) -> None:
    byte = st.one_of(st.integers(0, 256), st.sampled_from([0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9]))
    prompt = data.draw(st.lists(byte, max_size=20))
    chunks = data.draw(st.lists(st.lists(byte, max_size=5), min_size=1, max_size=60))
    output = [i for chunk in chunks for i in chunk]
    pieces, got = run(bytes_decode, prompt, chunks)
    assert got.text == whole_text(bytes_decode, prompt, output, True)
    # What is certain is emitted at once: only the last character may still be missing.
    shown, n = "", 0
    for piece, chunk in zip(pieces[:-1], chunks[:-1], strict=True):
        shown, n = shown + piece, n + len(chunk)
        assert (
            shown
            == whole_text(bytes_decode, prompt, output[:n], True).rstrip("\ufffd")[: len(shown)]
        )


@pytest.mark.parametrize("unit", [[0x80], [0xE4, 0xB8], [0xFF, 0xC3], [0xE4, *[256] * 70], [256]])
def test_bytes_that_never_make_text_end_and_stay_linear(unit: list[int]) -> None:
    output = unit * (2000 // len(unit)) + list("né".encode())
    calls = 0

    def counted(ids: Sequence[int], skip: bool) -> str:
        nonlocal calls
        calls += len(ids)
        return bytes_decode(ids, skip)

    _, got = run(counted, [], [[i] for i in output])
    assert got.text == bytes_decode(output, True)
    assert calls < 200 * len(output)


def test_a_prompt_that_ends_within_a_character() -> None:
    cat = list("🐱".encode())
    prompt = list(b"secret ") + cat[:2]
    _, got = run(bytes_decode, prompt, [[i] for i in [*cat[2:], 65]])
    assert got.text == "🐱A"
    # The output does not complete it: the U+FFFD is the prompt's.
    assert run(bytes_decode, prompt, [[65], [66]])[1].text == "AB"
    assert run(bytes_decode, prompt, [[cat[2]], []])[1].text == ""
    # A prompt may also really end with U+FFFD.
    assert run(bytes_decode, list("a\ufffd".encode()), [[65]])[1].text == "A"


def test_context_of_the_prompt_decides_the_first_space() -> None:
    tokenizer = byte_fallback_bpe()
    the = tokenizer.token_to_id("▁the")
    decode = decode_of("byte_fallback_bpe")
    assert run(decode, [the], [[the]])[1].text == " the"
    # Special tokens show nothing; context is what lies before them.
    assert run(decode, [the, *[1] * 30], [[the]])[1].text == " the"
    assert run(decode, [1], [[the]])[1].text == "the"
    # The same for special tokens within the output, and for a space that is a token.
    space = tokenizer.token_to_id("▁")
    assert run(decode, [1], [[the], *[[2]] * 30, [the]])[1].text == "the the"
    assert run(decode, [1], [[space], *[[2]] * 30, [the]])[1].text == " the"
    # The left edge of the context must not lie within a character, or its whole run is broken.
    world = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "界界界界界".encode()]
    assert run(decode, [the, *world[:-3]], [[i] for i in world[-3:]])[1].text == "界"


STOPS = ["e", "the", "o wor", " ", "ab", "aba", "\n", "世界", "🙂", "dog, and the", "zzz"]


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_cut_as_the_reference_does(kind: str, include: bool) -> None:
    decode = decode_of(kind)
    ids = tokenizer_of(kind).encode("\n".join(TEXT), add_special_tokens=False).ids
    rng = random.Random(f"{kind}{include}")
    num_stopped = 0
    for _ in range(150):
        text_stops = rng.sample(STOPS, rng.randrange(1, 4))
        params = SamplingParams(stop=tuple(text_stops), include_stop_str_in_output=include)
        at, size = rng.randrange(1, len(ids)), rng.randrange(1, 50)
        prompt, output = ids[:at], ids[at : at + size]
        _, got = run(decode, prompt, split(rng, output), params)
        assert got == first_stop(decode, prompt, output, params)
        num_stopped += got.stop is not None
    assert num_stopped > 30


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_overlapping_stops_over_a_small_alphabet(data: st.DataObject) -> None:
    letters = st.sampled_from("abé")
    stops = data.draw(st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=4))
    output = list(data.draw(st.text(letters, min_size=1, max_size=40)).encode())
    pieces = data.draw(st.lists(st.integers(1, 5), min_size=40, max_size=40))
    chunks, start = [], 0
    for size in pieces:
        chunks.append(output[start : start + size])
        start += size
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=data.draw(st.booleans()))
    streamed, got = run(bytes_decode, [], [c for c in chunks if c], params)
    expected = first_stop(bytes_decode, [], output, params)
    assert got == expected
    shown = ""
    for piece in streamed:  # no part of a stop string was ever shown
        shown += piece
        assert expected.text.startswith(shown)


def test_every_stop_in_every_text_of_two_letters() -> None:
    words = ["".join(word) for n in range(1, 8) for word in product("ab", repeat=n)]
    for stop in (word for word in words if len(word) <= 4):
        params = SamplingParams(stop=stop)
        for text in (word for word in words if len(word) == 7):
            _, got = run(bytes_decode, [], [[i] for i in [*text.encode()]], params)
            assert got.text == text.partition(stop)[0]
            assert (got.stop is not None) == (stop in text)


def test_several_tokens_in_one_push_stop_at_the_first() -> None:
    params = SamplingParams(stop="xy")
    delta = Detokenizer(bytes_decode, [], params).push(list(b"abxycd"))
    assert delta == TextDelta("ab", 4, "xy")


def test_longest_of_two_that_start_together_and_first_of_two_that_overlap() -> None:
    decode = lambda ids, skip: "".join(["abcd", "bc"][i] for i in ids)  # noqa: E731
    assert run(decode, [], [[0]], SamplingParams(stop=("ab", "abc")))[1].stop == "abc"
    assert run(decode, [], [[0]], SamplingParams(stop=("c", "bcd")))[1] == TextDelta("a", 1, "bcd")


def test_held_text_comes_when_the_request_ends_for_another_reason() -> None:
    detokenizer = Detokenizer(bytes_decode, [], SamplingParams(stop="stop!"))
    assert detokenizer.push(list(b"a sto")).text == "a "
    assert detokenizer.push([ord("p"), 0xC3]).text == ""
    assert detokenizer.push([], is_last=True) == TextDelta("stop\ufffd", 0)


def test_stop_string_within_what_was_held_at_the_end() -> None:
    detokenizer = Detokenizer(bytes_decode, [], SamplingParams(stop="b\ufffd"))
    assert detokenizer.push([ord("a"), ord("b"), 0xC3]).text == "a"
    assert detokenizer.push([], is_last=True) == TextDelta("", 0, "b\ufffd")


def test_hidden_stop_token() -> None:
    shown = Detokenizer(bytes_decode, [], SamplingParams())
    assert shown.push(list(b"ab"), is_last=True) == TextDelta("ab", 2)
    hidden = Detokenizer(bytes_decode, [], SamplingParams())
    assert hidden.push(list(b"ab"), is_last=True, hide_last=True) == TextDelta("a", 2)


def test_no_stop_string_before_min_tokens() -> None:
    params = SamplingParams(stop="a", min_tokens=3)
    assert run(bytes_decode, [], [[i] for i in b"aaaba"], params)[1] == TextDelta("aaab", 5, "a")


def test_matches_generated_text_only() -> None:
    params = SamplingParams(stop="ab")
    assert run(bytes_decode, list(b"a"), [list(b"b")], params)[1] == TextDelta("b", 1)


def test_time_is_linear() -> None:
    tokenizer = byte_level_bpe()
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(100_000)]
    params = SamplingParams(stop=("a" * 1000 + "b", "never in there", "\n\n\n\n\n"))
    start = time.process_time()
    run(decode_of("byte_level_bpe"), ids[:100], [[i] for i in ids], params)
    assert time.process_time() - start < 15.0  # about 1 s; quadratic: hours


def test_stop_strings_made_to_be_slow() -> None:
    stops = tuple("a" * n + "b" for n in range(1008, 1023))
    params = SamplingParams(stop=stops)
    start = time.process_time()
    run(bytes_decode, [], [[97]] * 5_000, params)
    assert time.process_time() - start < 3.0


def slow_starts(decode: Decode, prompt: Sequence[int], output: Sequence[int], skip: bool):
    """Of text that is text: how much of what is shown at the end was sure before each token."""
    text = whole_text(decode, prompt, output, skip)
    texts = [whole_text(decode, prompt, output[:n], skip) for n in range(len(output))]
    return [len(commonprefix((before, text))) for before in texts]  # noqa: RUF071


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tokens_begin_where_the_text_before_them_ends(kind: str, skip: bool) -> None:
    codec = Tokenizer(ALL_KINDS[kind]())

    def decode(ids: Sequence[int], skip: bool) -> str:
        return codec.decode(ids, skip_special_tokens=skip)

    for before in ("", "The quick", "a</s>"):
        prompt = codec.encode(before) if before else []
        for text in ("the <s>dog é世界🙂 the", " and\n\n    x", *TEXT[:2], TEXT[-1][:9]):
            output = codec.encode(text, add_special_tokens=False)
            expected = slow_starts(decode, prompt, output, skip)
            at = TokenPlaces(decode, prompt, skip_special_tokens=skip, start=100)
            assert [at.push(i).start - 100 for i in output] == expected
            assert expected == sorted(expected)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (b"a\xe2\x82bc\xe2\x82\xacd", [0, 1, 1, 2, 3, 4, 4, 4, 5]),
        (b"\xff\xff\xe2\x82\xac", [0, 1, 2, 2, 2]),  # what never makes a character is one each
        (b"\xc3\xc3\xa9\xff!", [0, 1, 1, 2, 3]),
        ("é\U0001f642".encode(), [0, 0, 1, 1, 1, 1]),
    ],
)
def test_starts_of_bytes_that_are_no_text(output: bytes, expected: list[int]) -> None:
    codec = ByteCodec()
    at = TokenPlaces(
        lambda ids, skip: codec.decode(ids, skip_special_tokens=skip), (), skip_special_tokens=True
    )
    assert [at.push(byte).start for byte in output] == expected
    assert at.push(256).start == len(output.decode(errors="replace"))  # a token that is not shown


def test_a_character_that_the_prompt_began_begins_the_answer() -> None:
    codec = ByteCodec()
    for prompt, output, expected in (
        (b"a\xe4\xb8", b"\x96b", [0, 1]),
        (b"a\xe4", b"\xb8\x96b", [0, 0, 1]),
        (b"a\xe4", b"b", [0]),
    ):
        at = TokenPlaces(
            lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
            prompt,
            skip_special_tokens=True,
        )
        assert [at.push(byte).start for byte in output] == expected


def test_starts_stay_linear_where_bytes_never_make_text() -> None:
    longest = 0

    def decode(ids: Sequence[int], skip: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return ByteCodec().decode(ids, skip_special_tokens=skip)

    at = TokenPlaces(decode, (), skip_special_tokens=True)
    assert [at.push(0xFF).start for _ in range(500)] == list(range(500))
    assert longest < 100


def test_a_stop_string_is_found_where_find_finds_it_however_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(2000):
        stop = "".join(rng.choices("ab", k=rng.randint(1, 9)))
        text = "".join(rng.choices("ab", k=rng.randint(0, 40)))
        search, at, found = _Search(stop), 0, None
        while at < len(text) and found is None:
            size = rng.randint(1, 5)
            end = search.push(text[at : at + size])
            found = None if end is None else at + end - len(stop)
            at += size
        assert found == (text.find(stop) if stop in text else None)


def test_a_long_stop_string_costs_nothing_before_it_matches():
    """n answers have one each, and the engine makes them between two steps."""
    search = _Search("a" * 1000 + "b")
    assert search._border == [0]
    search.push("xyz aab")
    assert len(search._border) <= 2
