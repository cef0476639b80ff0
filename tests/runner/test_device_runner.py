"""Steps in flight on a device that computes only when it is asked: the answers of no device.

Random loads run over the device of tests/fake_device.py and are compared, request by request, with
each request alone, at once, on the host. The planted faults at the end are each seen by that. The
axes of tests/test_same_answer*.py run over such a device too.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from fake_device import FakeDevice, FakeStarted
from fakes import make_request
from guessers import Eager
from small_models import BLOCK_SIZE, LLAMA, VOCAB, Kind, Model, make_model

from duetto.backends.backend import Backend, FloatArray, StepArrays
from duetto.core.batch import (
    PLACEHOLDER,
    SampledToken,
    SamplingInput,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
)
from duetto.core.config import SchedulerConfig
from duetto.core.errors import DeviceLost, EngineError
from duetto.core.executor import Pending
from duetto.core.request import FinishReason, Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.shape import BatchShape
from duetto.engine.engine import Engine
from duetto.runner import device_rows, verify
from duetto.runner.device_runner import DeviceRunner
from duetto.runner.placeholders import LastSteps
from duetto.scheduler.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from recorded_answers import RecordedAnswers

KIND = Kind(LLAMA, "cpu", "float32", None, "float32", is_device=True)
NUM_OUTPUT = 14
NAN_TOKEN = 0  # at position 0
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 12},
    {"temperature": 1.0, "min_p": 0.05, "top_p": 0.95, "top_k": 40},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.7, "logit_bias": {3: 2.0}},
    {"temperature": 1.0, "allowed_token_ids": tuple(range(60))},
    {"temperature": 1.0, "prompt_logprobs": 1},
    {"temperature": 1.0, "stop_token_ids": tuple(range(50, 101)), "min_tokens": 5},
    {"temperature": 1.0, "bad_word_ids": ((4,), (7, 9), (11, 12))},
)


class Spoiled:
    """A backend some of whose rows are NaN: a function of token and position, in any company."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, step: StepArrays, kv: Any) -> FloatArray:
        logits = self._backend.run(step, kv)
        tokens, places = step.token_ids[step.logit_rows], step.positions[step.logit_rows]
        logits[(tokens * 31 + places) % 97 == NAN_TOKEN] = np.nan
        return logits


