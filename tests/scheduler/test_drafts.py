"""Which drafts are verified, and who is asked for more."""

from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import EMPTY
from duetto.scheduler.drafts import Candidate, DraftPolicy, NoDrafts, Planned


def request(name: str = "a", max_tokens: int = 100) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        seed=0,
    )


def test_without_speculation_nothing_is_verified_or_asked_for() -> None:
    policy: DraftPolicy = NoDrafts()
    one = request()
    assert not policy.is_on
    assert not policy.choose([Candidate(one, (1, 2))], EMPTY, 10)
    assert not policy.ask([Planned(one, 5, 0)])
