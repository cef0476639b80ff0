"""What is simulated without a flag is what `duetto serve` runs without one."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pricing.prices import A100, ROUGH, program

from duetto.build import EngineArgs, scheduler_config
from duetto.core.errors import ConfigError
from duetto.planner.layout import Layout, make_fleet
from duetto.runner.load import LoadedModel

OF_THE_MODEL = ("num_blocks", "max_model_len", "cache_namespace")
# Resolved together with the model: compared in what comes of them, below.
RESOLVED = {"max_num_batched_tokens"}


def served(args: EngineArgs, layout: Layout) -> dict[str, Any]:
    """The scheduler of an engine that has the simulation's model and memory."""
    ours = make_fleet(program("llama-3-8b"), A100, layout).replica.scheduler
    loaded = SimpleNamespace(
        num_blocks=ours.num_blocks,
        max_model_len=ours.max_model_len,
        block_size=args.block_size,
        numerics=SimpleNamespace(encode=lambda: b""),
    )
    return as_dict(scheduler_config(cast(LoadedModel, loaded), args))


def as_dict(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_THE_MODEL}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"target_itl": "off"},
        {"target_itl": 40.0},
        {"enable_chunked_prefill": False},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 7, "block_size": 16, "max_num_batched_tokens": 100},
    ],
)
def test_a_simulation_has_the_servers_scheduler(flags: dict[str, Any]) -> None:
    layout = Layout(**flags)
    simulated = make_fleet(program("llama-3-8b"), A100, layout).replica.scheduler
    assert as_dict(simulated) == served(EngineArgs(**flags), layout)


def test_flags_of_the_same_name_have_the_same_default() -> None:
    args, layout = EngineArgs(), Layout()
    shared = {f.name for f in fields(args)} & {f.name for f in fields(layout)}
    assert {"max_num_seqs", "block_size", "target_itl", "enable_prefix_caching"} <= shared
    for name in shared - RESOLVED:
        assert getattr(args, name) == getattr(layout, name), name


def test_graphs_are_assumed_of_gpus_and_not_of_what_was_measured() -> None:
    assert Layout().on(A100).graphs
    assert not Layout(graphs=False).on(A100).graphs
    assert not Layout().on(ROUGH).graphs
    assert Layout(graphs=True).on(ROUGH).graphs


def test_devices_are_told_in_words() -> None:
    four = replace(A100, num_devices=4)
    assert (
        Layout(replicas=4)
        .on_devices(four)
        .startswith(
            "4 of 4 a100-80g: 4 replicas of 1 device each (tp 1, pp 1), bfloat16, 512 tokens a step"
        )
    )
    assert (
        Layout(tp=2, pp=2)
        .on_devices(four)
        .startswith(
            "4 of 4 a100-80g: 1 replica of 4 devices (tp 2, pp 2), up to 2 batches under way"
        )
    )
    assert (
        Layout(replicas=2, prefill_replicas=1)
        .on_devices(A100)
        .startswith("3 a100-80g: 1 prefill and 2 decode replicas of 1 device each")
    )


def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--target-itl: must be milliseconds above 0"):
        Layout(target_itl=-3.0)
