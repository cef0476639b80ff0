"""Small models of every kind with their weights, and what a backend makes of them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from oracle.cases import Case
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint

from duetto.backends.backend import Backend
from duetto.checkpoints.checkpoint import load_weights
from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.models.programs import build_program, load_program
from duetto.program.op import Op
from duetto.program.program import Program

Weights = Mapping[str, NDArray[Any]]
PROMPTS = [[5, 9, 2, 7, 1, 8, 30, 11, 4], [3, 17, 6]]
ODD = {  # nothing but the heads is divided evenly by the ranks
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 31,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


@cache
def of_case(case: Case) -> tuple[Program, Weights]:
    with TemporaryDirectory() as name:
        write_checkpoint(case, Path(name))
        _, program = load_program(Path(name), case.max_model_len)
        return program, load_weights(Path(name), program, "float32")


def odd(**changes: Any) -> tuple[Program, Weights]:
    """A program with weights of random numbers, which keep the stream's size."""
    program = build_program(parse_config(JsonSection(Path("config.json"), ODD | changes)))
    random = np.random.RandomState(3)
    weights = {
        name: (random.standard_normal(spec.shape) / np.sqrt(spec.shape[-1])).astype(np.float32)
        for name, spec in program.weights.items()
    }
    return program, weights


def logits(backend: Backend) -> NDArray[np.float32]:
    """Of every token of two requests side by side, in chunks, and of one token more of each."""
    feed = Feed(backend, len(PROMPTS), max_tokens=64)
    prompts = feed.in_chunks(PROMPTS, 4)
    after = feed.step({0: [12], 1: [13]})
    return np.concatenate([*prompts, after[0], after[1]])


def with_op(program: Program, op: Op, behind: type[Op]) -> Program:
    """The program with one more operation, behind each of a kind."""
    ops: list[Op] = []
    for one in program.ops:
        ops += (one, op) if type(one) is behind else (one,)
    return replace(program, ops=tuple(ops))
