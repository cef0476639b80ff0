from typing import Any

import pytest
from fakes import make_request

from duetto.core.config import SchedulerConfig
from duetto.core.errors import ConfigError, InvalidRequest, RequestTooLong

SMALL: dict[str, Any] = {"num_blocks": 4, "max_model_len": 32, "block_size": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_blocks": 0}, "--num-blocks: must be 1 or more"),
        ({"max_model_len": 0}, "--max-model-len: must be 1 or more"),
        ({"block_size": -1}, "--block-size: must be 1 or more"),
        ({"max_num_seqs": 0}, "--max-num-seqs: must be 1 or more"),
        ({"max_logprobs": -2}, "--max-logprobs: must be 0 or more, or -1"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens: must be 1 or more"),
        ({"max_preemptions": -1}, "max_preemptions must be 0 or more"),
        ({"ageing_s": 0.0}, "ageing_s above 0"),
        ({"ageing_s": float("nan")}, "ageing_s above 0"),
        (
            {"scheduling_policy": "lottery"},
            "--scheduling-policy: 'lottery' is not one of fcfs, priority, static",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_flag(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        SchedulerConfig(**SMALL | change)


def test_two_flags_that_cannot_go_together_are_both_named() -> None:
    pair = {"enable_chunked_prefill": False, "max_num_batched_tokens": 31}
    with pytest.raises(ConfigError) as error:
        SchedulerConfig(**SMALL | pair)
    for part in ("--no-enable-chunked-prefill", "--max-num-batched-tokens 31", "32"):
        assert part in str(error.value)
    SchedulerConfig(**SMALL | pair | {"max_num_batched_tokens": 32})


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_tokens_fill_whole_blocks(num_tokens: int, num_blocks: int) -> None:
    assert SchedulerConfig(**SMALL).num_blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 1), (16, 1), (1, 16), (10, 7)])
def test_what_just_fits_is_accepted(prompt: int, max_tokens: int) -> None:
    SchedulerConfig(**SMALL).check_fits(make_request("r", range(prompt), max_tokens))


@pytest.mark.parametrize(
    ("num_blocks", "prompt", "max_tokens", "says"),
    [
        (4, 10, 8, "17 tokens.*18 tokens .10 in the prompt, 8 in.*4 blocks of 4"),
        (99, 30, 3, "32 tokens.*33 tokens .30 in the prompt, 3 in the completion.*completion.$"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    num_blocks: int, prompt: int, max_tokens: int, says: str
) -> None:
    config = SchedulerConfig(**SMALL | {"num_blocks": num_blocks})
    with pytest.raises(RequestTooLong, match=says) as error:
        config.check_fits(make_request("r", range(prompt), max_tokens))
    assert error.value.field == "max_tokens"
    assert "maximum context length" in str(error.value)


def test_a_prompt_that_leaves_no_room_is_at_fault_itself() -> None:
    config = SchedulerConfig(**SMALL | {"num_blocks": 4})
    assert config.context_length == 17
    with pytest.raises(RequestTooLong, match=r"17 tokens.*18 tokens .17 in the prompt") as error:
        config.check_fits(make_request("r", range(17), 1))
    assert error.value.field == "prompt"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: must hold at least one token"):
        SchedulerConfig(**SMALL).check_fits(make_request("r", ()))
