"""What --speculative-config accepts, and what it says to what it does not."""

import json
from typing import get_args

import pytest

from duetto.core.engine_args import QuantizationName
from duetto.core.errors import ConfigError
from duetto.core.speculation import (
    DraftModelOptions,
    NgramOptions,
    SpeculativeConfig,
    SuffixOptions,
)

parse = SpeculativeConfig.parse


def only(config, model=None):
    """The options of the one method that is configured."""
    (options,) = parse(config, model).methods.values()
    return options


def test_nothing_is_no_speculation():
    assert parse(None) is None


def test_text_and_what_it_stands_for_are_alike():
    each = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert parse(each) == parse(json.dumps(each)) == parse([each]) == parse(json.dumps([each]))
    assert only(each) == NgramOptions(
        num_speculative_tokens=4, prompt_lookup_min=2, prompt_lookup_max=3
    )


def test_several_methods_keep_their_order():
    config = parse([{"method": "suffix"}, {"method": "ngram", "num_speculative_tokens": 3}])
    assert dict(config.max_drafts) == {"suffix": 16, "ngram": 3}
    assert list(config.methods) == ["suffix", "ngram"]
    assert config.draft_model is None


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, (2, 8)),
        ({"prompt_lookup_max": 1}, (1, 1)),
        ({"prompt_lookup_max": 5}, (2, 5)),
        ({"prompt_lookup_min": 10}, (10, 10)),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": None}, (3, 8)),
    ],
)
def test_a_bound_without_the_other(given, bounds):
    options = only({"method": "ngram", **given})
    assert (options.prompt_lookup_min, options.prompt_lookup_max) == bounds


def test_suffix_takes_vllms_names():
    named = {
        "suffix_decoding_max_tree_depth": 32,
        "suffix_decoding_max_cached_requests": 0,
        "suffix_decoding_max_spec_factor": 2,
        "suffix_decoding_min_token_prob": 0.5,
    }
    assert only({"method": "suffix", **named}) == SuffixOptions(**named)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (None, "small"),
        ({"model": "small"}, None),
        ({"method": "draft_model", "model": "small"}, None),
        ({"method": "draft_model"}, "small"),
    ],
)
def test_ways_to_name_a_draft_model(config, model):
    assert only(config, model) == DraftModelOptions(model="small")


def test_a_model_beside_other_methods():
    config = parse({"method": "ngram"}, "small")
    assert config.draft_model == DraftModelOptions(model="small")
    assert list(config.methods) == ["ngram", "draft_model"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"draft_tensor_parallel_size": 1},
        {"enforce_eager": True},
        {"parallel_drafting": False},
        {"rejection_sample_method": "standard"},
        {"draft_sample_method": "greedy"},
        {"disable_padded_drafter_batch": None},
        {"suffix_decoding_max_tree_depth": None},  # null asks for nothing, whosesoever it is
    ],
)
def test_what_changes_nothing_is_accepted(harmless):
    assert only({"method": "ngram", **harmless}) == NgramOptions()


