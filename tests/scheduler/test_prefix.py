"""What is reused, what never is, and when it is found."""

import pytest
from fakes import make_request
from scheduler.scripted import Script


def test_full_blocks_are_reused_and_the_block_with_the_last_token_is_not() -> None:
    script = Script()
    script.add(make_request("a", range(1, 9), 1))
    script.finish()
    again, longer = (make_request(i, range(1, n), 1) for i, n in (("again", 9), ("longer", 10)))
    script.add(again, longer)
    assert script.step() == {"again": 4, "longer": 1}  # at least one token gives the logits
    assert (again.num_cached_tokens, longer.num_cached_tokens) == (4, 8)
    assert script.scheduler.counts.num_hit_tokens == 12
    assert script.scheduler.counts.num_queried_tokens == 8 + 8 + 9


def test_answers_are_reused_as_prompts_are() -> None:
    script = Script()
    first = make_request("first", (1, 2, 3), 6)
    script.add(first)
    script.finish()
    turn = make_request("turn", (*first.token_ids, 9), 1)
    script.add(turn)
    script.step()
    assert turn.num_cached_tokens == 8  # of 9 tokens the last was never computed


def test_a_block_is_found_as_soon_as_it_is_computed() -> None:
    script = Script(max_num_batched_tokens=5)
    b = make_request("b", range(1, 9), 1)
    script.add(make_request("a", range(1, 13), 1), b)
    assert script.steps(3) == [{"a": 5}, {"a": 5}, {"a": 2, "b": 3}]
    assert b.num_cached_tokens == 4  # admitted while a was still at its prompt


@pytest.mark.parametrize("difference", [{"cache_salt": b"tenant"}, {"prompt_logprobs": 0}])
def test_other_salts_and_scored_prompts_reuse_nothing(difference: dict[str, object]) -> None:
    script = Script()
    script.add(make_request("a", range(1, 10), 1))
    script.finish()
    other = make_request("b", range(1, 10), 1, **difference)  # type: ignore[arg-type]
    script.add(other)
    assert script.step() == {"b": 9}
    assert other.num_cached_tokens == 0


def test_other_namespaces_share_no_hash() -> None:
    hashes = []
    for namespace in (b"model-a", b"model-b"):
        script = Script(cache_namespace=namespace)
        request = make_request("r", range(1, 10), 1)
        script.add(request)
        script.step()
        hashes.append(request.block_hashes)
    assert not set(hashes[0]) & set(hashes[1])


def test_without_the_cache_nothing_is_found_and_nobody_waits_for_a_prefix() -> None:
    script = Script(enable_prefix_caching=False, max_num_batched_tokens=32)
    script.add(make_request("a", range(1, 10), 1), make_request("b", range(1, 10), 1))
    assert script.step() == {"a": 9, "b": 9}
    script.add(make_request("c", range(1, 10), 1))
    assert script.step() == {"c": 9}


def test_forgetting_the_cache_leaves_those_who_run_alone() -> None:
    script = Script()
    script.add(make_request("a", range(1, 10), 8))
    script.steps(2)
    script.scheduler.pool.forget_all()
    same = make_request("b", range(1, 10), 1)
    script.add(same)
    assert script.step() == {"a": 1, "b": 9}
    assert same.num_cached_tokens == 0
    script.finish()


def test_the_prefix_outlives_the_tail_when_blocks_are_scarce() -> None:
    script = Script(num_blocks=4)
    script.add(make_request("a", range(1, 14), 1))
    script.finish()
    script.add(make_request("b", range(50, 57), 1))  # takes two blocks
    script.finish()
    again = make_request("again", range(1, 14), 1)
    script.add(again)
    script.step()
    assert again.num_cached_tokens == 8
