"""What the native plan refuses, before anything is written."""

from typing import Any

import numpy as np
import pytest
from backends.native_cases import BLOCK_SIZE, ISAS, ints, native, numbers, one_request, pack, run


def small_plan() -> tuple[Any, Any, tuple[int, int, int]]:
    plan = native.Plan(native.Pool(2), ISAS[0])
    buffer = plan.buffer(48)
    plan.embed((buffer, 0, 48), pack("f32", 0, numbers(7, 48)))
    plan.write_kv((buffer, 16, 16), (buffer, 32, 16), 0)
    plan.attention((buffer, 0, 16), (buffer, 0, 16), 0, 2, 2, 8, 0.3)
    return plan, native.KvArena(4, BLOCK_SIZE, [(2, 8)], "f32", ISAS[0]), (buffer, 0, 48)


BAD_STEPS = {
    "token_ids[1] is 7": {"token_ids": [0, 7, 1]},
    "token_ids[2] is -1": {"token_ids": [0, 1, -1]},
    "equally long": {"token_ids": [0, 1]},
    "positions[0] is negative": {"positions": [-1, 1, 2]},
    "positions[2] is 3: beyond": {"positions": [0, 1, 3]},
    "slots[0] is 64": {"slots": [64, 1, 2]},
    "slots[2] is -5": {"slots": [1, 2, -5]},
    "query_starts must begin with 0": {"query_starts": [0, 2]},
    "query_starts must have one entry": {"query_starts": [0, 2, 3]},
    "context_lens[0] is 17": {"context_lens": [17]},
    "block_tables[0, 0] is 4": {"block_tables": [[4]]},
    "block_tables[0, 0] is -1": {"block_tables": [[-1]]},
    "logit_rows[0] is 3": {"logit_rows": [3]},
    "logit_rows[1] is 1": {"logit_rows": [1, 1]},
    "an empty step": {"token_ids": [], "positions": [], "slots": [], "query_starts": [0, 0]},
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_bad_steps_are_refused_before_anything_is_written(message: str) -> None:
    plan, kv, result = small_plan()
    changes = {name: ints(values) for name, values in BAD_STEPS[message].items()}
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        run(plan, one_request(3, **changes), result, kv)
    assert not kv.blocks(0).any()
    run(plan, one_request(3), result, kv)
    assert kv.blocks(0).any()


def test_a_falling_query_start_is_refused() -> None:
    plan, kv, result = small_plan()
    step = one_request(3, query_starts=ints([0, 4, 3]), context_lens=ints([3, 3]))
    with pytest.raises(ValueError, match="must not fall"):
        run(plan, step._replace(block_tables=ints([[1], [1]])), result, kv)


def test_a_kv_arena_must_fit_the_plan() -> None:
    plan, _, result = small_plan()
    with pytest.raises(ValueError, match="needs a KV arena"):
        run(plan, one_request(3), result)
    for layers, message in (([], "no layer 0"), ([(1, 16)], "1 heads of 16"), ([(2, 4)], "not 8")):
        kv = native.KvArena(4, BLOCK_SIZE, layers, "f32", ISAS[0])
        with pytest.raises(ValueError, match=message):
            run(plan, one_request(3), result, kv)
    if len(ISAS) > 1:
        other = native.KvArena(4, BLOCK_SIZE, [(2, 8)], "f32", ISAS[1])
        with pytest.raises(ValueError, match="was made for"):
            run(plan, one_request(3), result, other)


def bad_operations() -> dict[str, Any]:
    weight = pack("f32", 0, numbers(8, 16))
    ones = np.ones(16, np.float32)
    return {
        "no buffer 3": lambda p: p.soft_cap((3, 0, 16), 1.0),
        "not in a buffer of 16": lambda p: p.soft_cap((0, 4, 16), 1.0),
        "cap must be positive": lambda p: p.soft_cap((0, 0, 16), 0.0),
        "x is 15 columns wide, not 16": lambda p: p.linear((0, 0, 15), (1, 0, 8), weight),
        "x is 16 columns wide, not 32": lambda p: p.linear(
            (0, 0, 16), (1, 0, 8), weight, gated_act="silu"
        ),
        "out is 7 columns wide, not 8": lambda p: p.linear((0, 0, 16), (1, 0, 7), weight),
        "overlap": lambda p: p.linear((0, 0, 16), (0, 8, 8), weight),
        "bias has 16 numbers": lambda p: p.linear((0, 0, 16), (1, 0, 8), weight, ones),
        "norm has 8 numbers": lambda p: p.linear(
            (0, 0, 16), (1, 0, 8), weight, norm=(ones[:8].copy(), 1e-6, 0.0)
        ),
        "activation 'relu'": lambda p: p.gated_act((0, 0, 16), (1, 0, 8), "relu"),
        "multiple of the group": lambda p: p.rms_norm((0, 0, 10), (1, 0, 10), ones, 1e-6, 16),
        "no such spec": lambda p: p.rope((0, 0, 16), 8, 0),
        "multiple of num_kv_heads": lambda p: p.attention((0, 0, 16), (1, 0, 16), 0, 4, 3, 4, 1.0),
        "a buffer of 0 columns": lambda p: p.buffer(0),
    }


@pytest.mark.parametrize("message", bad_operations())
def test_bad_operations_are_refused(message: str) -> None:
    plan = native.Plan(native.Pool(1), ISAS[0])
    for _ in range(2):
        plan.buffer(16)
    with pytest.raises(ValueError, match=message):
        bad_operations()[message](plan)
    assert plan.num_ops == 0


def test_bad_weights_are_refused() -> None:
    data_bytes, scale_bytes = native.packed_bytes("int8", 128, 8, 256)
    data, scales = native.Arena(data_bytes + 64).array, native.Arena(scale_bytes).array
    with pytest.raises(ValueError, match="must have"):
        native.Weight("int8", 128, 8, 256, data, scales)
    with pytest.raises(ValueError, match="aligned to 64"):
        native.Weight("int8", 128, 8, 256, data[1 : data_bytes + 1], scales)
    with pytest.raises(ValueError, match="need scales"):
        native.Weight("int8", 128, 8, 256, data[:data_bytes])
    coded = native.Arena(native.packed_bytes("bf12", 0, 8, 256)[0]).array
    coded[:] = 0x7F
    with pytest.raises(ValueError, match="exceptions do not lie in their tiles"):
        native.Weight("bf12", 0, 8, 256, coded)
    with pytest.raises(ValueError, match="must be one of f32, bf16, int8, int4, bf12"):
        native.packed_bytes("fp8", 0, 8, 256)
    with pytest.raises(ValueError, match="multiple of 8"):
        native.packed_bytes("int8", 100, 8, 256)
    with pytest.raises(ValueError, match="must have 16 columns"):
        sources = [numbers(4, 16), numbers(4, 8)]
        native.pack("f32", 0, sources, data, None, native.Pool(1))


def bad_types() -> dict[str, Any]:
    data = native.Arena(native.packed_bytes("f32", 0, 4, 16)[0]).array
    pool, ones = native.Pool(1), np.ones(16, np.float32)
    return {
        "a source of doubles": lambda p: native.pack(
            "f32", 0, [np.ones((4, 16))], data, None, pool
        ),
        "a source of one dimension": lambda p: native.pack("f32", 0, [ones], data, None, pool),
        "no array": lambda p: native.pack("f32", 0, ["weights"], data, None, pool),
        "data of words": lambda p: native.Weight("f32", 0, 4, 16, data.view(np.float32)),
        "data with gaps": lambda p: native.Weight("f32", 0, 4, 16, data[::2]),
        "a norm of doubles": lambda p: p.rms_norm((0, 0, 16), (1, 0, 16), np.ones(16), 1e-6, 16),
        "a width that is no integer": lambda p: p.buffer(16.5),
        "token ids of 64 bits": lambda p: run(
            p, one_request(3, token_ids=np.zeros(3, np.int64)), (0, 0, 16)
        ),
    }


@pytest.mark.parametrize("what", bad_types())
def test_another_type_is_a_type_error(what: str) -> None:
    plan = native.Plan(native.Pool(1), ISAS[0])
    for _ in range(2):
        plan.buffer(16)
    with pytest.raises(TypeError):
        bad_types()[what](plan)
    assert plan.num_ops == 0
