"""What goes wrong between two engines, at random times but seeded: every request ends once, with
the answer of one engine alone, and no block stays held on either side."""

import logging
import time
from random import Random

import numpy as np
import pytest
from disaggregation_world import Pair
from fakes import make_request
from small_models import LLAMA, VOCAB, Kind, Model, make_model
from test_same_answer import answers

from duetto.cluster.disaggregation import prefill_session, prefill_side
from duetto.core.batch import ScheduledBatch
from duetto.core.executor import Executor, Pending
from duetto.core.request import FinishReason, Request

NUM_CASES = 50
PROMPTS = [
    np.random.default_rng(i).integers(0, VOCAB, size).tolist()
    for i, size in enumerate((20, 41, 64, 90, 90))
]
PROMPTS[4][:50] = PROMPTS[3][:50]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Model, Model]:
    kind = Kind(LLAMA, "cpu", "float32", None, "float32")
    first, second = (make_model(kind, tmp_path_factory.mktemp("model")) for _ in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone(models) -> dict[str, list]:
    found = {}
    for number in range(len(PROMPTS)):
        found |= answers(models[0].engine(at_once=True), [request(number, f"{number}")])
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(prefill_session, "GOT_WITHIN_S", 0.2)
    monkeypatch.setattr(prefill_side, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("duetto.cluster.disaggregation.peer.RETRY_AFTER_S", 0.01)


def request(number: int, request_id: str, max_tokens: int = 12) -> Request:
    return make_request(request_id, PROMPTS[number], max_tokens, seed=number, logprobs=1)


class Failing:
    """An executor of which some steps raise, before or after they have computed."""

    def __init__(self, executor: Executor, rng: Random, share: float) -> None:
        self.executor, self._rng, self._share = executor, rng, share

    def submit(self, batch: ScheduledBatch) -> Pending:
        draw = self._rng.random()
        if draw < self._share:
            raise RuntimeError("planted, before")
        pending = self.executor.submit(batch)
        if draw < 2 * self._share:
            raise RuntimeError("planted, after")
        return pending


class Case:
    """One seeded story."""

    def __init__(self, seed: int, models: tuple[Model, Model]) -> None:
        self.rng = rng = Random(seed)
        share = rng.choice([0.0, 0.0, 0.1])
        small = {
            "num_blocks": rng.choice([26, 40, 64]),
            "max_num_batched_tokens": rng.choice([16, 64]),
        }
        self.pair = Pair(
            models,
            decode=small,
            prefill={**small, "num_blocks": rng.choice([26, 40, 64])},
            timeout_s=rng.choice([0.05, 0.2, 0.8]),
            wrap_prefill=lambda executor: Failing(executor, Random(seed), share),
        )
        self.asked: list[tuple[int, Request]] = []
        self.own: list[tuple[int, Request]] = []  # of the prefill engine
        self.aborted: set[str] = set()
        self.has_stopped = False

    def run(self) -> None:
        for _ in range(self.rng.randint(10, 25)):
            self.act(self.rng.random())
            time.sleep(self.rng.choice([0.0, 0.001, 0.004]))
        for ends in self.pair.ends:
            for end in ends:
                end.go_on()

    def act(self, draw: float) -> None:
        rng, pair = self.rng, self.pair
        number = rng.randrange(len(PROMPTS))
        ends = rng.choice(pair.ends[-1]) if pair.ends else None
        if draw < 0.55 and len(self.asked) < 10:
            self.asked.append((number, request(number, f"{len(self.asked)}-{number}")))
            pair.add(self.asked[-1][1])
        elif draw < 0.62 and len(self.own) < 2:
            self.own.append((number, request(number, f"own-{len(self.own)}-{number}")))
            pair.prefill_thread.add(self.own[-1][1])
        elif draw < 0.75 and self.asked:
            victim = rng.choice(self.asked)[1].request_id
            self.aborted.add(victim)
            pair.thread.abort(victim)
        elif draw < 0.85 and ends is not None:
            ends.lose("planted", half=rng.random() < 0.3)
        elif draw < 0.9 and ends is not None:
            ends.stop()
        elif draw < 0.95 and ends is not None:
            ends.delay_s = 0.002
            ends.go_on()
        elif ends is not None:
            ends.go_on()

    def judge(self, alone: dict[str, list]) -> None:
        pair = self.pair
        found = pair.wait([request for _, request in self.asked])
        for number, asked in self.asked:
            *tokens, reason, error = found[asked.request_id]
            assert error is None
            if reason is FinishReason.ABORT:
                assert asked.request_id in self.aborted
                assert tokens == alone[f"{number}"][: len(tokens)]
            else:
                assert tokens == alone[f"{number}"]
        names = [one.request_id for _, one in self.own]
        pair.prefill_told.wait_for(lambda: set(names) <= pair.prefill_told.ended)
        for number, own in self.own:
            if pair.prefill_told.answer(own.request_id)[-1] is None:  # no planted failure
                assert pair.prefill_told.answer(own.request_id)[:-2] == alone[f"{number}"]
        pair.check()


@pytest.mark.parametrize(
    "first",
    [0, 10, *[pytest.param(n, marks=pytest.mark.oracle) for n in range(20, NUM_CASES, 10)]],
)
def test_random_faults(models, alone, first, caplog) -> None:
    caplog.set_level(logging.CRITICAL)  # planted failures fill a log
    num_imported = num_local = 0
    for seed in range(first, first + 10):
        case = Case(seed, models)
        try:
            case.run()
            case.judge(alone)
        finally:
            case.pair.close()
        num_imported += case.pair.decode.counts.num_imported
        num_local += sum(case.pair.decode.counts.local.values())
    assert num_imported > 3
    assert num_local > 3
