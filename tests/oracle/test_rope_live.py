"""Rope frequencies against transformers' own functions, for parameters as published models have."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.models.rope import rope_spec

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

HEADS = {"hidden_size": 512, "num_attention_heads": 4, "vocab_size": 100, "num_hidden_layers": 1}
LONG = {
    "short_factor": list(np.linspace(1, 2, 64)),
    "long_factor": list(np.linspace(1, 60, 64)),
}
# rope parameters, max_position_embeddings, max_model_len
ROPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, 4096, 4096),
    "llama-3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
        131072,
    ),
    "llama-3.2": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
        131072,
    ),
    "qwen-yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
        32768,
        131072,
    ),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        163840,
        163840,
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 0.75,
        },
        32768,
        32768,
    ),
    "longrope-short": (
        {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG},
        131072,
        4096,
    ),
    "longrope-long": (
        {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG},
        131072,
        131072,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is absent: make oracle")
    rope_utils = importlib.import_module("transformers.modeling_rope_utils")
    llama_config = importlib.import_module("transformers").LlamaConfig
    parameters, max_position_embeddings, max_model_len = ROPES[name]
    parameters = {"rope_theta": 10000.0, **parameters}
    lengths = {"max_position_embeddings": max_position_embeddings}
    theirs = llama_config(**HEADS, **lengths, rope_parameters=dict(parameters))
    inv_freq, scale = rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        theirs, seq_len=max_model_len
    )

    config = HEADS | lengths | {"model_type": "llama", "intermediate_size": 1}
    ours = parse_config(JsonSection(Path("config.json"), config | {"rope_parameters": parameters}))
    spec = rope_spec(ours.layers[0].rope, max_model_len)
    # Theirs are in fp32, ours in double: near the end of a ramp fp32 loses two digits.
    np.testing.assert_allclose(spec.inv_freq, inv_freq.numpy(), rtol=5e-6)
    assert spec.scale == pytest.approx(scale, rel=1e-9)
