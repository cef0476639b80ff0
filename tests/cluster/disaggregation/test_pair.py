"""Prompts computed on one engine and answered by another: the same bits as on one alone, and
nothing is held when all is over, whatever is lost, stopped or aborted on the way."""

import numpy as np
import pytest
from disaggregation_world import Pair
from fakes import make_request
from small_models import GEMMA, LLAMA, VOCAB, Kind, Model, make_model
from test_same_answer import answers

from duetto.core.request import FinishReason, Request

KINDS = (
    Kind(LLAMA, "reference", "float32", None, "bfloat16"),
    Kind(LLAMA, "reference", "float32", None, "int8"),
    Kind(GEMMA, "cpu", "float32", None, "float16"),
    Kind(GEMMA, "cpu", "bfloat16", "int8", "int8"),
    Kind(LLAMA, "cpu", "float32", "int4", "float32"),
    Kind(LLAMA, "cpu", "bfloat16", None, "bfloat16"),
)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def models(request, tmp_path_factory) -> tuple[Model, Model]:
    """The same weights twice: each engine has a backend of its own."""
    first, second = (make_model(request.param, tmp_path_factory.mktemp("model")) for _ in range(2))
    return first, second


def requests(name: str = "") -> list[Request]:
    """Long and short prompts, some alike, some that begin alike."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (70, 33, 90, 5, 64, 100)]
    prompts += [prompts[0], prompts[0][:40] + prompts[1], prompts[5][:65]]
    return [
        make_request(f"{name}{i}", prompt, 8, seed=i, temperature=(0.0, 1.0)[i % 2], logprobs=2)
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def alone(models) -> dict[str, list]:
    """Each answer by one engine, one at a time."""
    found = {}
    for request in requests():
        found |= answers(models[0].engine(at_once=True), [request])
    return found


@pytest.fixture
def pairs():
    made: list[Pair] = []

    def make(*args, **options) -> Pair:
        made.append(Pair(*args, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def same(found: dict[str, list], alone: dict[str, list], name: str = "") -> bool:
    """Each request ended with all its tokens, and they are those of the one engine."""
    return all(
        answer == [*alone[key.removeprefix(name)], FinishReason.LENGTH, None]
        for key, answer in found.items()
    )


@pytest.mark.parametrize("num_batched", [192, 24])
def test_the_same_bits(models, alone, pairs, num_batched) -> None:
    """With prompts in one step or in chunks, beside others, and what is cached on either side."""
    options = {"max_num_batched_tokens": num_batched}
    pair = pairs(models, decode=options, prefill=options)
    asked = requests()
    pair.add(*asked)
    assert same(pair.wait(asked), alone)
    assert pair.decode.counts.num_imported >= 5
    pair.check()
    pair.decode_engine.scheduler.pool.forget_all()
    again = requests("again-")  # the prefill engine has most of it
    pair.add(*again)
    assert same(pair.wait(again), alone, "again-")
    assert pair.decode.counts.num_imported >= 10
    pair.check()
