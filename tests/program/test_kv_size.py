"""The size of the KV cache and the length of context that follow from memory."""

import pytest

from duetto.core.errors import ConfigError
from duetto.program.kv_size import bytes_per_block, plan_kv
from duetto.program.ops import Ref
from duetto.program.program import KVSpec, Program

MIB = 2**20


def program(max_model_len=1024):
    """32 numbers per token and layer, in two layers: 256 bytes per token in float32."""
    layer = KVSpec(num_kv_heads=2, head_dim=8)
    return Program((), {}, {}, (layer, layer), Ref("logits", 0, 100), max_model_len)


def plan(max_model_len=None, memory_bytes=None, available_bytes=1024 * MIB, **changes):
    """As load_model asks: a length that is not given is the model's, and may be shortened."""
    arguments = {"block_size": 32, "block_bytes": BLOCK, "max_num_seqs": 4, **changes}
    return plan_kv(
        program(max_model_len or 1024),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
        may_shorten=max_model_len is None,
        **arguments,
    )


BLOCK = 32 * 256  # bytes


def test_a_block_holds_the_keys_and_values_of_every_layer():
    assert bytes_per_block(program(), 32, "float32") == BLOCK
    assert bytes_per_block(program(), 32, "bfloat16") == BLOCK // 2
    assert bytes_per_block(program(), 1, "float16") == 128
    # 8 numbers of a byte and their scale, 4 bytes: 1.5 times the numbers
    assert bytes_per_block(program(), 32, "int8") == BLOCK * 3 // 8


def test_by_default_every_request_can_reach_the_greatest_length_and_no_more_is_taken():
    got = plan()
    assert (got.num_blocks, got.max_model_len, got.notes) == (4 * 32, 1024, ())
    assert got.memory_bytes == 4 * 32 * BLOCK
    assert plan(max_model_len=33).num_blocks == 4 * 2


def test_by_default_a_quarter_of_the_available_memory_is_the_most():
    got = plan(max_num_seqs=1000, available_bytes=4 * 100 * BLOCK)
    assert (got.num_blocks, got.max_model_len, got.notes) == (100, 1024, ())


def test_given_memory_is_used_in_full():
    assert plan(memory_bytes=5000 * BLOCK + 1).num_blocks == 5000


def test_a_length_that_was_not_asked_for_is_cut_to_what_fits_and_said():
    for got in (plan(available_bytes=4 * 10 * BLOCK), plan(memory_bytes=10 * BLOCK)):
        assert (got.num_blocks, got.max_model_len) == (10, 320)
        assert len(got.notes) == 1
        assert "320" in got.notes[0] and "1024" in got.notes[0]
        assert "--kv-cache-memory-bytes" in got.notes[0]


def test_a_length_that_was_asked_for_gets_more_than_a_quarter_if_there_is_more():
    got = plan(max_model_len=1024, available_bytes=40 * BLOCK)
    assert (got.num_blocks, got.max_model_len, got.notes) == (32, 1024, ())


@pytest.mark.parametrize(
    "limits", [{"available_bytes": 31 * BLOCK}, {"memory_bytes": 31 * BLOCK}], ids=str
)
def test_a_length_that_was_asked_for_and_does_not_fit_is_refused_with_numbers(limits):
    with pytest.raises(ConfigError) as refused:
        plan(max_model_len=1024, **limits)
    message = str(refused.value)
    assert "--max-model-len 1024" in message and "--kv-cache-memory-bytes" in message
    assert "0.25 MiB" not in message and "0.2 MiB" in message  # 32 and 31 blocks of 8 KiB
    assert "992 tokens" in message


def test_memory_below_one_block_is_refused():
    with pytest.raises(ConfigError, match="enough for 0 tokens"):
        plan(memory_bytes=BLOCK - 1)


def test_there_are_no_more_slots_than_an_int32_can_name():
    assert plan(memory_bytes=2**50).num_blocks == 2**31 // 32
