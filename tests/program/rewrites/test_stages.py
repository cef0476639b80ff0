"""Stages one behind the other compute the same bits as the whole program."""

from dataclasses import replace

import numpy as np
import pytest
from native import cpu_backend
from oracle.cases import CASES, CASES_BY_NAME, Case
from program.rewrites.models import logits, odd, of_case

from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.stages import ReferenceStages
from duetto.core.errors import ConfigError
from duetto.program.ops import Ref
from duetto.program.rewrites.shard import shard
from duetto.program.rewrites.stages import stages


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stages_compute_the_same_bits(case: Case) -> None:
    program, weights = of_case(case)
    whole = logits(ReferenceBackend(program, weights))
    for degree in range(1, len(program.kv) + 1):
        cut = stages(program, degree)
        np.testing.assert_array_equal(logits(ReferenceStages(cut, weights)), whole)


def test_a_stage_has_only_its_own() -> None:
    program, _ = odd(tie_word_embeddings=False)
    cut = stages(program, 3)
    assert tuple(op for stage in cut for op in stage.ops) == program.ops
    names = [set(stage.weights) for stage in cut]
    assert names[0] & names[1] == names[1] & names[2] == names[0] & names[2] == set()
    assert names[0] | names[1] | names[2] == set(program.weights)
    assert sum(stage.num_parameters for stage in cut) == program.num_parameters
    heads = [[layer.num_kv_heads for layer in stage.kv] for stage in cut]
    assert heads == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]


def test_only_the_stream_goes_from_stage_to_stage() -> None:
    for program in (odd()[0], *(of_case(case)[0] for case in CASES)):
        stream = (Ref("hidden", 0, program.buffers["hidden"]),)
        for cut in (stages(program, 2), stages(shard(program, 2), 2)):
            assert [stage.inputs for stage in cut] == [(), stream]
            assert [stage.outputs for stage in cut] == [stream, ()]


def test_what_is_not_handed_over_is_missed() -> None:
    program, weights = odd()
    first, *others = stages(program, 2)
    none = [replace(first, outputs=()), *(replace(one, inputs=()) for one in others)]
    with pytest.raises(KeyError, match="hidden"):
        logits(ReferenceStages(none, weights))


def test_a_backend_of_whole_programs_refuses_a_stage() -> None:
    program, weights = of_case(CASES_BY_NAME["llama"])
    for stage in stages(program, 2):
        with pytest.raises(ConfigError, match="--backend reference: runs no part"):
            ReferenceBackend(stage, weights)
        with pytest.raises(ConfigError, match="--backend cpu: runs no part"):
            cpu_backend(stage, {name: weights[name] for name in stage.weights})


@pytest.mark.parametrize("degree", [0, -1, 4])
def test_stages_that_cannot_be_are_refused(degree: int) -> None:
    with pytest.raises(ConfigError, match=rf"--pp: {degree} stages .* 3 layers; accepted: 1 to 3"):
        stages(odd()[0], degree)
