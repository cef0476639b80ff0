"""No number of a config.json ends in a traceback: it is accepted, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from duetto.checkpoints.config import MODEL_TYPES, parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import DuettoError
from duetto.models.programs import build_program
from duetto.runner.load import plan_model

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 128,
    "sliding_window": 32,
    "max_window_layers": 1,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
HUGE = (2**20, 2**24, 2**24 + 8, 2**30, 2**31 - 8, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 1e308)


def plan(model_type: str, values: dict[str, Any]) -> None:
    kept = {k: v for k, v in values.items() if (model_type, k) != ("llama", "sliding_window")}
    section = JsonSection(Path("config.json"), kept | {"model_type": model_type})
    config = parse_config(section)
    plan_model(config, build_program(config), EngineArgs())


def outcome(model_type: str, values: dict[str, Any]) -> str:
    """Empty for a config that was accepted."""
    try:
        plan(model_type, values)
    except DuettoError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_number_is_accepted_or_refused(model_type: str) -> None:
    assert outcome(model_type, SIZES) == ""
    for key in SIZES:
        for value in HUGE:
            assert "\n" not in outcome(model_type, SIZES | {key: value})
    for key in YARN:
        for value in HUGE if key != "rope_type" else ():
            assert "\n" not in outcome(model_type, SIZES | {"rope_scaling": YARN | {key: value}})


@pytest.mark.parametrize(
    "pair", [("hidden_size", "intermediate_size"), ("vocab_size", "hidden_size")]
)
def test_products_of_numbers_that_each_are_accepted(pair: tuple[str, str]) -> None:
    values = SIZES | dict.fromkeys(pair, 2**24) | {"num_hidden_layers": 4096}
    assert outcome("llama", values) != ""
