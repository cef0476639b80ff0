from fakes import make_request

from duetto.core.request import fan_out


def test_one_answer_is_the_request_itself() -> None:
    request = make_request("r")
    assert fan_out(request) == [request]


def test_each_answer_has_an_id_and_a_stream_of_its_own() -> None:
    answers = fan_out(make_request("r", (1, 2), 5, seed=7, n=4, priority=2, cache_salt=b"s"))
    assert [answer.request_id for answer in answers] == ["r-0", "r-1", "r-2", "r-3"]
    assert answers[0].seed == 7  # so n answers begin with the answer of n=1
    assert len({answer.seed for answer in answers}) == 4
    for answer in answers:
        assert (answer.prompt_token_ids, answer.max_tokens) == ((1, 2), 5)
        assert (answer.priority, answer.cache_salt) == (2, b"s")


def test_seeds_follow_from_the_first_alone() -> None:
    seeds = [[a.seed for a in fan_out(make_request(name, seed=7, n=n))] for name, n in
             [("a", 3), ("b", 3), ("c", 4)]]  # fmt: skip
    assert seeds[0] == seeds[1] == seeds[2][:3]
    assert seeds[0][1:] != [a.seed for a in fan_out(make_request("r", seed=8, n=3))][1:]
    assert all(0 <= seed < 2**64 for seed in seeds[2])


def test_answers_share_no_state() -> None:
    first, second = fan_out(make_request("r", (1, 2), n=2))
    first.token_ids.append(3)
    first.block_table.append(0)
    first.timings.token_times.append(1.0)
    assert second.token_ids == [1, 2]
    assert second.block_table == []
    assert second.timings.token_times == []


def test_progress_is_one_subtraction() -> None:
    request = make_request("r", (1, 2, 3), 4)
    assert (request.num_uncomputed_tokens, request.num_output_tokens) == (3, 0)
    request.token_ids += [8, 9]
    request.num_computed_tokens = 4
    assert (request.num_tokens, request.num_uncomputed_tokens) == (5, 1)
    assert list(request.output_token_ids) == [8, 9]
    assert request.most_tokens == 7
