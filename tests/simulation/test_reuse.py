"""Loads whose documents are reused: what is marked, what it takes, and what is told of it."""

import pytest

from duetto.core.batch import KVMove, Look, ScheduledBatch, ScheduledRequest
from duetto.core.config import SchedulerConfig
from duetto.core.errors import ConfigError
from duetto.core.reuse import METHODS, TokenRange
from duetto.core.reuse_choice import ReuseLimits
from duetto.pricing.reuse import ReusePrices
from duetto.simulation.disaggregation import Disaggregation, KVLink
from duetto.simulation.load import TrafficOptions
from duetto.simulation.looks import seen
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.report import sum_up
from duetto.simulation.reuse import ReuseTotals, with_reuse
from duetto.simulation.simulation import Fleet, Simulation, simulate
from duetto.simulation.workload import Arrival, Traffic

CONFIG = SchedulerConfig(
    num_blocks=4096, max_model_len=4000, max_num_seqs=8, max_num_batched_tokens=512
)
PRICES = ReusePrices(move_s=0.001, look_time=lambda shape: 0.1 * shape.num_tokens)
WORDS = {"none": "none", "first": "first:4", "hkvd": "hkvd:0.25", "query": "query:0.25:2"}


def load(*documents: tuple[int, ...], question: int = 8, apart_s: float = 1e6) -> Traffic:
    """One request after the other, of documents of 64 tokens and a question."""
    arrivals = [
        Arrival(n * apart_s, 64 * len(ids) + question, 3, ids) for n, ids in enumerate(documents)
    ]
    return Traffic(tuple(arrivals), 64)


def run(traffic: Traffic, *, fast: bool = True, reuse: ReusePrices | None = PRICES) -> Simulation:
    spec = ReplicaSpec(scheduler=CONFIG, step_time=lambda shape: shape.num_tokens, reuse=reuse)
    return simulate(traffic, Fleet(replica=spec), fast=fast)


def totals(simulation: Simulation) -> ReuseTotals:
    found = sum_up(simulation, 1).reuse
    assert found is not None
    return found


def test_what_is_marked() -> None:
    marked = with_reuse(load((1, 2, 3)), "first:4")
    request = marked.request(0)
    assert request.reuse is not None and request.reuse.num_first == 4
    assert request.reuse.segments == ((0, 64), (64, 128), (128, 192))
    assert "blocks of 64 tokens, and reused by first:4" in marked.notes[0]
    assert with_reuse(load((1, 2)), None).request(0).reuse is None
    assert with_reuse(load((1, 2)), "off").request(0).reuse is None


def test_a_block_that_is_not_whole_is_no_document() -> None:
    cut = Traffic((Arrival(0.0, 100, 1, (1, 2)), Arrival(1.0, 160, 1, (2, 1, 3))), 64)
    reuse = [with_reuse(cut, "none").request(index).reuse for index in range(2)]
    assert [each and each.segments for each in reuse] == [((0, 64),), ((0, 64), (64, 128))]


def test_moved_documents_are_not_computed_again() -> None:
    simulation = run(with_reuse(load((1, 2, 3), (3, 2, 1)), "none"))
    found = totals(simulation)
    # The first one computes two documents alone; the prefix of either is exact if it is there.
    assert found == ReuseTotals(
        num_exact=64,
        num_reused=4 * 64,
        num_recomputed=0,
        num_computed=64 + 2 * 8,
        num_missing=2 * 64,
        num_segments=6,
        misses={"at_start": 2, "never_seen": 2},
    )
    first, second = [served.timings.ttft_s for served in simulation.served]
    assert first == pytest.approx(3 * 64 + 8 + 2 * 64 * 0.001)
    assert second == pytest.approx(8 + 2 * 64 * 0.001)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_numbers_with_and_without_fast_forward(method: str) -> None:
    documents = [tuple((3 * n + k) % 7 for k in range(3)) for n in range(12)]
    traffic = with_reuse(load(*documents, apart_s=50.0), WORDS[method])
    slow, fast = run(traffic, fast=False), run(traffic)
    assert [s.timings for s in slow.served] == [s.timings for s in fast.served]
    assert totals(slow).num_reused > 0


