"""What drafts gave and took adds up, over requests and over steps, and is priced as is said."""

import itertools
from functools import reduce
from random import Random

import pytest
from fakes import ShadowExecutor, make_request
from scheduler.guesses import Guesses

from duetto.core.batch import (
    Drafting,
    RequestResult,
    SampledToken,
    SamplingInput,
    ScheduledRequest,
)
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import NO_CHAINS, NO_DRAFTS, Chains, DraftCount, tokens_per_step
from duetto.engine.engine import Engine
from duetto.scheduler.draft_times import account_drafts
from duetto.scheduler.scheduler import Scheduler

STOP = 99


def letters(token_ids, _skips_special_tokens):
    return "".join("abcdefgh"[token_id % 8] for token_id in token_ids)


def price(shape):
    """A second for the step, and a tenth for each token."""
    return 1.0 + 0.1 * shape.num_tokens


def streaming(name, drafts=(), drafting=None, **more):
    """A request with eight tokens of prompt and one of its answer."""
    request = make_request(name, range(8), 50, stop_token_ids=[STOP], **more)
    request.token_ids.append(7)
    row = SamplingInput(request.sampling, 0, 1)
    rows = tuple(row._replace(num_output_tokens=1 + i) for i in range(1 + len(drafts)))
    item = ScheduledRequest(
        name, (7, *drafts), 8, (0, 1, 2), rows, num_drafts=len(drafts), drafting=drafting
    )
    return request, item


def result(*token_ids, drafts=(), error=None):
    return RequestResult(tuple(map(SampledToken, token_ids)), drafts, error=error)


def account(triples, drafting_s=0.0, step_time=price):
    requests, items, results = zip(*triples, strict=True)
    live = {r.request_id: r for r in requests if r is not None}
    return account_drafts(live, items, results, drafting_s, step_time)


def told(request):
    return request.timings.speculation


def test_without_drafts_nothing_is_spent_or_told():
    request, item = streaming("a")

    def never(_shape):
        raise AssertionError("priced without need")

    assert account([(request, item, result(1))], step_time=never) is None
    assert told(request) is None


def test_one_request_by_hand():
    request, item = streaming("a", (1, 2, 3), Drafting("ngram", 4, b"", 0, (0,) * 9))
    request.timings.speculation = None
    step = account([(request, item, result(1, 2, 5, drafts=(6, 6)))], drafting_s=0.05)
    assert step.verified == Chains(1, (1, 1, 1), (1, 1, 0))
    assert step.num_asked == 1 and step.drafting_s == 0.05
    assert step.verifying_s == pytest.approx(0.3)
    assert told(request).chains == step.verified
    assert told(request).drafting_s == 0.05 and told(request).verifying_s == pytest.approx(0.3)
    # Two tokens, each of which would have taken a plain step of 1.1 s.
    assert told(request).saved_s == pytest.approx(2 * 1.1 - 0.3 - 0.05)
    assert (told(request).num_asked, told(request).num_made) == (1, 2)


def test_drafts_are_of_the_method_that_was_asked_before():
    request, item = streaming("a", (), Drafting("suffix", 2, b"", 0, (0,) * 9))
    account([(request, item, result(1, drafts=(2, 3)))])
    assert told(request).by_method == {} and told(request).asked == "suffix"
    _, item = streaming("a", (2, 3), Drafting("ngram", 2, b"", 0, (0,)))
    account([(request, item, result(2, 8))])
    assert told(request).by_method == {"suffix": DraftCount(2, 1)}
    # Keeping up with the tokens asks for nothing.
    _, item = streaming("a", (), Drafting("draft_model", 0, b"", 0, (0,)))
    account([(request, item, result(2))], drafting_s=0.5)
    assert told(request).asked == "ngram" and told(request).num_asked == 2
    assert told(request).drafting_s == 0.5


@pytest.mark.parametrize(
    ("tokens", "num_accepted"),
    [
        ((1, 2, 3, 4), 3),  # all, and the bonus token
        ((1, 2, 3), 2),  # no token after them, as that row failed: the last is as good as one
        ((1, 5), 1),
        ((5,), 0),
    ],
)
def test_how_many_are_accepted(tokens, num_accepted):
    request, item = streaming("a", (1, 2, 3))
    step = account([(request, item, result(*tokens))])
    assert step.verified.total == (3, num_accepted)


