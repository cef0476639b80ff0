"""`LLM.cache`: what is there of a text, what is kept, and what is dropped."""

import math

import pytest

from duetto import LLM, EngineError, InvalidRequest, SamplingParams
from duetto.core.cache_control import PinNotFound, PinQuotaExceeded

TEXT = "class Engine:\n    pass\n" * 4
OTHER = "a prompt that is long enough to fill some blocks of eight tokens, and one more"
MARKED = {"text": TEXT, "reusable": True}
SEGMENTED = {"segments": ["Read:\n", MARKED, "what does it import?"]}
ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def opened(tiny_model):
    with LLM(tiny_model, max_num_seqs=4, block_size=8, max_model_len=256) as llm:
        yield llm


@pytest.fixture
def llm(opened):
    yield opened
    for pin in opened.cache.pins():
        opened.cache.drop(pin)
    opened.reset_prefix_cache()


def test_a_look_up_says_what_a_request_finds(llm):
    assert llm.cache.lookup(TEXT).num_cached == 0
    llm.generate(TEXT, ONE)
    found = llm.cache.lookup(TEXT)
    (again,) = llm.generate(TEXT, ONE)
    assert found.num_cached == again.num_cached_tokens > 24
    assert found.num_tokens == len(again.prompt_token_ids)
    ids = {"prompt_token_ids": again.prompt_token_ids}
    assert llm.cache.lookup(ids).num_cached == found.num_cached
    assert llm.cache.lookup({"prompt": TEXT, "cache_salt": "x"}).num_cached == 0


def test_of_a_prompt_in_segments_it_is_told_what_is_there_of_each(llm):
    assert [s.num_cached for s in llm.cache.lookup(SEGMENTED).segments] == [0]
    llm.generate(SEGMENTED, ONE, reuse="none")
    (segment,) = llm.cache.lookup(SEGMENTED).segments
    assert segment.num_cached == segment.num_tokens > 24
    assert llm.cache.lookup({"segment": TEXT}).num_cached == segment.num_tokens
    ids = llm.get_tokenizer().encode(TEXT, add_special_tokens=False)
    assert llm.cache.lookup({"segment": ids}).num_cached == segment.num_tokens
    assert llm.cache.lookup({"segment": TEXT, "cache_salt": "x"}).num_cached == 0
    chat = {"role": "user", "content": TEXT}
    assert llm.cache.lookup(llm.chat_prompt([chat])).segments == ()


def test_from_pinning_to_dropping(llm):
    pin = llm.cache.pin({"segment": TEXT}, ttl_s=600)
    assert pin.num_cached == 0 and pin.is_segment and 590 < (pin.ttl_left_s or 0) <= 600
    llm.generate(SEGMENTED, ONE, reuse="none")
    ranked = llm.cache.pin(OTHER, priority=80)
    listed = llm.cache.pins()
    assert [each.number for each in listed] == [pin.number, ranked.number]
    assert listed[0].num_cached == listed[0].num_tokens
    assert llm.cache.lookup({"segment": TEXT}).ranges[0].priority is None
    assert llm.cache.unpin(OTHER).number == ranked.number
    with pytest.raises(PinNotFound):
        llm.cache.unpin(ranked)
    dropped = llm.cache.drop(pin)
    assert dropped.has_ended_pin and dropped.num_dropped == listed[0].num_blocks
    assert llm.cache.lookup({"segment": TEXT}).num_cached == 0
    assert llm.cache.pins() == []
    assert not llm.cache.drop({"segment": TEXT}).has_ended_pin


def test_many_pins_are_all_listed(tiny_model):
    with LLM(tiny_model, max_num_seqs=16, block_size=8, max_model_len=256) as llm:
        for number in range(105):
            llm.cache.pin({"prompt_token_ids": [number + 5] * 8}, priority=1)
        assert len({pin.number for pin in llm.cache.pins()}) == 105


def test_more_than_may_be_kept_is_refused(tiny_model):
    with LLM(tiny_model, max_num_seqs=1, block_size=8, max_model_len=64) as llm:
        num_blocks = llm.config.num_blocks
        with pytest.raises(PinQuotaExceeded):
            for number in range(num_blocks):
                llm.cache.pin({"prompt_token_ids": [number + 5] * 64})
        assert len(llm.cache.pins()) < num_blocks


@pytest.mark.parametrize(
    ("text", "options", "field"),
    [
        ("", {}, "prompt"),
        ("a", {}, "prompt"),  # it fills no block
        (5, {}, "prompt"),
        ({"promt": TEXT}, {}, "prompt"),
        ({"prompt_token_ids": [10**6] * 9}, {}, "prompt"),
        (TEXT * 99, {}, "prompt"),
        (SEGMENTED, {}, "segments"),
        ({"segments": [TEXT, 5]}, {}, "segments[1]"),
        ({"segments": [MARKED] * 257}, {}, "prompt"),
        ({"segment": 5}, {}, "segment"),
        ({"segment": [0.5]}, {}, "segment"),
        ({"segment": [10**6]}, {}, "segment"),
        ({"segment": ""}, {}, "segment"),
        ({"segment": TEXT, "prompt": TEXT}, {}, "segment"),
        ({"segment": TEXT, "cache_salt": 5}, {}, "segment"),
        (TEXT, {"ttl_s": 0}, "ttl_s"),
        (TEXT, {"ttl_s": math.nan}, "ttl_s"),
        (TEXT, {"ttl_s": "5m"}, "ttl_s"),
        (TEXT, {"ttl_s": True}, "ttl_s"),
        (TEXT, {"priority": 101}, "priority"),
        (TEXT, {"priority": 1.5}, "priority"),
        (TEXT, {"priority": True}, "priority"),
    ],
    ids=str,
)
def test_refusals_name_the_field_and_change_nothing(llm, text, options, field):
    with pytest.raises(InvalidRequest) as refusal:
        llm.cache.pin(text, **options)
    assert refusal.value.field == field
    assert llm.cache.pins() == []


def test_without_a_prefix_cache_there_is_nothing_to_ask(tiny_model):
    with (
        LLM(tiny_model, max_num_seqs=1, enable_prefix_caching=False) as llm,
        pytest.raises(InvalidRequest, match="--enable-prefix-caching"),
    ):
        llm.cache.lookup(TEXT)
    with pytest.raises(EngineError, match="closed"):
        _ = llm.cache
