"""A rank's loader: its part of a checkpoint, kept in its own file, computes the rank's bits."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native import cpu_ranks
from oracle.cases import CASES_BY_NAME, prompts
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint

from duetto.backends.cpu.cache import PackedCache
from duetto.backends.cpu.native import native
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.errors import ConfigError
from duetto.models.programs import load_program
from duetto.program.rewrites.shard import shard
from duetto.runner import loaders
from duetto.runner.loaders import CpuLoader

RANKS = 2


def load(model_dir: Path, quantization: Any, cache_dir: Path | None) -> list[Any]:
    """The backends of all ranks, as each one's process would load it."""
    _, whole = load_program(model_dir)
    group, backends = native.Group(RANKS), []
    for rank in range(RANKS):
        own = shard(whole, RANKS, rank)
        loader = CpuLoader(
            own,
            "bfloat16",
            quantization,
            (),
            threads=1,
            cache_dir=cache_dir,
            whole=whole,
            member=native.Member(group, rank),
        )
        backends.append(loader.load(own, model_dir, None))
        assert loader.notes == []
    return backends


def logits(backend: Any) -> Any:
    return np.concatenate(Feed(backend, 2).in_chunks(prompts()[1:3], 50))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_ranks_that_are_loaded_are_those_of_the_whole(
    tmp_path: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "MIN_CACHED_BYTES", 0)
    case, cache = CASES_BY_NAME["llama-tied"], PackedCache(tmp_path / "cache")
    write_checkpoint(case, tmp_path)
    _, whole = load_program(tmp_path)
    weights = load_weights(tmp_path, whole, "bfloat16")
    expected = logits(cpu_ranks(whole, weights, RANKS, quantization))
    for _ in range(2 if quantization else 1):  # the second time from the cache
        backends = load(tmp_path, quantization, cache.directory)
        with ThreadPoolExecutor(RANKS) as threads:
            for found in threads.map(logits, backends):
                np.testing.assert_array_equal(found, expected)
    kept = list(cache.directory.glob("*")) if cache.directory.exists() else []
    assert len(kept) == (RANKS if quantization else 0)


def test_a_degree_that_cuts_through_groups_is_refused_with_those_that_do_not(
    tmp_path: Path,
) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, whole = load_program(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"^--tp: model\.layers\.0\.mlp\.down_proj\.weight cannot be cut so: its columns are "
        r"quantized together by 8 or more; accepted: --tp 1$",
    ):
        CpuLoader(
            shard(whole, 3, 1), "bfloat16", "int8", (), threads=1, cache_dir=None, whole=whole
        )
