"""A request that brings the KV of its first tokens along: those are not computed."""

from fakes import make_request

from duetto.core.batch import RequestResult, SampledToken, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.scheduler import Scheduler


def scheduler(num_blocks: int = 16) -> Scheduler:
    return Scheduler(
        SchedulerConfig(num_blocks=num_blocks, max_model_len=64, block_size=4, max_num_seqs=4)
    )


def continued(request_id: str, num_prompt: int, first: int = 9) -> Request:
    """As another engine has left it: its prompt computed there, and the first token sampled."""
    request = make_request(request_id, range(1, num_prompt + 1), 8)
    request.num_imported_tokens = num_prompt
    request.token_ids.append(first)
    return request


def step(one: Scheduler, now: float) -> None:
    batch = one.schedule(now)
    results = (RequestResult((SampledToken(5),)),) * len(batch.requests)
    one.update(batch, StepOutput(results), now)


def test_only_the_next_token_is_computed() -> None:
    one = scheduler()
    one.add(continued("r", 10))
    (item,) = one.schedule(0.0).requests
    assert item.token_ids == (9,)
    assert item.num_computed_tokens == 10
    assert len(item.block_table) == 3  # room for all 11, in blocks of its own


def test_what_was_imported_is_published_for_others() -> None:
    one = scheduler()
    one.add(continued("r", 10))
    step(one, 0.0)
    one.add(make_request("alike", range(1, 11), 8))
    items = {r.request_id: r for r in one.schedule(1.0).requests}
    assert items["alike"].num_computed_tokens == 8
    assert items["alike"].block_table[:2] == items["r"].block_table[:2]


def test_a_longer_cached_prefix_is_shared_and_the_rest_imported() -> None:
    one = scheduler()
    one.add(make_request("alike", range(1, 11), 8))
    step(one, 0.0)
    one.add(continued("r", 10))
    items = {r.request_id: r for r in one.schedule(1.0).requests}
    assert items["r"].block_table[:2] == items["alike"].block_table[:2]
    assert items["r"].num_computed_tokens == 10
    one.check()


def test_what_is_preempted_must_be_computed_here() -> None:
    one = scheduler(num_blocks=5)
    for name in ("first", "second"):
        request = continued(name, 7, first=9)
        request.cache_salt = name.encode()
        one.add(request)
    now = 0.0
    while not one.counts.num_preemptions:
        step(one, now)
        now += 1.0
    (lost,) = one.waiting
    assert lost.num_imported_tokens == 0
    one.pool.forget_all()  # nor does a cache have it
    while lost.num_computed_tokens == 0:
        step(one, now)
        now += 1.0
    assert lost.num_lost_tokens > 0
    assert lost.num_computed_tokens > lost.num_prompt_tokens  # all of it, and more, in one step
    one.check()