NGRAM = {"method": "ngram"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("ngram", ["is not JSON", '{"method": "ngram"']),
        ("", ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ('{"method": "ngram", "method": "suffix"}', ["a name twice"]),
        ("7", ["must be an object or a list of some, not 7"]),
        ([], ["must be an object or a list of some"]),
        ([NGRAM, "suffix"], ["must be an object or a list of some"]),
        ({}, ["method is missing", "ngram, suffix, draft_model"]),
        ({"method": "nrgam"}, ["'nrgam' is not one of ngram, suffix, draft_model", "mean ngram?"]),
        ({"method": 3}, ["3 is not one of ngram"]),
        ({"method": ["ngram"]}, ["is not one of ngram"]),
        (
            {"method": "eagle3", "model": "x"},
            ["method eagle3 is not one that Duetto has", "suffix"],
        ),
        ({"method": "medusa"}, ["medusa is not one that Duetto has"]),
        ({"method": "qwen3_next_mtp"}, ["qwen3_next_mtp is not one that Duetto has"]),
        ([NGRAM, {"method": "ngram"}], ["method ngram twice"]),
        ({**NGRAM, "prompt_lookup": 3}, ["prompt_lookup is not an option", "prompt_lookup_m"]),
        ({**NGRAM, 7: 3}, ["7 is not an option of method ngram"]),
        ({**NGRAM, "model": "x"}, ["model is an option of method draft_model, not of ngram"]),
        ({**NGRAM, "num_speculative_tokens": 0}, ["num_speculative_tokens must be", "1 to 16"]),
        ({**NGRAM, "num_speculative_tokens": 17}, ["from 1 to 16, not 17"]),
        ({**NGRAM, "num_speculative_tokens": "4"}, ["whole number", "not '4'"]),
        ({**NGRAM, "num_speculative_tokens": True}, ["whole number", "not True"]),
        ({**NGRAM, "num_speculative_tokens": 4.0}, ["whole number", "not 4.0"]),
        ({**NGRAM, "prompt_lookup_min": 5, "prompt_lookup_max": 3}, ["5 is more than", "3"]),
        ({**NGRAM, "draft_tensor_parallel_size": 2}, ["must be 1 or left out, not 2"]),
        ({**NGRAM, "draft_tensor_parallel_size": True}, ["must be 1 or left out, not True"]),
        ({**NGRAM, "rejection_sample_method": "synthetic"}, ['must be "standard"']),
        ({**NGRAM, "use_heterogeneous_vocab": True}, ["must be false or left out"]),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, ["from 0 to 1, not 1.5"]),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": 0}, ["factor 0 never drafts"]),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": float("nan")}, ["not nan"]),
        ({"method": "draft_model"}, ["model is missing", "--speculative-model"]),
        ({"method": "draft_model", "model": ""}, ["model must be a text"]),
        ({"method": "draft_model", "model": 3}, ["model must be a text", "not 3"]),
        ({"model": "x", "quantization": "int7"}, ["'int7' is not one of int8, int4, fp8, none"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(config, words):
    with pytest.raises(ConfigError) as caught:
        parse(config)
    message = str(caught.value)
    assert message.startswith("--speculative-config: ") and "\n" not in message
    assert len(message) < 500
    for each in words:
        assert each in message


SUFFIX = {"method": "suffix"}
MANY_DIGITS = 10**5000  # more than Python writes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (json.dumps({**SUFFIX, "suffix_decoding_max_spec_factor": 10**400}), "0 to 100, not 1"),
        ({**NGRAM, "num_speculative_tokens": MANY_DIGITS}, "from 1 to 16, not "),
        ({**NGRAM, "enforce_eager": MANY_DIGITS}, "true, false or left out, not "),
        ({**NGRAM, MANY_DIGITS: 1}, "is not an option of method ngram"),
        ({**NGRAM, "a\x1b[31m\nb": 1}, r"'a\x1b[31m\nb' is not an option of method ngram"),
        ({"method": MANY_DIGITS}, "is not one of ngram, suffix, draft_model"),
        pytest.param(MANY_DIGITS, "must be an object or a list of some", id="a number"),
        ("1" * 5000, "is not JSON"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(config, words):
    with pytest.raises(ConfigError) as caught:
        parse(config)
    line = str(caught.value)
    assert words in line and "\n" not in line and len(line) < 300


@pytest.mark.parametrize("name", get_args(QuantizationName))
def test_a_draft_takes_the_engine_s_quantizations(name):
    assert only({"model": "small", "quantization": name}).quantization == name


def test_bounds_are_written_whole():
    with pytest.raises(ConfigError, match="from 1 to 2147483648, not 2147483649"):
        parse({"model": "small", "max_model_len": 2**31 + 1})
    with pytest.raises(ConfigError, match="from 0 to 1000000, not -1"):
        parse({**SUFFIX, "suffix_decoding_max_cached_requests": -1})


@pytest.mark.parametrize("config", [{"model": "a"}, {"method": "draft_model", "model": "a"}])
def test_a_draft_model_is_named_once(config):
    with pytest.raises(ConfigError, match="--speculative-model with a model in --speculative-con"):
        parse(config, "b")


@pytest.mark.parametrize("model", ["", 3])
def test_a_model_must_have_a_name(model):
    with pytest.raises(ConfigError, match="--speculative-model: must be a directory"):
        parse(None, model)
