"""The ids of a tokenizer and the rows of a model need not be the same, and mostly are not."""

from pathlib import Path

import pytest
from tiny_tokenizers import KINDS, byte_fallback_bpe, byte_level_bpe
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library

from duetto.checkpoints.token_rows import check_vocabulary
from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.errors import CheckpointError, InvalidRequest


def with_added(library: Library, *tokens: str, special: bool = False) -> Library:
    library.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return library


# As published: (what is there, rows of the model, tokens without a row)
PUBLISHED = {
    "Gemma 3's image token": (("<image_soft_token>",), -1),
    "CodeLlama 34B's infilling": (("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), -4),
    "a fine-tune's <pad>, and some with a row": (("<a>", "<b>", "<pad>"), -1),
    "as many as there are rows": (("<a>",), 0),
    "padded": (("<a>",), 271),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_few_added_tokens_without_a_row_are_no_reason_to_refuse(
    kind: str, case: str, tmp_path: Path
) -> None:
    added, more_rows = PUBLISHED[case]
    library = with_added(KINDS[kind](), *added)
    rows = library.get_vocab_size() + more_rows
    library.save(str(tmp_path / "tokenizer.json"))
    codec = load_tokenizer(tmp_path, vocab_size=rows)
    assert codec.vocab_size == rows
    beyond = added[len(added) + more_rows :] if more_rows < 0 else ()
    assert tuple(token for _, token in sorted(codec.tokens_without_row.items())) == beyond
    for token in added:
        if token in beyond:
            with pytest.raises(InvalidRequest) as caught:
                codec.encode(f"a {token} b")
            assert caught.value.field == "prompt"
            assert repr(token) in str(caught.value) and str(rows) in str(caught.value)
            with pytest.raises(InvalidRequest):
                codec.encode_with_starts(token)
        elif kind in ("byte_level_bpe", "byte_fallback_bpe"):
            assert library.token_to_id(token) in codec.encode(f"a {token} b")
    assert max(codec.encode("the dog")) < rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without_row", [1, 40, 0.75])
def test_a_tokenizer_whose_own_vocabulary_has_no_rows_belongs_to_another_model(
    kind: str, without_row: float, tmp_path: Path
) -> None:
    library = KINDS[kind]()
    size = library.get_vocab_size()
    rows = size - int(without_row if without_row >= 1 else without_row * size)
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="belongs to another model") as caught:
        load_tokenizer(tmp_path, vocab_size=rows)
    assert caught.value.file == tmp_path / "tokenizer.json"
    assert str(rows) in str(caught.value) and str(size - 1) in str(caught.value)


def test_one_added_token_far_beyond_the_rows_belongs_to_another_model() -> None:
    library = byte_level_bpe()
    rows = library.get_vocab_size()
    library.add_tokens([f"<filler_{i}>" for i in range(100)])
    far = {rows + 99: "<filler_99>"}
    with pytest.raises(CheckpointError, match=f"1 tokens lie beyond it, up to {rows + 99}"):
        check_vocabulary(library, far, rows, Path("tokenizer.json"))


def test_more_added_tokens_than_any_published_checkpoint_lacks_rows_for_are_refused() -> None:
    library = with_added(byte_level_bpe(), *(f"<extra_{i}>" for i in range(1000)))
    rows = byte_level_bpe().get_vocab_size()
    with pytest.raises(CheckpointError, match="1000 tokens lie beyond it"):
        Tokenizer(library, vocab_size=rows)
    Tokenizer(library, vocab_size=rows + 990)


def test_a_token_around_each_prompt_must_have_a_row() -> None:
    """As if a tokenizer of Llama 3 stood beside a model of 128,000 rows."""
    library = with_added(byte_level_bpe(), "<|begin|>", special=True)
    rows = library.get_vocab_size() - 1
    assert Tokenizer(library, vocab_size=rows).encode("a")
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", rows)]
    )
    with pytest.raises(CheckpointError, match=r"puts '<\|begin\|>' .* around each prompt"):
        Tokenizer(library, vocab_size=rows)


@pytest.mark.parametrize("beyond", [0, 9999, 2**31])
def test_also_one_that_is_in_no_vocabulary(beyond: int) -> None:
    library = byte_level_bpe()
    rows = library.get_vocab_size()
    library.post_processor = processors.BertProcessing(("x", rows + beyond), ("a", 1))
    with pytest.raises(CheckpointError, match=f"puts a token .{rows + beyond}. around each prompt"):
        Tokenizer(library, vocab_size=rows)


def test_an_end_of_sequence_without_a_row_is_no_end() -> None:
    library = with_added(byte_level_bpe(), "<|end|>", special=True)
    rows = library.get_vocab_size() - 1
    tokens = {"eos_token": "<|end|>"}
    assert Tokenizer(library, special_tokens=tokens, vocab_size=rows).eos_token_ids == frozenset()
    again = with_added(byte_level_bpe(), "<|end|>", special=True)
    codec = Tokenizer(again, special_tokens=tokens, vocab_size=rows + 1, eos_token_ids=[5])
    assert codec.eos_token_ids == {5, rows}


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
def test_an_id_with_a_row_and_no_token_is_an_ordinary_id_without_text(make) -> None:
    size = make().get_vocab_size()
    codec = Tokenizer(make(), vocab_size=size + 271)
    ids = codec.encode("the dog")
    for beyond in (size, size + 270):
        assert codec.decode([beyond, *ids, beyond, beyond]) == codec.decode(ids)
        assert codec.token_bytes(beyond) == b"" and codec.token_text(beyond) == ""
