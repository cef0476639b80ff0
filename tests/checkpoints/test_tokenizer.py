"""Every kind of tokenizer.json loads, round-trips and agrees with transformers."""

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import ALL_KINDS, KINDS, SPECIAL, TEXT, byte_fallback_bpe, byte_level_bpe
from tokenizers import Tokenizer as Library
from tokenizers import processors

from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.core.text import TextCodec


def write(
    directory: Path,
    library: Library,
    config: dict[str, Any] | None = None,
    special_tokens_map: dict[str, Any] | None = None,
) -> Path:
    library.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    codec: TextCodec = load_tokenizer(write(tmp_path, KINDS[kind]()))
    for text in TEXT:
        ids = codec.encode(text, add_special_tokens=False)
        assert all(0 <= i < codec.vocab_size for i in ids)
        decoded = codec.decode(ids)
        if kind in ("wordpiece", "word_level"):  # these do not keep spaces
            assert decoded.replace(" ", "") == text.replace(" ", "")
        elif kind == "unigram":
            assert decoded.lstrip(" ") == text.lstrip(" ")  # it does not keep a space in front
        else:
            assert decoded == text


def test_byte_tokenizers_keep_any_text(tmp_path: Path) -> None:
    rng = random.Random(0)
    codecs = [Tokenizer(byte_level_bpe()), Tokenizer(byte_fallback_bpe())]
    for _ in range(300):
        planes = rng.choice((0x7F, 0x7FF, 0xD7FF, 0x10FFFF))
        text = "".join(chr(rng.randrange(32, planes)) for _ in range(rng.randrange(1, 30)))
        text = text.encode(errors="ignore").decode()
        for codec in codecs:
            if codec is codecs[1]:
                text = text.replace("▁", "_")  # its own sign for a space
            assert codec.decode(codec.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_join_to_the_text(kind: str) -> None:
    codec = Tokenizer(KINDS[kind]())
    for text in filter(None, TEXT):
        ids = codec.encode(text, add_special_tokens=False)
        joined = b"".join(map(codec.token_bytes, ids)).decode()
        # Within a text they show a leading space, which decoding a whole text may drop.
        assert joined in (codec.decode(ids), " " + codec.decode(ids))


def test_token_bytes_are_exact_where_they_are_half_a_character() -> None:
    codec, library = Tokenizer(byte_level_bpe()), byte_level_bpe()
    for character, byte in _gpt2_map().items():
        assert codec.token_bytes(library.token_to_id(character)) == bytes([byte])
    ids = codec.encode("\u0800\U0001f9ff", add_special_tokens=False)
    assert b"".join(map(codec.token_bytes, ids)) == "\u0800\U0001f9ff".encode()
    assert codec.token_text(ids[0]) == "\ufffd"
    assert codec.token_text(codec.encode(" the", add_special_tokens=False)[0]).startswith(" ")

    codec, library = Tokenizer(byte_fallback_bpe()), byte_fallback_bpe()
    assert codec.token_bytes(library.token_to_id("<0x0A>")) == b"\n"
    assert codec.token_bytes(library.token_to_id("<0xE4>")) == b"\xe4"
    assert codec.token_bytes(library.token_to_id("▁the")) == b" the"
    assert codec.token_bytes(library.token_to_id("▁")) == b" "
    assert codec.token_text(library.token_to_id("</s>")) == "</s>"


def _gpt2_map() -> dict[str, int]:
    """As GPT-2's own code builds it, which is not how ours does."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    found, n = {chr(b): b for b in printable}, 0
    for b in range(256):
        if b not in printable:
            found[chr(256 + n)] = b
            n += 1
    return found


def test_one_bad_byte_does_not_spoil_a_run_of_byte_pieces() -> None:
    codec, library = Tokenizer(byte_fallback_bpe()), byte_fallback_bpe()
    the = library.token_to_id("▁the")
    run = [library.token_to_id(f"<0x{b:02X}>") for b in "界".encode() + b"\xff\xe4\xb8"]
    assert codec.decode([the, *run, the]) == "the界\ufffd\ufffd the"
    assert codec.decode([the, *run[:2], 2, 10**6, run[2]]) == "the界"
    assert codec.decode([2, *run[:1]], skip_special_tokens=False) == "</s>\ufffd"


def test_ids_without_a_token_decode_to_nothing() -> None:
    for make in KINDS.values():
        codec = Tokenizer(make())
        beyond = codec.vocab_size + 5
        known = codec.encode(TEXT[0], add_special_tokens=False)
        assert codec.decode([beyond, *known, beyond]) == codec.decode(known)
        assert codec.token_bytes(beyond) == b""
        assert codec.token_text(beyond) == ""


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    library = byte_level_bpe()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    codec = load_tokenizer(write(tmp_path, library))
    assert codec.decode(codec.encode(TEXT[0])) == TEXT[0]
    assert codec.encode("a") == codec.encode("a", add_special_tokens=False)


def test_special_tokens_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    codec = load_tokenizer(write(tmp_path, byte_fallback_bpe(), {"add_bos_token": False}))
    assert codec.encode("the")[0] == 1
    assert codec.encode("the", add_special_tokens=False) == codec.encode("the")[1:]
    assert codec.decode(codec.encode("the")) == "the"
    assert codec.decode(codec.encode("the"), skip_special_tokens=False) == "<s> the"


def test_a_template_knows_the_special_tokens_of_its_own_model(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "image_token": "<image>",
        "boi_token": {"content": "<boi>"},
        "add_bos_token": True,
        "extra_special_tokens": {"audio_token": "<audio>", "odd": 1},
        "chat_template": "{{ bos_token }}{{ image_token }}{{ boi_token }}{{ audio_token }}"
        "{{ odd is defined }}{{ add_bos_token is defined }}",
    }
    write(tmp_path, byte_level_bpe(), config)
    codec = load_tokenizer(tmp_path)
    assert codec.render_chat([{"role": "user", "content": "a"}]) == (
        "<s><image><boi><audio>FalseFalse"
    )


def test_named_special_tokens_and_ends(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    also = {"eos_token": {"content": "</s>"}, "bos_token": "<unk>"}
    codec = load_tokenizer(write(tmp_path, byte_level_bpe(), config, also), eos_token_ids=[7])
    assert codec.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert codec.eos_token_ids == {2, 7}
    assert Tokenizer(byte_level_bpe(), eos_token_ids=(9, 9)).eos_token_ids == {9}
    assert Tokenizer(byte_level_bpe()).eos_token_ids == frozenset()


def test_added_tokens_of_the_config(tmp_path: Path) -> None:
    library = byte_level_bpe()
    size = library.get_vocab_size()
    added = {
        "0": {"content": "<unk>", "special": True},
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    codec = load_tokenizer(write(tmp_path, library, {"added_tokens_decoder": added}))
    ids = codec.encode("a<think>b<|im_end|>")
    assert ids[-1] == size and size + 1 in ids
    assert codec.decode(ids) == "a<think>b"
    assert codec.token_bytes(size + 1) == b"<think>"

    added[str(size + 9)] = {"content": "<far>"}
    write(tmp_path, library, {"added_tokens_decoder": added})
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: .*'<far>', which tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: is missing$"),
        ("tokenizer.json", b"", r"tokenizer\.json: the tokenizers library cannot read it: "),
        ("tokenizer.json", b"{}", r"tokenizer\.json: the tokenizers library cannot read it: "),
        ("tokenizer.json", b"\xff\xfe{}", r"tokenizer\.json: the tokenizers library cannot"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json: must hold a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": 3}', r"tokenizer_config\.json: eos_token: must"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"%s": {"content": "x"}}}' % (b"9" * 5000),
            r"added_tokens_decoder\.9+: must be a token id",
        ),
        ("tokenizer_config.json", b'{"chat_template": 3}', r"chat_template: must be a string or"),
        ("special_tokens_map.json", b"{", r"special_tokens_map\.json: is not valid JSON"),
        ("chat_template.jinja", b"{% if %}", r"chat_template\.jinja: the chat template does not"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: cannot be read"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    name: str, content: bytes | None, cause: str, tmp_path: Path
) -> None:
    write(tmp_path, byte_level_bpe(), {}, {})
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=cause) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.file == tmp_path / name


def test_truncated_tokenizer_files_are_refused(tmp_path: Path) -> None:
    whole = byte_level_bpe().to_str()
    rng = random.Random(1)
    for _ in range(30):
        (tmp_path / "tokenizer.json").write_text(whole[: rng.randrange(len(whole) - 1)])
        with pytest.raises(CheckpointError):
            load_tokenizer(tmp_path)


def test_sentencepiece_alone_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is missing; tokenizer\.model alone is not read"):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: holds half a surrogate pair"):
        Tokenizer(byte_level_bpe()).encode("a\ud83d")


def test_chat_without_a_template_says_what_to_do_instead() -> None:
    with pytest.raises(InvalidRequest, match=r"messages: this model has no chat template.*prompt"):
        Tokenizer(byte_level_bpe()).render_chat([{"role": "user", "content": "hi"}])


def test_render_chat_with_the_named_tokens(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    codec = load_tokenizer(write(tmp_path, byte_level_bpe(), config))
    assert codec.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"


def test_many_threads_get_the_same_answer() -> None:
    codec = Tokenizer(byte_level_bpe())
    text = "\n".join(TEXT) * 20
    expected = codec.encode(text)
    seen: list[bool] = []

    def work() -> None:
        for _ in range(5):
            ids = codec.encode(text)
            shown = b"".join(map(codec.token_bytes, ids)).decode()
            seen.append(ids == expected and codec.decode(ids) == text == shown)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 40


def test_other_threads_go_on_while_a_long_text_is_tokenized() -> None:
    """The library keeps the interpreter to itself while it encodes a single text."""
    codec = Tokenizer(byte_level_bpe())
    turns = 0
    worker = threading.Thread(target=codec.encode, args=("some words and 1234 " * 20_000,))
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10  # one or two where the interpreter is held throughout


def test_the_longest_token_bounds_a_text_only_where_every_byte_is_kept() -> None:
    codec = Tokenizer(byte_level_bpe())
    longest = codec.max_token_bytes
    assert longest == max(len(codec.token_bytes(i)) for i in range(codec.vocab_size))
    for text in TEXT:
        assert len(codec.encode(text)) >= len(text.encode()) / longest
    assert Tokenizer(KINDS["wordpiece"]()).max_token_bytes is None


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  an extra

    library = ALL_KINDS[kind]()
    if library.post_processor is None:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.eos_token_ids == {theirs.eos_token_id}
    rng = random.Random(kind)
    alphabet = [*"".join(TEXT), *SPECIAL, "\n", "é", "e\u0301", "\u200d"]
    for _ in range(1000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            expected = theirs.decode(ids, skip_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == expected
        if len(text) < 20:
            _check_starts(ours, theirs, text)


def _check_starts(ours: Tokenizer, theirs: Any, text: str) -> None:
    """Where transformers says that a token begins, or at the spaces before it."""
    told = theirs(text, return_offsets_mapping=True)
    ids, starts = ours.encode_with_starts(text)
    assert ids == told["input_ids"]
    for at, (start, end) in zip(starts, told["offset_mapping"], strict=True):
        if end > start:
            assert at == start or not text[at:start].strip(), (text, at, start)
