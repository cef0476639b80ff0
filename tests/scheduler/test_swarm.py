"""Every batch and output of a swarm of requests goes through msgspec and comes back equal."""

from random import Random

import pytest
from msgspec.msgpack import decode, encode
from scheduler.driver import Driver
from scheduler.guesses import Guesses
from scheduler.walk import random_config, random_habits, random_request

from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest, StepOutput
from duetto.core.sampling_params import SamplingParams


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_what_crosses_the_seam_is_plain(depth: int, seed: int) -> None:
    rng = Random(seed)
    driver = Driver(random_config(rng), depth=depth, drafts=Guesses(seed))
    driver.encodes = True  # each batch and output is compared with its copy
    habits = random_habits(rng)
    for number in range(150):
        if len(driver.live) < 6:
            driver.add(random_request(rng, habits, f"r{number}"))
        driver.step()
    driver.drain()
    assert driver.num_encoded > 100
    assert driver.executor.num_drafts > 10


def test_all_that_a_request_may_ask_for_crosses_too() -> None:
    params = SamplingParams(
        temperature=0.5,
        logit_bias={3: 1.5},
        allowed_token_ids=(3, 4),
        bad_words=("x",),
        stop=("y",),
    )
    row = SamplingInput(params, 2**63, 1, (5,), (1, 2), (3,))
    item = ScheduledRequest("r", (1, 2, 3), 4, (0, 1), (row,), positions=(7, 9, 8))
    batch = ScheduledBatch((item,))
    again = decode(encode(batch), type=ScheduledBatch)
    assert again == batch
    assert again.shape == batch.shape
    assert decode(encode(StepOutput(())), type=StepOutput) == StepOutput(())