class Outcome(NamedTuple):
    tokens: tuple[SampledToken, ...] = ()
    scores: tuple[Any, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    made = make_model(KIND, tmp_path_factory.mktemp("model"))
    return replace(made, backend=Spoiled(made.backend))


def requests() -> list[Request]:
    """Of every kind of sampling, two: one with a shared beginning."""
    rng, made = np.random.default_rng(0), list[Request]()
    shared = rng.integers(0, VOCAB, 30).tolist()
    for index in range(2 * len(SAMPLINGS)):
        prompt = rng.integers(0, VOCAB, (1, 9, 40, 17, 64)[index % 5]).tolist()
        prompt = shared + prompt[:20] if index % 2 else prompt
        sampling = SAMPLINGS[index // 2]
        # Seeds are multiples of three, or the model's engine would silence log-probabilities.
        made.append(make_request(f"r{index}", prompt, NUM_OUTPUT, seed=3 * index, **sampling))
    return made


@pytest.fixture(scope="module")
def alone(model) -> dict[str, Outcome]:
    found = {}
    for request in requests():
        found |= outcomes(model.engine(at_once=True, enable_prefix_caching=False), [request])
    reasons = [outcome.finish_reason for outcome in found.values()]
    assert {*reasons} == {FinishReason.LENGTH, FinishReason.STOP, FinishReason.ERROR}
    assert reasons.count(FinishReason.ERROR) < 9
    return found


def outcomes(
    engine: Engine,
    wanted: list[Request],
    *,
    together: int = 100,
    aborted: dict[int, str] | None = None,
) -> dict[str, Outcome]:
    """Of those that are not aborted. `together` new ones come a step; `aborted`, by its number."""
    found = {r.request_id: Outcome() for r in wanted}
    todo, gone = list(wanted), set[str]()
    for number in range(4000):
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        if not todo and not engine.has_work:
            break
        if aborted is not None and number in aborted and engine.abort(aborted[number]):
            gone.add(aborted[number])
        for update in engine.step().updates:
            assert update.request_id not in gone
            before = found[update.request_id]
            assert before.finish_reason is None, "an update after the final one"
            found[update.request_id] = Outcome(
                before.tokens + update.tokens,
                before.scores + update.prompt_logprobs,
                update.finish_reason,
                update.error,
            )
        engine.scheduler.check()
    assert not engine.has_work, "it never ends"
    return {name: outcome for name, outcome in found.items() if name not in gone}


class Load(NamedTuple):
    """Some requests in some engine over a device."""

    engine: Engine
    device: FakeDevice
    policy: Eager | None
    requests: list[Request]
    together: int
    aborted: dict[int, str]


def load(model: Model, alone: dict[str, Outcome], seed: int) -> Load:
    rng, devices = Random(seed), list[FakeDevice]()

    def with_faults(runner: DeviceRunner) -> DeviceRunner:
        devices.append(runner.backend)
        if rng.random() < 0.4:
            devices[0].fails = {rng.randint(2, 60) for _ in range(3)}
            devices[0].refuses = {rng.randint(2, 60) for _ in range(2)}
        return runner

    policy = Eager(["oracle"], seed=seed) if rng.random() < 0.5 else None
    texts = {
        r.request_id: [*r.prompt_token_ids, *[t.token_id for t in alone[r.request_id].tokens]]
        for r in requests()
    }
    engine = model.engine(
        executor=with_faults,
        depth=rng.choice((1, 1, 2)),
        proposers={"oracle": RecordedAnswers(texts, 0.8, VOCAB)},
        drafts=policy,
        num_blocks=rng.choice((26, 40, 128)),
        max_num_batched_tokens=rng.choice((13, 40, 192)),
        max_num_seqs=rng.choice((2, 5, 16)),
        enable_prefix_caching=rng.random() < 0.6,
        scheduling_policy=rng.choice(("fcfs", "fcfs", "static", "priority")),
    )
    wanted = requests()
    rng.shuffle(wanted)
    wanted = wanted[: rng.randint(3, len(wanted))]
    aborted = {rng.randint(1, 60): rng.choice(wanted).request_id for _ in range(rng.randint(0, 3))}
    return Load(engine, devices[0], policy, wanted, rng.randint(1, 8), aborted)


def found_in(given: Load) -> dict[str, Outcome]:
    return outcomes(given.engine, given.requests, together=given.together, aborted=given.aborted)


SEEDS = range(24)


@pytest.fixture(scope="module")
def ran(model, alone) -> Callable[[int], tuple[Load, dict[str, Outcome]]]:
    """A load that was run, and what it gave."""

    @cache
    def run(seed: int) -> tuple[Load, dict[str, Outcome]]:
        given = load(model, alone, seed)
        return given, found_in(given)

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_random_loads_have_the_answers_of_each_request_alone(ran, alone, seed):
    given, found = ran(seed)
    assert found == {name: alone[name] for name in found}
    runner = given.engine._computer._executor
    assert not runner._in_flight and not given.device._queue, "a step was never asked for"


def test_the_loads_try_everything(ran):
    """Else equality would say little."""
    loads = [ran(seed)[0] for seed in SEEDS]
    devices = [each.device for each in loads]
    assert sum(device.num_fed_back for device in devices) > 300
    assert sum(device.num_sampled for device in devices) > 1000
    assert max(device.most_waiting for device in devices) == 3
    assert sum(device.num_failed for device in devices) > 5
    policies = [each.policy for each in loads if each.policy is not None]
    assert sum(policy.num_accepted for policy in policies) > 20
    assert sum(policy.num_rejected for policy in policies) > 20
    assert sum(each.engine.scheduler.counts.num_preemptions for each in loads) > 5


# --- steps as they are ---------------------------------------------------------------------------


def runner_over(model: Model, depth: int = 1) -> tuple[DeviceRunner, FakeDevice]:
    device = FakeDevice(model.backend)
    return DeviceRunner(model.program, device, 64, BLOCK_SIZE, model.kv_dtype, depth=depth), device


def item(
    name: str, token_ids: list[int], start: int, first_block: int, **sampling: Any
) -> ScheduledRequest:
    """One that samples its next token, if `sampling` says how."""
    rows = ()
    if sampling:
        number = sampling.pop("number", 0)
        rows = (SamplingInput(SamplingParams(**sampling), 9, number),)
    blocks = tuple(range(first_block, first_block + 3))
    return ScheduledRequest(name, tuple(token_ids), start, blocks, rows)


def submitted(runner: DeviceRunner, *items: ScheduledRequest) -> Pending:
    return runner.submit(ScheduledBatch(items))


def deep_steps_are_right(model: Model) -> bool:
    """Of three steps, the last one goes on from the first; the second samples nothing, or others.
    Compared with the same steps, each asked for before the next one."""
    found = []
    for between in ({}, {"temperature": 1.0}, {"temperature": 1.0, "logprobs": 1}):
        for waits in (False, True):
            runner, _ = runner_over(model, 2)
            first = submitted(
                runner,
                item("b", [5, 6], 0, 10, temperature=1.0),
                item("a", [1, 2, 3], 0, 0, temperature=1.0),
            )
            if waits:
                first.result()
            second = submitted(runner, item("c", [4, 9], 0, 20, **between))
            if waits:
                second.result()
            third = submitted(runner, item("a", [PLACEHOLDER], 3, 0, temperature=1.0, number=1))
            found.append([each.result().results for each in (first, second, third)])
    return found[::2] == found[1::2] and len({each[2] for each in found}) == 1


def test_a_step_goes_on_from_one_that_is_not_the_last(model):
    assert deep_steps_are_right(model)


def test_a_request_that_fails_does_not_stop_the_step_behind_it(model):
    """Its sample is no token; the others' tokens are what they are without it."""
    runner, device = runner_over(model)
    items = [
        item("bad", [NAN_TOKEN], 0, 0, temperature=1.0),
        item("good", [1, 2, 3], 0, 10, temperature=1.0),
    ]
    behind = [
        item("bad", [PLACEHOLDER], 1, 0, temperature=1.0, number=1),
        item("good", [PLACEHOLDER], 3, 10, temperature=1.0, number=1),
    ]
    first, second = submitted(runner, *items), submitted(runner, *behind)
    assert len(device._queue) == 2
    bad, good = first.result().results
    assert bad.error == "the model's output for this request is not finite" and not bad.tokens
    expected, _ = runner_over(model)
    wanted = [submitted(expected, each).result().results[0] for each in (items[1], behind[1])]
    assert [good, second.result().results[1]] == wanted


def test_a_step_behind_one_that_failed_gives_nothing(model):
    runner, device = runner_over(model)
    device.fails = {1}
    pair = [item("a", [1, 2], 0, 0, temperature=1.0), item("b", [3], 0, 10, temperature=0)]
    first = submitted(runner, *pair)
    second = submitted(runner, item("a", [PLACEHOLDER], 2, 0, temperature=1.0, number=1))
    with pytest.raises(EngineError, match="behind one that failed"):
        second.result()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planted"):
            first.result()
    assert not device._queue and not runner._in_flight
    again = submitted(runner, *pair).result()
    assert again == submitted(runner_over(model)[0], *pair).result()


def test_a_step_that_needs_a_token_of_a_failed_one_is_not_started(model):
    """The host samples that token, so the failure is known before."""
    runner, device = runner_over(model)
    device.fails = {1}
    sampling = {"temperature": 1.0, "logprobs": 1}
    submitted(runner, item("a", [1, 2], 0, 0, **sampling), item("b", [3], 0, 10))
    with pytest.raises(EngineError, match="behind one that failed"):
        submitted(runner, item("a", [PLACEHOLDER], 2, 0, number=1, **sampling))
    assert device.num_started == 1


def test_steps_that_nobody_asks_for_do_not_pile_up(model):
    """An engine gives up a step whose submission raised, though it was on its way."""
    runner, device = runner_over(model)
    for number in range(5):
        step = submitted(runner, item("a", [1, 2, number], 0, 0, temperature=1.0))
        assert len(runner._in_flight) <= 2 and len(device._queue) <= 2
    wanted = submitted(runner_over(model)[0], item("a", [1, 2, 4], 0, 0, temperature=1.0))
    assert step.result() == wanted.result()


def test_a_lost_device_is_not_asked_again(model):
    """Neither is what stood behind it computed one by one."""

    class Lost(FakeDevice):
        def _run(self, *given: Any) -> None:
            raise DeviceLost("NVIDIA H100", "an illegal memory access was encountered")

    runner = DeviceRunner(model.program, Lost(model.backend), 64, BLOCK_SIZE, model.kv_dtype)
    engine = Engine(Scheduler(SchedulerConfig(max_model_len=64, num_blocks=64)), runner, depth=1)
    for name in "ab":
        engine.add(make_request(name, [1, 2, 3], 9))
    with pytest.raises(DeviceLost, match="the device NVIDIA H100 is lost, and the engine ends: an"):
        while engine.has_work:
            engine.step()
    assert runner.backend.num_started <= 2


def test_moves_are_told_with_the_step_that_they_hold_up(model, monkeypatch):
    """They are done while the step before is in flight, and are part of the time that it takes."""
    runner, _ = runner_over(model)
    times = iter([0.0, 0.25, 0.5, 0.0])
    monkeypatch.setattr(runner._parts, "move", lambda batch: next(times))
    first = submitted(runner, item("a", [1, 2], 0, 0, temperature=1.0))
    second = submitted(runner, item("b", [1, 2], 0, 10, temperature=1.0))
    only_moves = submitted(runner)
    assert first.result().moving_s == 0.75
    assert second.result().moving_s == 0.0
    fourth = submitted(runner, item("c", [1, 2], 0, 20, temperature=1.0))
    assert only_moves.result() == StepOutput(())
    assert fourth.result().moving_s == 0.0


# --- what a step takes ---------------------------------------------------------------------------


class Observed:
    """StepTimes that keeps what it is told."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def step_time(self, shape: BatchShape) -> float:
        return 1.0

    def has_measured(self, shape: BatchShape) -> bool:
        return True

    def observe(self, shape: BatchShape, seconds: float) -> None:
        self.seconds.append(seconds)


class SlowDevice(FakeDevice):
    """Each step takes the device as long; a host that waits lets the clock go on."""

    def __init__(self, backend: Backend, step_s: float) -> None:
        super().__init__(backend)
        self.now = self._free_at = 0.0
        self._step_s, self._ends = step_s, deque[float]()

    def start(self, *given: Any, **more: Any) -> FakeStarted:
        self._free_at = max(self._free_at, self.now) + self._step_s
        self._ends.append(self._free_at)
        return super().start(*given, **more)

    def run_next(self) -> None:
        self.now = max(self.now, self._ends.popleft())
        super().run_next()


@pytest.mark.parametrize(
    ("sampling", "step_s", "plan_s", "taken_s"),
    [
        ({}, 8.0, 1.0, 8.0),  # planning is hidden behind the device
        ({}, 2.0, 5.0, 5.0),  # the device waits for the host
        ({"logprobs": 1}, 8.0, 1.0, 8.0),  # each step starts when the one before has ended
    ],
)
def test_a_step_is_priced_at_what_it_adds(model, sampling, step_s, plan_s, taken_s):
    """The times of steps that follow one another add up to the time that passed, so each is what
    it added to it."""
    device, observed = SlowDevice(model.backend, step_s), Observed()
    runner = DeviceRunner(model.program, device, 64, BLOCK_SIZE, model.kv_dtype)
    scheduler = Scheduler(SchedulerConfig(max_model_len=64, num_blocks=64, block_size=BLOCK_SIZE))
    schedule = scheduler.schedule

    def slow_schedule(now: float) -> ScheduledBatch:
        device.now += plan_s
        return schedule(now)

    scheduler.schedule = slow_schedule
    engine = Engine(scheduler, runner, clock=lambda: device.now, step_times=observed, depth=1)
    for name in "abc":
        engine.add(make_request(name, [1, 2, 3], 12, temperature=0, **sampling))
    records = []
    while engine.has_work:
        record = engine.step().record
        if record is not None:
            records.append(record)
    assert len(records) == len(observed.seconds) == 12
    assert [record.end_time for record in records[:-1]] == [r.start_time for r in records[1:]]
    assert observed.seconds[1:-2] == [taken_s] * 9
    assert sum(observed.seconds) == device.now


# --- planted faults ------------------------------------------------------------------------------


def _next_row(patch) -> None:
    """Feedback is the row behind the right one."""
    row_of = DeviceRunner._row_on_device

    def shifted(self, source, request):
        row = row_of(self, source, request)
        return row if row is None else (row + 1) % source.running.logit_starts[-1]

    patch.setattr(DeviceRunner, "_row_on_device", shifted)


def _any_step(patch) -> None:
    """A row of a step whose samples the device has no more."""
    row_of = DeviceRunner._row_on_device

    def unchecked(self, source, request):
        sampled, self._sampled = self._sampled, source
        row = row_of(self, source, request)
        self._sampled = sampled
        return row

    patch.setattr(DeviceRunner, "_row_on_device", unchecked)


def _takes_what_the_host_samples(patch) -> None:
    """The device's own sample, in place of the one that the host makes of the same row."""
    row_of = DeviceRunner._row_on_device

    def hasty(self, source, request):
        running = source.running
        if running is not None and running.rows.sampling is not None:
            on_device = (True,) * len(running.rows.on_device)
            source.running = running._replace(rows=running.rows._replace(on_device=on_device))
        row = row_of(self, source, request)
        source.running = running
        return row

    patch.setattr(DeviceRunner, "_row_on_device", hasty)


def _does_not_wait(patch) -> None:
    """What the host knows is taken from the step before the right one."""
    settle = DeviceRunner._settle

    def lazy(self, step):
        if len(self._in_flight) > 1:
            settle(self, self._in_flight[-2])

    patch.setattr(
        DeviceRunner, "result", lambda self, step: (settle(self, step), _result(self, step))[1]
    )
    patch.setattr(DeviceRunner, "_settle", lazy)


_result = DeviceRunner.result


def _oldest_first(patch) -> None:
    """Of two tokens that are known of a request, the older one."""
    last = LastSteps._last_token

    def reversed_steps(self, request_id):
        self._steps.reverse()
        try:
            return last(self, request_id)
        finally:
            self._steps.reverse()

    patch.setattr(LastSteps, "_last_token", reversed_steps)


def _samples_all(patch) -> None:
    """Forbidden tokens are not looked at."""
    samples = device_rows.samples_on_device

    def unseen(request):
        rows = [row._replace(forbidden_token_ids=()) for row in request.rows]
        return samples(request._replace(rows=tuple(rows)))

    patch.setattr(device_rows, "samples_on_device", unseen)


def _accepts_all(patch) -> None:
    """All drafts, whatever was sampled."""
    checked = verify._verified

    def unseen(request, num_rows, sampled):
        if not request.num_drafts:
            return checked(request, num_rows, sampled)
        drafts = request.token_ids[-request.num_drafts :]
        return (*map(SampledToken, drafts), sampled(num_rows - 1))

    patch.setattr(verify, "_verified", unseen)


def _ends_at_what_is_not_finite(patch) -> None:
    """Drafts that are right are lost if a row after them gives no token."""
    patch.setattr(verify, "_verified", lambda _, n, sampled: tuple([sampled(i) for i in range(n)]))


def _one_key(patch) -> None:
    """All rows of a request have the place of its first in the random stream."""
    arrays = device_rows._sample_arrays

    def same(rows, width):
        first = {row.seed: row for row in reversed(rows) if row is not None}
        return arrays([row and first[row.seed] for row in rows], width)

    patch.setattr(device_rows, "_sample_arrays", same)


def _without(name: str, value: float) -> Callable[[Any], None]:
    def fault(patch) -> None:
        arrays = device_rows._sample_arrays

        def changed(rows, width):
            made = arrays(rows, width)
            return made._replace(**{name: np.full_like(getattr(made, name), value)})

        patch.setattr(device_rows, "_sample_arrays", changed)

    fault.__name__ = f"_without_{name}"
    return fault


def _forgets_samples(patch) -> None:
    """The device has no samples after a step that samples nothing."""
    run = FakeDevice._run

    def forgetful(self, started, queued):
        run(self, started, queued)
        if queued.sampling is None:
            self._samples = np.zeros_like(self._samples)

    patch.setattr(FakeDevice, "_run", forgetful)


def _kv_of_the_past(patch) -> None:
    """Steps run in another order than they were started."""

    def newest(self):
        self._queue.rotate(1)
        run(self)

    run = FakeDevice.run_next
    patch.setattr(FakeDevice, "run_next", newest)


FAULTS = (
    _next_row,
    _any_step,
    _takes_what_the_host_samples,
    _does_not_wait,
    _oldest_first,
    _samples_all,
    _accepts_all,
    _ends_at_what_is_not_finite,
    _one_key,
    _without("top_ks", 0),
    _without("top_ps", 1.0),
    _without("min_gaps", -np.inf),
    _forgets_samples,
    _kv_of_the_past,
)


def shows_itself(model: Model, alone: dict[str, Outcome]) -> bool:
    try:
        if not deep_steps_are_right(model):
            return True
        for seed in SEEDS:
            found = found_in(load(model, alone, seed))
            if found != {name: alone[name] for name in found}:
                return True
    except (AssertionError, IndexError):
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(model, alone, fault):
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        assert shows_itself(model, alone)