@pytest.mark.parametrize("method", ["hkvd", "query"])
def test_chosen_tokens_are_computed(method: str) -> None:
    if method not in METHODS:
        pytest.skip("the choice is not there")
    traffic = with_reuse(load((1, 2, 3), (3, 2, 1)), WORDS[method])
    found = totals(run(traffic))
    assert found.num_recomputed == 2 * (2 * 64 // 4) and found.num_reused == 2 * (3 * 2 * 64 // 4)
    assert [s.timings.ttft_s for s in run(traffic).served] != [
        s.timings.ttft_s for s in run(traffic, reuse=None).served
    ]


def item(name: str, count: int, *, start: int = 0, **more: object) -> ScheduledRequest:
    return ScheduledRequest(name, (1,) * count, start, (0,), **more)  # type: ignore[arg-type]


def test_a_step_pays_its_moves_and_looks() -> None:
    move = KVMove((0,), 2, 12, 30)
    batch = ScheduledBatch((item("a", 3, moves=(move, move)), item("b", 5)))
    assert PRICES.of(batch, lambda shape: shape.num_tokens) == pytest.approx(8 + 20 * 0.001)
    looking = item("c", 7, moves=(move,), look=Look("deviation"))
    both = ScheduledBatch((looking, item("b", 5)))
    assert PRICES.of(both, lambda shape: shape.num_tokens) == pytest.approx(0.01 + 0.7 + 5)
    alone = ScheduledBatch((looking,))
    assert PRICES.of(alone, lambda shape: shape.num_tokens) == pytest.approx(0.01 + 0.7)
    attending = item("d", 7, look=Look("attention", (TokenRange(0, 2),)))
    assert PRICES.of(ScheduledBatch((attending,)), lambda shape: shape.num_tokens) == 7


def test_what_is_seen_adds_up_whatever_the_chunks() -> None:
    ranges = (TokenRange(2, 6), TokenRange(9, 12))
    look = Look("attention", ranges)
    whole = seen(item("a", 8, start=12), look)
    parts = [seen(item("a", n, start=s), look) for n, s in ((3, 12), (5, 15))]
    assert list(whole) == [a + b for a, b in zip(*parts, strict=True)] and len(set(whole)) == 7
    assert seen(item("a", 1, start=8), look)[4:] == (0.0,) * 3  # what comes later is not seen
    deviation = Look("deviation")
    assert seen(item("a", 8), deviation) == (
        *seen(item("a", 3), deviation),
        *seen(item("a", 5, start=3), deviation),
    )
    assert seen(item("b", 8), deviation) != seen(item("a", 8), deviation)


def test_documents_are_drawn() -> None:
    options = TrafficOptions(
        num_prompts=50, random_documents=4, random_document_len=32, random_num_documents=9
    )
    traffic = options.load(0)
    assert traffic.hash_block == 32
    for arrival in traffic.arrivals:
        assert arrival.num_prompt_tokens == 4 * 32 + 1024
        assert len(set(arrival.hash_ids)) == 4 and set(arrival.hash_ids) <= set(range(9))
    assert traffic == options.load(0) != options.load(1)
    plain = TrafficOptions(num_prompts=50).load(0)
    assert [a.arrival_s for a in plain.arrivals] == [a.arrival_s for a in traffic.arrivals]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_documents": 4, "random_num_documents": 3}, "at most --random-num-documents"),
        ({"random_documents": -1}, "at least 1"),
        ({"random_documents": 2, "random_document_len": 0}, "--random-document-len must be 1 to"),
        ({"random_documents": 2, "random_prefix_len": 8}, "leave one of them out"),
        ({"random_document_len": 8}, "--random-document-len: needs --random-documents"),
        ({"random_num_documents": 8}, "--random-num-documents: needs --random-documents"),
    ],
)
def test_documents_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrafficOptions(num_prompts=2, **options).load(0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("best", r"--reuse.*'best' is not one of none, first"),
        ("first", "--reuse.*num_first.*needs it"),
        ("first:-1", r"--reuse.num_first: must be a whole number from 0"),
    ],
)
def test_a_choice_that_is_none_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_reuse(load((1, 2)), word)


def test_what_the_model_cannot_do_is_refused() -> None:
    for limits, words in (
        (
            ReuseLimits(no_deviation="one layer"),
            "--reuse hkvd:0.25: method hkvd cannot choose: one layer",
        ),
        (ReuseLimits(window=63), "--reuse hkvd:0.25: not moved: a segment of 64 tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            with_reuse(load((1, 2)), "hkvd:0.25", limits)
    assert with_reuse(load((1, 2)), "hkvd:0.25", ReuseLimits(window=64)).reuse is not None


def test_a_load_without_documents_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs --random-documents, or a --trace with hash_ids"):
        with_reuse(TrafficOptions(num_prompts=2).load(0), "none")


def test_where_the_prefix_cache_finds_all_it_is_said() -> None:
    behind_others = load((1, 2, 3), (1, 2, 4))
    assert "the prefix cache alone finds all" in with_reuse(behind_others, "none").notes[-1]
    assert len(with_reuse(load((1, 2, 3), (3, 2, 1)), "none").notes) == 1


def test_what_is_not_simulated_is_refused() -> None:
    marked = with_reuse(load((1, 2)), "none")
    spec = ReplicaSpec(scheduler=CONFIG, step_time=lambda shape: shape.num_tokens)
    link = KVLink(num_layers=1, bytes_per_token=1.0, bytes_per_s=1.0)
    apart = Disaggregation(prefill=spec, num_replicas=1, link=link)
    with pytest.raises(ConfigError, match="--reuse with --prefill-replicas: not simulated"):
        simulate(marked, Fleet(replica=spec, disaggregation=apart))


def test_nothing_is_told_of_a_load_that_is_not_marked() -> None:
    outcome = sum_up(run(load((1, 2), (2, 1))), 1)
    assert outcome.reuse is None and "reuse" not in outcome.as_json()
    marked = sum_up(run(with_reuse(load((1, 2), (2, 1)), "none")), 1)
    assert marked.as_json()["reuse"] == {
        "exact_tokens": 64,
        "reused_tokens": 128,
        "recomputed_tokens": 0,
        "computed_tokens": 64 + 16,
        "missing_tokens": 64,
        "segments": 4,
        "misses": {"at_start": 2, "never_seen": 1},
    }
    assert marked.reuse is not None
    assert "of 4 documents: 2 at_start, 1 never_seen" in marked.reuse.words
