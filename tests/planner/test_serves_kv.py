"""The KV of a layout is that of `duetto serve`: the same numbers for the same flags."""

from dataclasses import replace
from itertools import product

import pytest
from pricing.prices import A100

from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.fit import examine
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.planner.fleet import fit_layout, make_fleet
from duetto.planner.layout import Layout, with_weights
from duetto.program.dtype import KV_DTYPES
from duetto.runner import load
from duetto.runner.load import plan_model

GIB = 2**30


@pytest.mark.parametrize(
    ("stored", "quantization", "kv"),
    [*product(("float32", "bfloat16"), ("none", "int8", "int4"), ("auto", *KV_DTYPES))],
)
def test_a_layout_has_the_blocks_that_serve_has(monkeypatch, stored, quantization, kv):
    monkeypatch.setattr(load, "available_memory_bytes", lambda: 16 * GIB)
    config = replace(find_config("smollm2-135m"), dtype=stored)
    program = build_program(config, None)
    flags = {"kv_cache_dtype": kv, "kv_cache_memory_bytes": GIB}
    args = EngineArgs(quantization=quantization, backend="cpu", **flags)
    plan = plan_model(config, program, args)
    layout = with_weights(Layout(**flags), stored, quantization)
    assert layout.kv == plan.kv_dtype
    fit = fit_layout(program, A100, layout)
    assert (fit.num_blocks, fit.kv_bytes) == (plan.kv.num_blocks, plan.kv.memory_bytes)
    fleet = make_fleet(program, A100, layout)
    assert fleet.replica.scheduler.num_blocks == plan.kv.num_blocks


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_flag_that_simulations_have_for_quantization_means_the_same_for_kv(dtype):
    quantized = with_weights(Layout(dtype=dtype), "float32", "none")
    assert quantized == with_weights(Layout(), "float32", dtype)
    assert quantized.kv == "float32"


def test_more_kv_than_there_is_room_for():
    program = build_program(find_config("llama-3.1-8b"), None)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes 85899345920: .* leave \d+ byt"):
        make_fleet(program, A100, Layout(kv_cache_memory_bytes=80 * GIB))
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes: must be 1 or more"):
        Layout(kv_cache_memory_bytes=0)


def test_fit_elsewhere_takes_the_memory_that_kv_is_given():
    args = EngineArgs(kv_cache_memory_bytes=4 * GIB)
    report = examine("llama-3.1-8b", args, "h100")
    assert report["fits"] and 4 * GIB - report["block_bytes"] < report["kv_bytes"] <= 4 * GIB
