"""The tokenizers library may panic: a refusal at start or of one request, never the process's end.

A panic is a BaseException, so each test here fails by ending if it is not caught.
"""

import json
from pathlib import Path

import pytest
from fakes import FunctionExecutor, make_request
from tiny_tokenizers import byte_level_bpe, character_level
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.checkpoints.tokenizer_library import LibraryError, call, is_panic
from duetto.core.config import SchedulerConfig
from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.core.request import FinishReason
from duetto.engine.engine import Engine
from duetto.scheduler.scheduler import Scheduler

BACKTRACKS = Regex("(x+)+$")  # gives up on a long run of x that does not end the text
LONG_RUN = "x" * 3000 + "y"
DEEP = "a decoder in a decoder in a decoder"


def gives_up_on_text() -> Library:
    """Some texts cannot be encoded."""
    library = byte_level_bpe()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(BACKTRACKS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return library


def gives_up_on_normalizing() -> Library:
    library = byte_level_bpe()
    library.normalizer = normalizers.Replace(BACKTRACKS, "z")
    return library


def cuts_too_much() -> Library:
    """A token of one space cannot be decoded: one is cut from each of its ends."""
    library = character_level()
    library.decoder = decoders.Sequence([decoders.Strip(" ", 1, 1), decoders.Fuse()])
    return library


def test_a_panic_is_told_from_other_ends() -> None:
    library = cuts_too_much()
    with pytest.raises(LibraryError, match="slice index") as caught:
        call(library.decode, [library.token_to_id(" ")])
    assert caught.value.is_panic and is_panic(caught.value.__cause__)
    with pytest.raises(LibraryError) as caught:
        call(Library.from_str, "{")
    assert not caught.value.is_panic

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted)


@pytest.mark.parametrize("make", [gives_up_on_text, gives_up_on_normalizing])
def test_a_text_that_the_library_gives_up_on_is_refused(make) -> None:
    codec = Tokenizer(make())
    for encode in (codec.encode, codec.encode_with_starts):
        with pytest.raises(InvalidRequest, match="prompt: this model's tokenizer cannot encode"):
            encode(LONG_RUN)
    assert codec.encode("the dog")  # and the next one is as before


def test_ids_that_the_library_cannot_decode_are_refused_and_still_have_a_name() -> None:
    codec, space = Tokenizer(cuts_too_much()), cuts_too_much().token_to_id(" ")
    with pytest.raises(InvalidRequest, match="cannot decode these token ids: slice index"):
        codec.decode([space])
    assert codec.token_bytes(space) == b" "


def test_an_answer_that_cannot_be_decoded_ends_alone() -> None:
    codec = Tokenizer(cuts_too_much())
    letter, space = codec.encode("a")[0], cuts_too_much().token_to_id(" ")
    config = SchedulerConfig(num_blocks=64, max_model_len=64, block_size=4)
    engine = Engine(
        Scheduler(config),
        FunctionExecutor(lambda request_id, _: space if request_id == "bad" else letter),
        decode=lambda ids, skip: codec.decode(ids, skip_special_tokens=skip),
    )
    for name in ("good", "bad"):
        engine.add(make_request(name, [letter], 4))
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.add(make_request("its prompt", [space], 4))
    final, text = {}, {"good": "", "bad": ""}
    while engine.has_work:
        for update in engine.step().updates:
            text[update.request_id] += update.text
            if update.finish_reason is not None:
                final[update.request_id] = update.finish_reason
    assert final == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert text["good"] == "aaaa"
    assert engine.scheduler.pool.num_free == config.num_blocks


def panics_over_plain_text(part: str) -> Library:
    library = byte_level_bpe()
    if part == "decoder":
        library.decoder = decoders.Sequence([decoders.Strip("e", 1, 1), decoders.Fuse()])
    else:
        hard = Regex(r"([^Q]+)+[0-9]$")
        library.pre_tokenizer = pre_tokenizers.Split(hard, "isolated")
    return library


