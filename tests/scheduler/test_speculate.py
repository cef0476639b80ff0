"""What a proposer is told of a request whose drafts it is to make."""

from fakes import make_request
from scheduler.scripted import SMALL

from duetto.core.batch import Drafting, RequestResult, SampledToken, StepOutput
from duetto.core.config import SchedulerConfig
from duetto.scheduler.drafts import Ask, NoDrafts
from duetto.scheduler.scheduler import Scheduler


class Asks(NoDrafts):
    """Asks the next of `methods` for one draft after each step."""

    is_on = True

    def __init__(self, *methods: str) -> None:
        self._methods = list(methods)

    def ask(self, planned):
        method = self._methods.pop(0)
        return {each.request.request_id: Ask(method, 1) for each in planned}


def drafting_of_steps(methods: list[str], **fields) -> list[Drafting]:
    scheduler = Scheduler(SchedulerConfig(**SMALL), drafts=Asks(*methods))
    scheduler.add(make_request("r", (5, 6, 7), **fields))
    found = []
    for step in range(len(methods)):
        batch = scheduler.schedule(step)
        (item,) = batch.requests
        found.append(item.drafting)
        result = RequestResult((SampledToken(9 + step),))
        scheduler.update(batch, StepOutput((result,)), step + 1.0)
    return found


def test_each_token_is_sent_once_to_the_proposer_that_is_asked_again() -> None:
    first, second, third = drafting_of_steps(["ngram"] * 3, max_tokens=20)
    assert (first.start, first.token_ids) == (0, (5, 6, 7))
    assert (second.start, second.token_ids) == (3, (9,))
    assert (third.start, third.token_ids) == (4, (10,))


def test_another_proposer_begins_anew() -> None:
    found = drafting_of_steps(["ngram", "suffix", "suffix", "ngram"], max_tokens=20)
    assert [each.start for each in found] == [0, 0, 4, 0]
    assert found[3].token_ids == (5, 6, 7, 9, 10, 11)


def test_nothing_crosses_between_salts_or_tenants() -> None:
    kinds = [(b"", b""), (b"a", b""), (b"", b"a"), (b"a", b"a"), (b"aa", b""), (b"b", b"a")]
    tenants = [
        drafting_of_steps(["suffix"], max_tokens=9, tenant=tenant, cache_salt=salt)[0].tenant
        for tenant, salt in kinds
    ]
    assert len(set(tenants)) == len(kinds)
    again = drafting_of_steps(["suffix"], max_tokens=9, tenant=b"a", cache_salt=b"a")
    assert again[0].tenant == tenants[3]
