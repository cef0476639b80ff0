"""Requests that share prefixes, drawn from a seed, and what came of each."""

import random
import threading
import time
from dataclasses import dataclass, field

from duetto.cluster.router import RoutedEngine
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import StepReport

PROBE = 96  # tokens of a prompt that nobody has


@dataclass
class Asked:
    """A request, and what came of it."""

    request: Request
    time: float
    tokens: list[int] = field(default_factory=list)
    ends: list[tuple[float, str, str]] = field(default_factory=list)  # when, why, error


class Recorder:
    """Takes what the router reports."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.asked: dict[str, Asked] = {}
        self.num_live = 0
        self.last_free: dict[int, tuple[int, int]] = {}  # by engine: free and all blocks

    def deliver(self, report: StepReport) -> None:
        with self.lock:
            for update in report.updates:
                one = self.asked[update.request_id]
                one.tokens += [token.token_id for token in update.tokens]
                if update.finish_reason is not None:
                    error = update.error or ""
                    one.ends.append((time.monotonic(), update.finish_reason.value, error))
                    self.num_live -= 1
                    self.lock.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        with self.lock:
            return self.lock.wait_for(lambda: self.num_live == 0, timeout_s)


class Load:
    """Requests that share prefixes, drawn from a seed; some are aborted."""

    def __init__(self, seed: int, router: RoutedEngine, recorder: Recorder) -> None:
        self._random = random.Random(seed)
        self._router, self._recorder = router, recorder
        self._prefixes = [
            [self._random.randrange(3, 250) for _ in range(self._random.randrange(40, 400))]
            for _ in range(6)
        ]
        self.num_aborted = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._is_over.wait(self._random.expovariate(8.0)):
            with self._recorder.lock:
                is_full = self._recorder.num_live >= 24
            if is_full:
                continue
            asked = self.ask(f"r{number}")
            number += 1
            if self._random.random() < 0.1:
                self.num_aborted += 1
                timer = threading.Timer(self._random.random(), self._router.abort, [asked])
                timer.daemon = True
                timer.start()

    def ask(self, name: str, *, is_probe: bool = False) -> str:
        prefix = self._random.choice(self._prefixes)
        if is_probe:  # nobody has it
            prefix = [self._random.randrange(3, 250) for _ in range(PROBE)]
        most = 16 if is_probe else 60
        own = [self._random.randrange(3, 250) for _ in range(self._random.randrange(1, most))]
        request = Request(
            request_id=name,
            prompt_token_ids=(*prefix, *own),
            sampling=SamplingParams(temperature=0.7),
            max_tokens=self._random.randrange(1, 24),
            seed=self._random.randrange(1 << 30),
            arrival_time=time.monotonic(),
        )
        with self._recorder.lock:
            self._recorder.asked[name] = Asked(request, time.monotonic())
            self._recorder.num_live += 1
        self._router.add(request)
        return name