def test_what_is_beyond_the_end_is_not_accepted():
    request, item = streaming("a", (1, STOP, 3))
    step = account([(request, item, result(1, STOP, 3, 4))])
    assert step.verified.total == (3, 1)  # and the stop token, which would have come anyway
    short, item = streaming("b", (1, 2, 3))
    short.max_tokens = 3  # two more
    assert account([(short, item, result(1, 2, 3, 4))]).verified.total == (3, 1)


def test_shares_add_up_and_each_waits_for_all():
    a = streaming("a", (1, 2, 3), Drafting("ngram", 4, b"", 0, (0,) * 16))
    b = streaming("b", (1,))
    c = streaming("c")
    chunk = ScheduledRequest("p", tuple(range(20)), 0, (3, 4, 5))
    prompt = make_request("p", range(40))
    step = account(
        [(*a, result(1, 2, 3, 9)), (*b, result(4)), (*c, result(5)), (prompt, chunk, result())],
        drafting_s=0.2,
    )
    assert step.verifying_s == pytest.approx(0.4)
    assert told(a[0]).verifying_s == pytest.approx(0.3)
    assert told(b[0]).verifying_s == pytest.approx(0.1)
    assert told(a[0]).drafting_s == 0.2 and told(b[0]).drafting_s == 0.0
    plain_s = 1.0 + 0.1 * 3  # the next tokens alone, without the chunk
    assert told(a[0]).saved_s == pytest.approx(3 * plain_s - 0.4 - 0.2)
    assert told(b[0]).saved_s == pytest.approx(-0.4 - 0.2)
    assert told(c[0]) is None and prompt.timings.speculation is None


def test_without_prices_seconds_are_not_told():
    request, item = streaming("a", (1,))
    step = account([(request, item, result(1, 2))], step_time=None)
    assert step.verifying_s is None and told(request).saved_s is None
    assert step.verified.total == (1, 1)


def test_who_has_failed_or_ended_has_no_part():
    a, b = streaming("a", (1, 2)), streaming("b", (1, 2))
    gone = streaming("gone", (1, 2))[1]
    step = account(
        [(*a, result(error="it failed")), (*b, result(1, 4)), (None, gone, result(1, 4))]
    )
    assert step.verified.total == (2, 1) and told(a[0]).total == NO_DRAFTS


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("stop", [[], ["dd", "ge"]])  # text may stop in an accepted run
def test_over_a_swarm_steps_and_requests_tell_the_same(seed, depth, stop):
    rng, time = Random(seed), itertools.count()
    config = SchedulerConfig(
        num_blocks=40, block_size=4, max_model_len=60, max_num_seqs=5, max_num_batched_tokens=24
    )
    executor = ShadowExecutor(config.num_blocks, config.block_size)
    scheduler = Scheduler(config, price, Guesses(seed))
    engine = Engine(scheduler, executor, letters, clock=lambda: float(next(time)), depth=depth)
    for number in range(12):
        prompt = [rng.randint(1, 7) for _ in range(rng.randint(1, 20))]
        ends = {"seed": number, "stop_token_ids": [3], "stop": stop}
        engine.add(make_request(f"r{number}", prompt, rng.randint(1, 20), **ends))
    ended, steps = {}, []
    while engine.has_work:
        report = engine.step()
        if report.record is not None and report.record.drafts is not None:
            steps.append(report.record.drafts)
        for update in report.updates:
            if update.finish_reason is not None:
                ended[update.request_id] = update.timings
    own = [t.speculation for t in ended.values() if t.speculation is not None]
    of_steps = reduce(Chains.plus, [s.verified for s in steps], NO_CHAINS)
    assert len(ended) == 12 and of_steps.num_chains > 0
    assert reduce(Chains.plus, [s.chains for s in own], NO_CHAINS) == of_steps
    assert of_steps.total.num_proposed == executor.num_drafts
    # The executor accepts what is beyond an end too.
    assert of_steps.total.num_accepted <= executor.num_accepted
    assert sum(s.verifying_s for s in own) == pytest.approx(sum(s.verifying_s for s in steps))
    for timings in ended.values():
        if timings.speculation is None or depth:
            continue
        # A step gives one instant: so many instants there are, whatever was accepted.
        num_tokens, count = len(timings.token_times), timings.speculation.total
        num_steps = len(set(timings.token_times))
        assert num_tokens - num_steps == count.num_accepted
        assert tokens_per_step(num_tokens, count.num_accepted) == num_tokens / num_steps
