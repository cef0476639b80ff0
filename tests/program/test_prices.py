"""Prices, against cases worked out by hand and against counting one by one."""

import pytest

from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.models.programs import build_program
from duetto.program.ops import Attention, Embed, Linear, SelectRows, WriteKV
from duetto.program.program import Program
from duetto.program.shape import BatchShape, Cost, Precision, RequestShape

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QWEN_2_5_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}


def program(config: dict[str, object]) -> Program:
    return build_program(parse_config(JsonSection("config.json", config)))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN_2_5_05B, 494_032_768),  # tied embeddings counted once
        (GEMMA_2_2B, 2_614_341_888),  # head_dim is not hidden / heads
    ],
)
def test_parameters_are_what_the_model_cards_say(
    config: dict[str, object], parameters: int
) -> None:
    assert program(config).num_parameters == parameters


@pytest.mark.parametrize(
    ("config", "kv_bytes"),
    [(LLAMA_2_7B, 512 * 1024), (LLAMA_3_8B, 128 * 1024), (QWEN_2_5_05B, 12 * 1024)],
)
def test_kv_bytes_per_token_in_bf16(config: dict[str, object], kv_bytes: int) -> None:
    assert program(config).kv_bytes_per_token(2) == kv_bytes


def linear_cost(config: dict[str, object], shape: BatchShape) -> Cost:
    precision = Precision()
    costs = [op.cost(shape, precision) for op in program(config).ops if isinstance(op, Linear)]
    return sum(costs, Cost(0, 0, 0))


def test_a_token_costs_two_flops_per_linear_parameter() -> None:
    # Llama 3 8B, per layer: q and o 4096², k and v 4096 x 1024, three of 4096 x 14336.
    per_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert per_layer == 218_103_808
    head = 4096 * 128256
    one = linear_cost(LLAMA_3_8B, BatchShape((RequestShape(1, 0),)))
    assert one.flops == 2 * (32 * per_layer + head)
    # A prompt of 10 tokens whose last logits alone are wanted pays the head once.
    ten = linear_cost(LLAMA_3_8B, BatchShape((RequestShape(10, 0),)))
    assert ten.flops == 2 * (10 * 32 * per_layer + head)


def test_weights_are_read_once_however_many_tokens_share_the_step() -> None:
    one = linear_cost(QWEN_2_5_05B, BatchShape((RequestShape(1, 0, 0),)))
    many = linear_cost(QWEN_2_5_05B, BatchShape((RequestShape(1, 0, 0),) * 8))
    # Without logit rows the head is not read at all. Per layer: q, o 896²; k, v 896 x 128; MLP;
    # and the 896 + 2 * 128 biases.
    weights = 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864 + 896 + 256) * 2
    activations = one.bytes_read - weights
    assert activations > 0
    assert many.bytes_read == weights + 8 * activations


@pytest.mark.parametrize("window", [None, 1, 2, 19, 48, 1000])
@pytest.mark.parametrize("num_past", [0, 1, 18, 19, 47, 99])
@pytest.mark.parametrize("num_new", [1, 2, 19, 99])
def test_attended_pairs_and_tokens_against_counting(
    num_new: int, num_past: int, window: int | None
) -> None:
    pairs = {
        (query, key)
        for query in range(num_past, num_past + num_new)
        for key in range(query + 1)
        if window is None or key > query - window
    }
    request = RequestShape(num_new, num_past)
    assert request.attended_pairs(window) == len(pairs)
    assert request.read_tokens(window) == len({key for _, key in pairs})


def test_attention_of_a_batch_by_hand() -> None:
    model = program(QWEN_2_5_05B)
    attention = next(op for op in model.ops if isinstance(op, Attention))
    shape = BatchShape((RequestShape(3, 2), RequestShape(1, 9)))
    cost = attention.cost(shape, Precision(activation_bytes=4, kv_bytes=2))
    # Pairs: 3 + 4 + 5, and 10. Each of 14 heads multiplies and adds 64 numbers twice.
    assert cost.flops == 22 * 14 * (4 * 64 + 5)
    # Keys and values of 5 + 10 tokens, 2 heads (not 14) of 64; queries of 4 tokens.
    assert cost.bytes_read == 15 * 2 * 2 * 64 * 2 + 4 * 896 * 4
    assert cost.bytes_written == 4 * 896 * 4


def test_what_the_cache_and_the_embedding_move() -> None:
    model = program(QWEN_2_5_05B)
    shape = BatchShape((RequestShape(3, 2, 2), RequestShape(1, 9)))
    precision = Precision(weight_bytes=1, activation_bytes=4, kv_bytes=2)
    write = next(op for op in model.ops if isinstance(op, WriteKV))
    assert write.cost(shape, precision) == Cost(0, 4 * 256 * 4, 4 * 256 * 2)
    embed = next(op for op in model.ops if isinstance(op, Embed))
    assert embed.cost(shape, precision) == Cost(0, 4 * 896, 4 * 896 * 4)  # rows, not the table
    select = next(op for op in model.ops if isinstance(op, SelectRows))
    assert select.cost(shape, precision) == Cost(0, 3 * 896 * 4, 3 * 896 * 4)


def test_the_whole_is_the_sum_of_its_operations() -> None:
    model = program(GEMMA_2_2B)
    shape = BatchShape((RequestShape(5, 7),))
    costs = [op.cost(shape, Precision()) for op in model.ops]
    total = model.cost(shape, Precision())
    assert total.flops == sum(cost.flops for cost in costs)
    assert total.bytes_moved == sum(cost.bytes_moved for cost in costs)
    assert all(cost.bytes_written > 0 for cost in costs)


def test_every_operation_names_what_the_program_has() -> None:
    for config in (LLAMA_3_8B, QWEN_2_5_05B, GEMMA_2_2B):
        model = program(config)
        for op in model.ops:
            for value in (getattr(op, name) for name in op.__slots__):
                if hasattr(value, "buffer"):
                    assert value.start + value.width <= model.buffers[value.buffer]
                elif isinstance(value, str) and value.endswith((".weight", ".bias")):
                    assert value in model.weights
