"""Proposers are asked after a step, and none of them can harm a request."""

import logging

import pytest

from duetto.core.batch import Drafting, RequestResult, SampledToken, SamplingInput, ScheduledRequest
from duetto.core.sampling_params import SamplingParams
from duetto.runner.proposers.drafters import Drafters, advanced
from duetto.runner.proposers.proposer import DraftRequest

VOCAB = 50


class Proposing:
    """Says the same each time, and remembers what it was asked."""

    needs_hidden = False

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def propose(self, requests):
        self.asked.append(list(requests))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return [self.answer] * len(requests) if isinstance(self.answer, tuple) else self.answer


def sampling(place=3, **params):
    return SamplingInput(SamplingParams(temperature=0.0, **params), 1, place)


def scheduled(name="a", *, drafting=None, tokens=(7,), start=10, num_drafts=0):
    rows = tuple(sampling(3 + i) for i in range(1 + num_drafts))
    return ScheduledRequest(
        name, tokens, start, (0, 1, 2), rows, num_drafts=num_drafts, drafting=drafting
    )


def drafting(start, token_ids, wanted=3, method="m"):
    return Drafting(method, wanted, b"t", start, tuple(token_ids), 8)


def result(*tokens):
    return RequestResult(tuple(SampledToken(t) for t in tokens))


def propose(answer, request, given):
    it = Proposing(answer)
    drafters = Drafters({"m": it}, VOCAB)
    ((drafted,), seconds) = drafters.propose([request], [given])
    assert drafted._replace(drafts=()) == given and seconds >= 0
    return drafted.drafts, it.asked


def test_what_the_step_sampled_follows_what_was_known():
    asked_for = scheduled(drafting=drafting(9, [6, 7]))
    drafts, ((asked,),) = propose((1, 2), asked_for, result(8))
    assert drafts == (1, 2)
    assert asked == DraftRequest("a", 3, 9, (6, 7, 8), 8, b"t", (0, 1, 2), sampling(4))


def test_after_a_verified_step_the_accepted_drafts_and_the_next():
    asked_for = scheduled(tokens=(7, 1, 2, 3), num_drafts=3, drafting=drafting(10, [7]))
    _, ((asked,),) = propose((), asked_for, result(1, 2, 9))
    assert asked.token_ids == (7, 1, 2, 9)
    assert asked.sampling == sampling(6)


@pytest.mark.parametrize("sent", [drafting(8, [5]), drafting(0, [])])
def test_a_piece_of_what_is_known_is_only_kept_up_with(sent):
    drafts, ((asked,),) = propose((), scheduled(drafting=sent), result(8))
    assert (drafts, asked.num_wanted, asked.token_ids) == ((), 0, sent.token_ids)


def test_a_step_that_samples_nothing_wants_nothing():
    request = scheduled(drafting=drafting(10, [7]))._replace(rows=())
    _, ((asked,),) = propose((), request, RequestResult())
    assert asked.num_wanted == 0 and asked.sampling is None


def test_who_is_not_asked_for_costs_nothing():
    assert propose((1,), scheduled(), result(8)) == ((), [])
    failed = RequestResult(error="no token is left")
    assert propose((1,), scheduled(drafting=drafting(10, [7])), failed) == ((), [])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (RuntimeError("planted"), "planted"),
        (AssertionError("two tokens would be written into one slot"), "one slot"),
        ((1, 2, 3, 4), "other than 3 drafts or fewer"),
        ((1, VOCAB), "outside the vocabulary of 50"),
        ((-1,), "outside the vocabulary"),
        ((True,), "outside the vocabulary"),
        ((1.0,), "outside the vocabulary"),
        (("1",), "outside the vocabulary"),
        ([None], "drafts or fewer"),
        ([7], "drafts or fewer"),
        ([], "0 proposals for 1"),
        (None, "NoneType"),
        ([(1,), (2,)], "2 proposals for 1"),
    ],
)
def test_nonsense_costs_the_drafts_and_is_said_once(answer, says, caplog):
    drafters = Drafters({"m": Proposing(answer)}, VOCAB)
    request, given = scheduled(drafting=drafting(10, [7])), result(8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert drafters.propose([request], [given])[0] == [given]
    (message,) = [record.getMessage() for record in caplog.records]
    assert says in message and "answers stay" in message


def test_nonsense_for_one_request_leaves_the_others_theirs():
    it = Proposing([(1,), (VOCAB,), (2, 3)])
    requests = [scheduled(name, drafting=drafting(10, [7])) for name in "abc"]
    drafted, _ = Drafters({"m": it}, VOCAB).propose(requests, [result(8)] * 3)
    assert [each.drafts for each in drafted] == [(1,), (), (2, 3)]


def test_each_proposer_is_asked_for_its_own_and_one_that_raises_harms_no_other():
    proposers = {"bad": Proposing(ValueError()), "good": Proposing((4,))}
    requests = [
        scheduled(str(i), drafting=drafting(10, [7], method=m))
        for i, m in enumerate(["good", "bad", "good", "unknown"])
    ]
    drafted, _ = Drafters(proposers, VOCAB).propose(requests, [result(8)] * 4)
    assert [each.drafts for each in drafted] == [(4,), (), (4,), ()]
    assert len(proposers["good"].asked) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_what_ends_the_process_is_not_held_up(error):
    with pytest.raises(type(error)):
        propose(error, scheduled(drafting=drafting(10, [7])), result(8))


def test_the_next_place_in_the_random_stream():
    plain = sampling(3)._replace(forbidden_token_ids=(9,))
    assert advanced(plain, 5) == sampling(4)
    early = SamplingInput(SamplingParams(min_tokens=6), 1, 3, (9,))
    assert advanced(early, 5).forbidden_token_ids == (9,)
    assert advanced(early._replace(num_output_tokens=5), 5).forbidden_token_ids == ()
    penalized = SamplingInput(SamplingParams(presence_penalty=1.0), 1, 2, (), (1, 2), (3, 4))
    assert advanced(penalized, 5) == penalized._replace(
        num_output_tokens=3, output_token_ids=(3, 4, 5)
    )