@pytest.mark.parametrize("part", ["decoder", "pre_tokenizer"])
def test_a_file_that_panics_over_plain_text_is_refused_at_start(part: str, tmp_path: Path) -> None:
    panics_over_plain_text(part).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizers library fails"):
        load_tokenizer(tmp_path)


def _strange_files() -> dict[str, dict]:
    """tokenizer.json files with a part that no library should be given."""
    whole = json.loads(byte_level_bpe().to_str())
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    return {
        DEEP: {**whole, "decoder": 0},
        "a charsmap of nothing": {**whole, "normalizer": charsmap},
        "a template with a token that is not there": {
            **whole,
            "post_processor": {**template, "single": [{"SpecialToken": {"id": "<", "type_id": 0}}]},
        },
        "a regular expression that is none": {
            **whole,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(["},
                "behavior": "Isolated",
                "invert": False,
            },
        },
        "an empty pattern": {
            **whole,
            "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        },
        "an empty prefix": {**whole, "normalizer": {"type": "Prepend", "prepend": ""}},
        "ids with holes": {
            **whole,
            "model": {**whole["model"], "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []},
        },
        "merges of what is not there": {
            **whole,
            "model": {**whole["model"], "merges": [["never", "seen"]]},
        },
        "a stride beyond the length": {
            **whole,
            "truncation": {
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 5,
            },
        },
    }


@pytest.mark.parametrize("name", _strange_files())
def test_a_strange_file_is_refused_or_serves(name: str, tmp_path: Path) -> None:
    text = json.dumps(_strange_files()[name])
    if name == DEEP:  # deeper than json writes
        inner = '{"type":"Sequence","decoders":[' * 5000 + '{"type":"Fuse"}' + "]}" * 5000
        text = text.replace('"decoder": 0', '"decoder": ' + inner)
    (tmp_path / "tokenizer.json").write_text(text)
    try:
        codec = load_tokenizer(tmp_path, vocab_size=1000)
    except CheckpointError as error:
        assert "\n" not in str(error) and error.file == tmp_path / "tokenizer.json"
        return
    for text in ("", "the dog", "Ünï 世界\n" * 50):
        try:
            codec.decode(codec.encode(text))
        except InvalidRequest as error:
            assert error.field == "prompt"


def test_a_file_that_makes_a_text_grow_without_bound_is_refused(tmp_path: Path) -> None:
    """Memory that ends, ends the process: the library has no way to refuse."""

    def between(pattern: str) -> normalizers.Normalizer:
        return normalizers.Replace(Regex(pattern), "a")

    bomb = [normalizers.Replace("a", "a" * 1000)] * 3
    cases = [
        ("normalizer", normalizers.Sequence(bomb), "1,000,000,000"),
        ("normalizer", normalizers.Sequence([normalizers.Sequence(bomb[:1])]), "1,000"),
        ("normalizer", normalizers.Sequence([normalizers.Prepend("ab")] * 4), "81"),
        ("decoder", decoders.Sequence([decoders.Replace("a", "aaaaa")] * 3), "125"),
        ("normalizer", normalizers.Sequence([between("x*")] * 7), "128"),
        ("normalizer", normalizers.Sequence([between(r"\b")] * 7), "128"),
        ("normalizer", normalizers.Sequence([between("(?=a)")] * 7), "128"),
        ("normalizer", normalizers.Sequence([normalizers.ByteLevel()] * 4), "256"),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 4), "256"),
        (
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 9999),
            f"{10**24:,}",
        ),
        (
            "post_processor",
            processors.TemplateProcessing(single=["$A"] * 65, pair="$A $B", special_tokens=[]),
            "65",
        ),
    ]
    for part, value, number in cases:
        library = byte_level_bpe()
        setattr(library, part, value)
        library.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(CheckpointError, match=f"its {part} may make {number} characters"):
            load_tokenizer(tmp_path)
    library = byte_level_bpe()
    plain = [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace("…", "..."),
    ]
    plain += [
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Replace(Regex(r"[\n\r]+"), "\n"),
    ] * 9
    library.normalizer = normalizers.Sequence(plain)
    library.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path)
