"""A budget in milliseconds on a real model: other steps, the same answers."""

import pytest

from duetto import LLM, SamplingParams
from duetto.build import build
from duetto.core.batch import StepRecord
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.options import DEFAULT_ITL_TARGET, NO_ITL_TARGET

PROMPTS = [{"prompt_token_ids": [7 + i] * 9 + [3, 1, 4]} for i in range(6)]
LONG = {"prompt_token_ids": [index % 900 for index in range(700)]}
PARAMS = SamplingParams(temperature=1.0, max_tokens=40, seed=5, logprobs=2, ignore_eos=True)


def answers(llm: LLM) -> tuple[list[object], list[StepRecord]]:
    """Streams, beside which a long prompt arrives."""
    steps: list[StepRecord] = []
    step = llm.engine.step

    def watched():
        report = step()
        if report.record is not None:
            steps.append(report.record)
        return report

    llm.engine.step = watched  # type: ignore[method-assign]
    streams = llm.stream(PROMPTS, PARAMS)
    for _ in range(30):
        next(streams)
    late = llm.generate(LONG, PARAMS, use_tqdm=False)
    last = {output.request_id: output for output in streams}
    told = [last[str(i)].outputs[0] for i in range(6)] + [late[0].outputs[0]]
    return [(o.token_ids, o.logprobs) for o in told], steps


def test_a_target_changes_when_prompts_are_computed_and_no_answer(tiny_model):
    with LLM(tiny_model, backend="reference") as llm:
        expected, whole = answers(llm)
    with LLM(tiny_model, backend="reference", target_itl=3.0) as llm:
        got, cut = answers(llm)
    assert got == expected
    assert max(s.num_tokens for s in whole) == 512 and len(cut) > len(whole)
    # The price is learned: the largest step beside the streams is far below the ceiling.
    assert max(s.num_tokens for s in cut if s.num_scheduled > 6) < 300
    assert all(s.predicted_s is not None and s.predicted_s > 0 for s in cut)


def test_the_default_changes_no_answer_either(tiny_model):
    """Steps of 250 ms are never that long here, so the default is made one that cuts."""
    with LLM(tiny_model, backend="reference") as llm:
        assert llm.config.target_itl_s is None  # offline, nobody reads along
        expected, _ = answers(llm)
    with LLM(tiny_model, backend="reference", target_itl="auto") as llm:
        config = llm.config
        assert (config.target_itl_s, config.target_itl_steps) == DEFAULT_ITL_TARGET
        llm.engine.scheduler._step_time = lambda shape: float(shape.num_tokens)  # type: ignore[method-assign]
        got, cut = answers(llm)
    assert got == expected
    beside = [s.num_tokens for s in cut if s.num_scheduled > 6]
    assert beside and max(beside) <= 4 * 6  # four steps of six streams, at a second a token


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, DEFAULT_ITL_TARGET),
        ({"target_itl": "auto"}, DEFAULT_ITL_TARGET),
        ({"target_itl": None}, DEFAULT_ITL_TARGET),
        ({"target_itl": "off"}, NO_ITL_TARGET),
        ({"target_itl": 400}, (0.4, 1.25)),
        ({"enable_chunked_prefill": False}, NO_ITL_TARGET),
        ({"enable_chunked_prefill": False, "target_itl": "off"}, NO_ITL_TARGET),
        ({"scheduling_policy": "static"}, DEFAULT_ITL_TARGET),
        ({"scheduling_policy": "static", "target_itl": 400}, (0.4, 1.25)),
    ],
)
def test_what_a_server_takes_as_its_target(tiny_model, flags, expected):
    args = EngineArgs(backend="reference", kv_cache_memory_bytes=2**20, **flags)
    config = build(tiny_model, args).scheduler_config
    assert (config.target_itl_s, config.target_itl_steps) == expected


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), "10", "no", True, 1e9])
def test_a_target_that_is_no_time_is_refused(tiny_model, target):
    with pytest.raises(ConfigError, match="--target-itl"):
        LLM(tiny_model, target_itl=target)


def test_a_target_needs_chunks(tiny_model):
    with pytest.raises(ConfigError, match="--target-itl with --no-enable-chunked-prefill"):
        LLM(tiny_model, target_itl=10, enable_chunked_prefill=False)
