"""What reuse of KV cannot do on a model, told by its program."""

from dataclasses import replace
from pathlib import Path

import pytest
from program.rewrites.models import odd
from small_models import GEMMA

from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.core.reuse_choice import ReuseLimits
from duetto.models.find import find_config
from duetto.models.programs import build_program
from duetto.program.ops import Rope
from duetto.program.program import Program
from duetto.program.reuse import reuse_limits


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(find_config("llama-3.2-1b"), None)


def test_most_models_can_do_all(program: Program) -> None:
    assert reuse_limits(program) == ReuseLimits()


def test_keys_that_are_not_turned_cannot_be_moved(program: Program) -> None:
    turned = [place for place, op in enumerate(program.ops) if isinstance(op, Rope)]
    without_one = tuple([op for place, op in enumerate(program.ops) if place != turned[5]])
    for ops in (without_one, tuple([op for op in program.ops if not isinstance(op, Rope)])):
        found = reuse_limits(replace(program, ops=ops))
        assert found.refusal == "not all keys of this model are rotated by their positions"


def test_the_shortest_window_counts() -> None:
    section = JsonSection(Path("config.json"), GEMMA)
    assert reuse_limits(build_program(parse_config(section))).window == 24


def test_one_layer_shows_no_deviation() -> None:
    assert reuse_limits(odd()[0]).no_deviation is None
    found = reuse_limits(odd(num_hidden_layers=1)[0])
    assert found.refusal is None and "this model has 1" in (found.no_deviation or "")
