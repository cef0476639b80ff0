"""KV that travels while layers compute, and requests that go on elsewhere."""

from dataclasses import replace

import pytest
from simulation.loads import mixed_load, replica

from duetto.core.errors import ConfigError
from duetto.core.timings import Part
from duetto.simulation.disaggregation import Disaggregation, KVLink, LinkClock
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.workload import Arrival, Traffic

LINK = KVLink(num_layers=4, bytes_per_token=400, bytes_per_s=1e5)  # 1 ms a token and layer


def layer_by_layer(link: KVLink, num_tokens: int, start: float, end: float, free: float) -> float:
    """The recurrence that send_chunk has in closed form."""
    layers = link.num_layers
    send = num_tokens * link.bytes_per_token / layers / link.bytes_per_s
    for layer in range(layers):
        there = start + (layer + 1) * (end - start) / layers
        free = max(free, there) + send
    return free


@pytest.mark.parametrize("num_tokens", [1, 10, 100])
@pytest.mark.parametrize("duration", [0.0, 0.02, 0.04, 0.4])
@pytest.mark.parametrize("busy_until", [0.0, 1.01, 1.2])
def test_a_chunk_arrives_as_layer_by_layer(
    num_tokens: int, duration: float, busy_until: float
) -> None:
    clock = LinkClock(LINK)
    expected = 0.0
    if busy_until:
        tokens = round(busy_until * LINK.bytes_per_s / LINK.bytes_per_token)
        clock.send_cached("other", tokens, 0.0)
        expected = clock.arrival("other")
    clock.send_chunk("r", num_tokens, 1.0, 1.0 + duration)
    expected = layer_by_layer(LINK, num_tokens, 1.0, 1.0 + duration, expected)
    assert clock.arrival("r") == pytest.approx(expected, rel=1e-12)


def test_what_is_seen_of_a_transfer_is_one_layer_if_it_is_faster_than_computing() -> None:
    """max(x, L·x - (L-1)·c) after the prefill has ended."""
    for num_tokens, compute in ((10, 0.08), (10, 0.02)):  # x = 10 ms; c = 20 and 5 ms
        clock = LinkClock(LINK)
        clock.send_chunk("r", num_tokens, 0.0, compute)
        seen = clock.arrival("r") - compute
        x, c, layers = 0.01, compute / 4, 4
        assert seen == pytest.approx(max(x, layers * x - (layers - 1) * c))


def apart(**changes: object) -> Fleet:
    values = {"prefill": replica(), "num_replicas": 1, "link": LINK, **changes}
    return Fleet(replica=replica(), disaggregation=Disaggregation(**values))  # type: ignore[arg-type]


def test_one_request_by_hand() -> None:
    """40 tokens in one step; then their KV, 40 ms a layer; then 4 tokens from the other replica."""
    load = Traffic((Arrival(1.0, 40, 5),))
    (served,) = simulate(load, apart()).served
    prefill = 0.004 + 3e-5 * 40 + 1e-6 * 40
    transfer = 4 * 0.04 - 3 * prefill / 4
    first, *others = served.timings.token_times
    assert first == pytest.approx(1 + prefill)
    assert served.transfer_s == pytest.approx(transfer)
    decode = [0.004 + 3e-5 + 1e-6 * n for n in (41, 42, 43, 44)]
    ends = [first + transfer + sum(decode[: k + 1]) for k in range(4)]
    assert others == pytest.approx(ends)
    assert served.timings.parts[Part.STALLED] == pytest.approx(transfer)
    assert (served.prefill_replica, served.replica) == (0, 0)


def test_nothing_is_computed_twice_and_nothing_is_lost() -> None:
    load = mixed_load(3)
    run = simulate(load, replace(apart(num_replicas=2), num_replicas=2))
    prompts = sum(a.num_prompt_tokens for a in load.arrivals)
    cached = sum(s.num_cached_tokens for s in run.served)
    assert sum(sum(log.num_tokens) for log in run.prefill_steps) == prompts - cached
    assert sum(sum(log.num_tokens) for log in run.steps) == sum(
        a.num_output_tokens - 1 for a in load.arrivals
    )
    assert sum(sum(log.num_prompt_tokens) for log in run.steps) == 0
    for arrival, served in zip(load.arrivals, run.served, strict=True):
        timings = served.timings
        assert len(timings.token_times) == arrival.num_output_tokens
        assert sum(timings.parts.values()) == pytest.approx(timings.e2e_s)
        assert timings.token_times == sorted(timings.token_times)


def test_short_prompts_stay_local() -> None:
    load = mixed_load(3)
    run = simulate(load, apart(max_local_prefill=100))
    for arrival, served in zip(load.arrivals, run.served, strict=True):
        assert (served.prefill_replica is None) == (arrival.num_prompt_tokens <= 100)
        assert (served.transfer_s == 0) == (
            arrival.num_prompt_tokens <= 100 or arrival.num_output_tokens == 1
        )


def test_a_slow_link_delays_the_second_token_only() -> None:
    load = mixed_load(4, num_requests=20)
    fast, slow = (simulate(load, apart(link=replace(LINK, bytes_per_s=b))) for b in (1e12, 1e4))
    for one, other in zip(fast.served, slow.served, strict=True):
        assert one.timings.token_times[0] <= other.timings.token_times[0]
    assert sum(s.timings.e2e_s or 0 for s in slow.served) > sum(
        s.timings.e2e_s or 0 for s in fast.served
    )


def test_blocks_are_held_until_their_kv_has_been_read() -> None:
    """The second prompt needs the first one's blocks, which a slow link still reads."""
    small = replica(num_blocks=8, max_model_len=64)  # of 8 tokens: one prompt of 60
    load = Traffic((Arrival(0.0, 60, 5), Arrival(0.0, 60, 5)))
    run = simulate(load, apart(prefill=small))
    first, second = run.served
    begun = second.timings.first_scheduled_time
    arrived = first.timings.token_times[0] + first.transfer_s
    assert begun == pytest.approx(arrived)


def test_a_lost_import_is_computed_again() -> None:
    """Two requests grow beyond the decoding replica's blocks: one is preempted, and its prompt
    must be computed where it decodes."""
    spec = replica(num_blocks=12, max_model_len=90, enable_prefix_caching=False)
    load = Traffic((Arrival(0.0, 40, 40), Arrival(0.0, 40, 40)))
    fleet = replace(apart(link=replace(LINK, bytes_per_s=1e9)), replica=spec)
    run = simulate(load, fleet)
    assert sum(run.steps[0].num_preemptions) > 0
    assert sum(run.steps[0].num_prompt_tokens) > 40
    assert [len(s.timings.token_times) for s in run.served] == [40, 40]


def test_a_prompt_that_fits_nowhere_is_refused() -> None:
    tiny = replica(num_blocks=4, max_model_len=32)
    load = Traffic((Arrival(0.0, 100, 5), Arrival(0.0, 10, 5)))
    refused, served = simulate(load, apart(prefill=tiny)).served
    assert refused.refusal is not None and "100" in refused.refusal
    assert len(served.timings.token_times) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_replicas": 0}, "--prefill-replicas 0"),
        ({"max_local_prefill": -1}, "--max-local-prefill -1"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apart(**changes)
    with pytest.raises(ConfigError, match="--kv-bandwidth"):
        replace(LINK, bytes_per_s=0)
