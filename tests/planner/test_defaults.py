"""What is simulated without a flag is what `duetto serve` runs without one."""

import ast
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pricing.prices import A100, ROUGH, program

from duetto.build import served_config
from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.planner import layout as layout_module
from duetto.planner.fleet import make_fleet
from duetto.planner.layout import Layout
from duetto.program.kv_size import bytes_per_block, plan_kv
from duetto.runner.load import LoadedModel

FLAGS: list[dict[str, Any]] = [
    {},
    {"target_itl": "off"},
    {"target_itl": 40.0},
    {"target_itl": None},
    {"enable_chunked_prefill": False},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 10_000},
    {"enable_chunked_prefill": False, "max_model_len": 300, "block_size": 8},
    {"enable_prefix_caching": False},
    {"scheduling_policy": "priority", "max_model_len": 5000},
    {"scheduling_policy": "static", "max_num_seqs": 1},
    {"max_num_seqs": 7, "block_size": 16, "max_num_batched_tokens": 100},
]


def simulated(layout: Layout) -> SchedulerConfig:
    made = program("llama-3-8b")
    if layout.max_model_len is not None:
        made = replace(made, max_model_len=layout.max_model_len)
    return make_fleet(made, A100, layout).replica.scheduler


def served(args: EngineArgs, memory: SchedulerConfig) -> SchedulerConfig:
    """The scheduler of an engine, with the model and the memory of the simulated one."""
    loaded = SimpleNamespace(
        embeddings=None,
        num_blocks=memory.num_blocks,
        max_model_len=args.asked_len or memory.max_model_len,
        numerics=memory.cache_namespace.decode(),
    )
    return served_config(cast(LoadedModel, loaded), args)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_simulation_has_the_servers_scheduler(flags: dict[str, Any]) -> None:
    ours = simulated(Layout(**flags))
    theirs = served(EngineArgs(**flags), ours)
    for field in fields(SchedulerConfig):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    "flags",
    [
        {"max_num_seqs": 0},
        {"block_size": -1},
        {"block_size": 1.5},
        {"max_num_batched_tokens": 0},
        {"max_model_len": 0},
        {"target_itl": -3.0},
        {"target_itl": float("nan")},
        {"target_itl": "soon"},
        {"target_itl": True},
        {"enable_chunked_prefill": "no"},
        {"enable_prefix_caching": 0},
        {"scheduling_policy": "lottery"},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
        {"enable_chunked_prefill": False, "target_itl": 40.0},
    ],
    ids=str,
)
def test_what_a_server_refuses_no_simulation_accepts(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        simulated(Layout(**flags))
    with pytest.raises(ConfigError) as by_server:
        served(EngineArgs(**flags), simulated(Layout()))
    assert str(refused.value) == str(by_server.value)


@pytest.mark.parametrize(
    ("flags", "memory_bytes"),
    [
        ({}, 40 * 2**30),
        ({}, 20 * 2**30),  # a quarter of what is left is less than a context
        ({"max_model_len": 8192}, 20 * 2**30),
        ({"max_num_seqs": 1, "max_model_len": 512, "block_size": 16}, 64 * 2**30),
    ],
    ids=str,
)
def test_on_this_host_a_simulation_has_the_servers_kv(
    flags: dict[str, Any], memory_bytes: int
) -> None:
    made = program("llama-3-8b")
    layout, args = Layout(dtype="bfloat16", **flags), EngineArgs(**flags)
    if args.asked_len is not None:
        made = replace(made, max_model_len=args.asked_len)
    host = replace(ROUGH, name="host", memory_bytes=memory_bytes)
    kv = plan_kv(
        made,
        block_size=args.block_size,
        block_bytes=bytes_per_block(made, args.block_size, "bfloat16"),
        max_num_seqs=args.max_num_seqs,
        memory_bytes=None,
        available_bytes=memory_bytes - 2 * made.num_parameters,
        may_shorten=args.asked_len is None,
    )
    config = make_fleet(made, host, layout).replica.scheduler
    assert (config.num_blocks, config.max_model_len) == (kv.num_blocks, kv.max_model_len)


def test_flags_of_the_same_name_have_the_same_default() -> None:
    args, layout = EngineArgs(), Layout()
    shared = {f.name for f in fields(args)} & {f.name for f in fields(layout)}
    assert {"max_num_seqs", "block_size", "target_itl", "max_num_batched_tokens"} <= shared
    for name in shared:
        assert getattr(args, name) == getattr(layout, name), name


def numbers_given(node: ast.AST) -> Iterator[str]:
    """Names that a function's signature, or a class's field, gives a number of its own."""
    pairs: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, ast.FunctionDef):
        pairs += zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True)
        plain = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        given = node.args.defaults
        pairs += zip(plain[len(plain) - len(given) :], given, strict=True)
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        pairs.append((node.target.id, node.value))
    yield from (n for n, d in pairs if isinstance(d, ast.Constant) and isinstance(d.value, int))


def test_no_option_has_a_default_of_its_own_anywhere() -> None:
    root = Path(layout_module.__file__).parent.parent
    files = sorted(root.rglob("*.py"))
    given = [
        (name, f)
        for f in files
        for n in ast.walk(ast.parse(f.read_text()))
        for name in numbers_given(n)
    ]
    assert len(given) > 50  # the names of other things: they were read
    shared = {"max_num_seqs", "block_size", "max_num_batched_tokens"}
    assert [each for each in given if each[0] in shared] == []


def test_graphs_are_assumed_of_gpus_and_not_of_what_was_measured() -> None:
    assert Layout().has_graphs(A100)
    assert not Layout(graphs=False).has_graphs(A100)
    assert not Layout().has_graphs(ROUGH)
    assert Layout(graphs=True).has_graphs(ROUGH)


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
