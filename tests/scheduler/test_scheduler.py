"""Who runs, in which order and with what room, spelt out in steps, tokens and block numbers."""

import pytest
from fakes import generate_alone, make_request
from scheduler.scripted import Script

from duetto.core.errors import InvalidRequest, RequestTooLong

# --- room ----------------------------------------------------------------------------------


def test_room_for_the_whole_prompt_is_taken_when_it_is_admitted() -> None:
    script = Script(max_num_batched_tokens=4)
    script.add(make_request("r", range(1, 11), 4))
    (item,) = script.plan().requests
    assert item.token_ids == (1, 2, 3, 4)
    assert item.block_table == (0, 1, 2)  # 10 tokens in blocks of 4


def test_a_table_grows_by_a_block_when_the_last_one_is_full() -> None:
    script = Script()
    request = make_request("r", (1, 2, 3), 4)
    script.add(request)
    tables = []
    for _ in range(3):
        script.step()
        tables.append(list(request.block_table))
    assert tables == [[0], [0], [0, 1]]


def test_the_last_token_is_never_computed_and_needs_no_room() -> None:
    script = Script(num_blocks=1)
    script.add(make_request("r", (1, 2, 3), 2))
    script.finish()
    with pytest.raises(RequestTooLong):
        script.add(make_request("longer", (1, 2, 3), 3))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [
        (60, 5, "context length is 49 tokens.*65 tokens"),
        (40, 10, "50 tokens .40 in.*10 in.*12 blocks of 4"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    prompt: int, max_tokens: int, numbers: str
) -> None:
    script = Script(num_blocks=12)
    with pytest.raises(RequestTooLong, match=numbers):
        script.add(make_request("r", range(prompt), max_tokens))
    assert not script.scheduler.has_work


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: must hold at least one token"):
        Script().add(make_request("r", (), 4))


# --- who goes first ------------------------------------------------------------------------


def test_a_next_token_never_waits_behind_a_chunk() -> None:
    script = Script(max_num_batched_tokens=6)
    script.add(make_request("short", (1,), 8), make_request("long", (2,) * 20, 2))
    assert script.steps(4) == [
        {"short": 1, "long": 5},
        {"short": 1, "long": 5},
        {"short": 1, "long": 5},
        {"short": 1, "long": 5},
    ]
    assert script.step() == {"short": 1, "long": 1}


def test_the_head_of_the_queue_is_not_overtaken_by_who_would_fit() -> None:
    script = Script(num_blocks=6)
    script.add(make_request("running", (1,) * 12, 4))
    script.step()
    script.add(make_request("large", (2,) * 12, 4), make_request("small", (3,), 4))
    script.step()
    assert (script.running, script.waiting) == (["running"], ["large", "small"])
    script.finish()
    assert list(script.ended) == ["running", "large", "small"]


def test_places_are_limited() -> None:
    script = Script(max_num_seqs=2)
    script.add(*(make_request(f"r{i}", (i + 1,), 2) for i in range(3)))
    assert script.steps(3) == [{"r0": 1, "r1": 1}, {"r0": 1, "r1": 1}, {"r2": 1}]


def test_priority_goes_before_arrival() -> None:
    script = Script(scheduling_policy="priority", max_num_seqs=1)
    for i, priority in enumerate([2, 0, 1, 0]):
        script.add(make_request(f"r{i}", (1,), 1, priority=priority))
    assert script.waiting == ["r1", "r3", "r2", "r0"]


def test_nobody_starves_under_a_stream_of_urgent_arrivals() -> None:
    script = Script(scheduling_policy="priority", max_num_seqs=1, ageing_s=10.0)
    script.add(make_request("patient", (1,), 1, priority=3, arrival_time=0.0))
    for number in range(60):
        arrival = make_request(f"u{number}", (1,), 1, arrival_time=script.now)
        script.add(arrival)
        script.step()
        if "patient" in script.ended:
            break
    # Three levels at 10 s each; of the arrivals at 30 s it is the first.
    assert script.now == 31.0
    assert script.waiting == ["u30"]


# --- chunks off, static batches ------------------------------------------------------------


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it_whole() -> None:
    script = Script(enable_chunked_prefill=False, max_model_len=16)
    script.add(make_request("a", (1,) * 10, 2), make_request("b", (2,) * 10, 2))
    assert script.steps(3) == [{"a": 10}, {"a": 1, "b": 10}, {"b": 1}]


def test_a_static_batch_runs_until_its_longest_request_ends() -> None:
    script = Script(scheduling_policy="static", max_num_seqs=2)
    script.add(*(make_request(f"r{i}", (i + 1,), n) for i, n in enumerate([4, 1, 1])))
    assert script.steps(5) == [{"r0": 1, "r1": 1}, {"r0": 1}, {"r0": 1}, {"r0": 1}, {"r2": 1}]


def test_who_arrives_after_a_static_batch_was_chosen_waits_for_the_next() -> None:
    script = Script(scheduling_policy="static", max_num_seqs=4)
    script.add(make_request("r0", (1,), 3))
    script.step()
    script.add(make_request("r1", (2,), 1))
    assert script.steps(3) == [{"r0": 1}, {"r0": 1}, {"r1": 1}]


def test_the_budget_may_spread_the_admission_of_a_static_batch() -> None:
    script = Script(scheduling_policy="static", max_num_batched_tokens=4, max_num_seqs=2)
    script.add(*(make_request(f"r{i}", (i + 1,) * 6, 2) for i in range(3)))
    assert script.steps(3) == [{"r0": 4}, {"r0": 2, "r1": 2}, {"r0": 1, "r1": 3}]


def test_a_member_that_waits_for_a_prefix_keeps_its_place_in_the_static_batch() -> None:
    script = Script(scheduling_policy="static", max_num_seqs=2)
    script.add(*(make_request(name, (1,) * 6, 3) for name in ("a", "same")))
    script.add(make_request("other", (2,), 3))
    assert script.steps(2) == [{"a": 6}, {"a": 1, "same": 2}]


# --- preemption ----------------------------------------------------------------------------


def test_the_newest_is_preempted_and_comes_back_to_the_same_answer() -> None:
    script = Script(num_blocks=5)
    old, new = (make_request(name, (n,) * 7, 9) for n, name in enumerate(("old", "new")))
    script.add(old, new)
    script.steps(2)
    assert len(old.block_table) == len(new.block_table) == 2
    assert script.step() == {"old": 1}  # takes the fifth block; and new, which needs one, yields
    assert (script.waiting, new.block_table, new.num_lost_tokens) == (["new"], [], 8)
    script.finish()
    assert (old.timings.num_preemptions, new.timings.num_preemptions) == (0, 1)
    assert list(new.output_token_ids) == generate_alone(new)


def test_nobody_is_admitted_in_the_step_of_a_preemption() -> None:
    script = Script(num_blocks=5)
    script.add(make_request("old", (1,) * 7, 9), make_request("new", (2,) * 7, 9))
    script.steps(2)
    script.add(make_request("tiny", (3,), 1))
    assert script.step() == {"old": 1}
    assert script.waiting == ["new", "tiny"]


@pytest.mark.parametrize("max_preemptions", [0, 1, 2, 4])
def test_preemption_is_bounded(max_preemptions: int) -> None:
    script = Script(num_blocks=8, max_preemptions=max_preemptions, enable_prefix_caching=False)
    requests = [make_request(f"r{i}", (i + 1,) * 3, 20) for i in range(6)]
    script.add(*requests)
    script.finish()
    counts = [request.timings.num_preemptions for request in requests]
    assert max(counts) <= max_preemptions
    assert sum(counts) == script.scheduler.counts.num_preemptions
    assert (sum(counts) > 0) == (max_preemptions > 0)


def test_who_was_preempted_often_enough_is_admitted_with_all_the_room_it_can_need() -> None:
    script = Script(max_preemptions=1)
    request = make_request("r", (1,) * 5, 12)
    script.add(request)
    script.step()
    assert len(request.block_table) == 2
    script.scheduler._room.preempt(request)
    script.step()
    assert len(request.block_table) == 4  # 16 tokens: the 17th is never computed
