"""The demo tokenizer: every name is two tokens, of both splits, and prompts are what is trained."""

import json

import pytest

from duetto.checkpoints.tokenizer import load_tokenizer
from duetto.evals.worlds.names import BEGINNINGS, KINDS, all_names
from duetto.evals.worlds.relations import YEARS
from duetto.evals.worlds.world import WorldOptions, draw_world
from training.tokenizer import MAX_TOKENS, SPECIAL_TOKENS, train_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_every_name_is_a_beginning_and_an_ending(tokenizer):
    beginnings = {b: tokenizer.encode(f" {b}").ids for b in BEGINNINGS}
    assert all(len(ids) == 1 for ids in beginnings.values())
    for kind in KINDS:
        for split in ("train", "eval"):
            for name in all_names(kind, split):
                ids = tokenizer.encode(f" {name}").ids
                assert (len(ids), ids[:1]) == (2, beginnings[name.beginning]), str(name)


def test_a_year_is_one_token(tokenizer):
    assert all(len(tokenizer.encode(f" {year}").ids) == 1 for year in YEARS)


def test_held_out_documents_need_no_rare_tokens(tokenizer):
    """Words of the language are whole; nothing of a held-out document falls to letters."""
    for seed in range(50):
        for document in draw_world(seed, "eval", WorldOptions()).documents:
            num_words = len(document.split())
            num_names = sum(word[0].isupper() for word in document.split())
            encoded = tokenizer.encode(f" {document}").ids
            assert len(encoded) <= num_words + num_names + document.count(".")


def test_special_tokens_come_first_and_the_rest_fits(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= MAX_TOKENS
    text = "any text, even ünïcode 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_it_again_gives_the_same(tokenizer):
    assert train_tokenizer().to_str() == tokenizer.to_str()


def test_it_loads_as_a_checkpoint_s_tokenizer(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 512)
    loaded = load_tokenizer(tmp_path, eos_token_ids=[4])
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Question: Why?"},
        {"role": "assistant", "content": "Halford"},
        {"role": "user", "content": "Question: Who?"},
    ]
    assert loaded.render_chat(chat) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nQuestion: Why?<|end|>\n"
        "<|assistant|> Halford<|end|>\n<|user|>\nQuestion: Who?<|end|>\n<|assistant|>"
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == ("<|end|>", 512)
