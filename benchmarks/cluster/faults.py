"""Random kills, stops and cuts of a small cluster under load: what becomes of its requests?

    python benchmarks/cluster/faults.py --num 200 --seed 1

A router here, workers on hosts of their own (network.py; on loopback where there are none): some
that answer, one that computes prompts for them. While requests come, one fault after the other is
drawn from the seed: kill -9, SIGSTOP for a while, SIGTERM, a link that is cut, half-open, slow,
lossy or out of order. Whatever dies is started again. It is checked that

- every request ends once, and what is answered has the tokens of one engine that was left alone;
- what ends with an error does so within `--dead-after` and 2 s of the fault that caused it;
- in the end no worker holds a block, and the router's index agrees with what workers say they have.

The last line is JSON. The exit code is 1 if something was wrong.
"""

import argparse
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

from faults_load import PROBE, Asked, Load, Recorder
from network import FINE, Network, Weather, why_unavailable

from duetto import __version__
from duetto.build import build
from duetto.cluster.address import read_address
from duetto.cluster.doorway import Doorway
from duetto.cluster.events.subscriber import EventSubscriber
from duetto.cluster.members import RemoteMembers
from duetto.cluster.remote import RemoteEngine
from duetto.cluster.router import RoutedEngine
from duetto.cluster.secret import read_secret
from duetto.cluster.wire import Wire
from duetto.core.cache_control import CachedText, LookUp
from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.request import FinishReason, Request
from duetto.demo import demo_model_dir
from duetto.engine.engine import StepReport
from duetto.engine.thread import EngineThread
from duetto.routing.policies import make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.routing.prefix_index import PrefixIndex
from duetto.routing.prompt_blocks import prompt_hashes

ENGINE = EngineArgs(kv_cache_memory_bytes=12 << 20, max_num_seqs=8, max_num_batched_tokens=128)
ENGINE_FLAGS = [
    *("--kv-cache-memory-bytes", str(12 << 20), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "128", "--threads", "1"),
]
CONFIG = SchedulerConfig(num_blocks=256, max_model_len=1024)  # for prices alone
ROLES = ("decode", "decode", "prefill")  # of hosts 1, 2, 3
FAULTS = ("kill", "stop", "term", "cut", "half-open", "bad-weather", "cut-kv", "slow-kv")
LATE_S = 2.0  # after a loss was noticed
PATIENCE_S = 90.0  # for the last requests, and for workers to come back


class Fleet:
    """The workers' processes, each on a host."""

    def __init__(
        self, network: Network | None, door: str, secret: str, log: Path, dead_after_s: float
    ) -> None:
        self.network, self._door, self._dead = network, door, dead_after_s
        self._environment = {**os.environ, "DUETTO_CLUSTER_SECRET": secret}
        self._log = log
        self.processes = [self._start(place) for place in range(len(ROLES))]
        self.num_starts = len(ROLES)

    def _start(self, place: int) -> "subprocess.Popen[bytes]":
        address = self.network.address(place + 1) if self.network else "127.0.0.1"
        argv = [
            *(sys.executable, "-m", "duetto", "worker", str(demo_model_dir())),
            *("--join", self._door, "--role", ROLES[place], "--dead-after", str(self._dead)),
            *ENGINE_FLAGS,
            *("--log-level", "warning"),
        ]
        if ROLES[place] == "prefill":
            argv += ["--kv-link", f"tcp://{address}:*"]
        else:
            argv += ["--max-local-prefill", "64"]
        command = self.network.command(place + 1, argv) if self.network else argv
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def revive(self) -> None:
        for place, process in enumerate(self.processes):
            if process.poll() is not None:
                self.processes[place] = self._start(place)
                self.num_starts += 1

    def signal(self, place: int, number: int) -> None:
        if self.processes[place].poll() is None:
            self.processes[place].send_signal(number)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class Trouble:
    """Draws faults, and does them one after the other."""

    def __init__(self, seed: int, fleet: Fleet) -> None:
        self._random = random.Random(seed)
        self._fleet = fleet
        self.done: Counter[str] = Counter()
        self.times: list[tuple[float, str, int]] = []

    def next(self) -> None:
        kinds = FAULTS if self._fleet.network else FAULTS[:3]
        kind, place = self._random.choice(kinds), self._random.randrange(len(ROLES))
        self.times.append((time.monotonic(), kind, place))
        self.done[kind] += 1
        getattr(self, kind.replace("-", "_"))(place, self._random.uniform(0.2, 3.0))

    def kill(self, place: int, _seconds: float) -> None:
        self._fleet.signal(place, signal.SIGKILL)

    def stop(self, place: int, seconds: float) -> None:
        self._fleet.signal(place, signal.SIGSTOP)
        time.sleep(seconds)
        self._fleet.signal(place, signal.SIGCONT)

    def term(self, place: int, _seconds: float) -> None:
        self._fleet.signal(place, signal.SIGTERM)

    def cut(self, place: int, seconds: float) -> None:
        self._for(seconds, Weather(is_cut=True), (0, place + 1), (place + 1, 0))

    def half_open(self, place: int, seconds: float) -> None:
        self._for(seconds, Weather(is_cut=True), (place + 1, 0))

    def bad_weather(self, place: int, seconds: float) -> None:
        weather = Weather(loss=0.05, delay_s=0.01, jitter_s=0.03)
        self._for(seconds, weather, (0, place + 1), (place + 1, 0))

    def cut_kv(self, place: int, seconds: float) -> None:
        """Between workers alone: the router sees both."""
        place = place % 2 + 1
        self._for(seconds, Weather(is_cut=True), (3, place), *([(place, 3)] * (seconds > 1.5)))

    def slow_kv(self, place: int, seconds: float) -> None:
        place = place % 2 + 1
        self._for(seconds, Weather(delay_s=0.2, jitter_s=0.2, loss=0.02), (3, place), (place, 3))

    def _for(self, seconds: float, weather: Weather, *directions: tuple[int, int]) -> None:
        assert self._fleet.network is not None
        for direction in directions:
            self._fleet.network.set(weather, *direction)
        time.sleep(seconds)
        for direction in directions:
            self._fleet.network.set(FINE, *direction)


class Members(RemoteMembers):
    """Workers of the router, and how often one was lost."""

    num_lost = 0

    def lost(
        self, worker: RemoteEngine, reason: str, unbegun: tuple[Request, ...]
    ) -> tuple[Request, ...]:
        self.num_lost += 1
        return super().lost(worker, reason, unbegun)


def expected(asked: list[Asked]) -> dict[str, list[int]]:
    """The answers of one engine that nobody disturbs."""
    engine = build(demo_model_dir(), ENGINE).engine
    tokens: dict[str, list[int]] = defaultdict(list)
    left = threading.Semaphore(0)

    def deliver(report: StepReport) -> None:
        for update in report.updates:
            tokens[update.request_id] += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                left.release()

    thread = EngineThread(engine, deliver)
    thread.start()
    for one in asked:
        thread.add(_fresh(one.request))
    for _ in asked:
        left.acquire()
    thread.stop(10.0)
    return tokens


def _fresh(request: Request) -> Request:
    return Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        seed=request.seed,
    )


def problems_of(recorder: Recorder, trouble: Trouble) -> tuple[list[str], dict]:
    """What is wrong with the requests, and what came of them."""
    wrong: list[str] = []
    kinds: Counter[str] = Counter()
    latest_s = 0.0
    asked = list(recorder.asked.values())
    right = expected(asked)
    for one in asked:
        name = one.request.request_id
        if len(one.ends) != 1:
            wrong.append(f"{name} ended {len(one.ends)} times: {one.ends}")
            continue
        ended, reason, error = one.ends[0]
        kinds[reason] += 1
        whole = right[name]
        if reason in (FinishReason.STOP.value, FinishReason.LENGTH.value):
            if one.tokens != whole:
                wrong.append(f"{name}: other tokens than one engine gives")
        elif one.tokens != whole[: len(one.tokens)]:
            wrong.append(f"{name}: ended with {reason}, and its tokens are no beginning")
        if reason == FinishReason.ERROR.value:
            causes = [when for when, _, _ in trouble.times if when <= ended]
            waited = ended - max([one.time, *causes[-1:]])
            latest_s = max(latest_s, waited)
            if not error:
                wrong.append(f"{name}: an error that says nothing")
    return wrong, {"requests": len(asked), **kinds, "latest_error_s": round(latest_s, 2)}


def check_idle(
    router: RoutedEngine, index: PrefixIndex, recorder: Recorder, load: Load
) -> list[str]:
    """No block is held, and the index agrees with the pools."""
    wrong: list[str] = []
    samples = [one.request for one in list(recorder.asked.values())[-200:]]
    deadline = time.monotonic() + PATIENCE_S
    for count in itertools.count():
        for number in range(6):  # workers tell how they are with their steps
            load.ask(f"probe{count}-{number}", is_probe=True)
        recorder.wait_idle(PATIENCE_S)
        wrong = []
        for worker in router.workers:
            record = worker.last_record
            if record is not None:
                # As its step ends, a prompt's blocks are still being sent.
                sent = PROBE // worker.config.block_size if worker.role == "prefill" else 0
                held = record.num_blocks - record.num_free_blocks - sent
                if held > 0:
                    wrong.append(f"{worker.role} {worker.name[:8]} holds {held} blocks")
            for request in samples:
                hashes = tuple(prompt_hashes(request, worker.config))
                size = worker.config.block_size
                text = CachedText(len(hashes) * size, hashes)
                found = worker.handle.control(LookUp(text)).result(10.0)
                known = index.cached(hashes).get(worker.name, 0)
                there = found.num_cached // size
                if known != there:
                    wrong.append(f"{worker.role} {worker.name[:8]}: index {known}, pool {there}")
        if not wrong or time.monotonic() > deadline:
            return wrong
        time.sleep(1.0)
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=20, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dead-after", type=float, default=1.0, help="seconds of silence")
    parser.add_argument("--no-network", action="store_true", help="loopback: kills and stops only")
    options = parser.parse_args()
    why_not = "asked for" if options.no_network else why_unavailable()
    with ExitStack() as stack:
        network = None
        if why_not is None:
            network = stack.enter_context(Network(len(ROLES) + 1, options.seed))
        else:
            print(f"no network of hosts: {why_not}", file=sys.stderr)
        said = run(options, network, stack)
    print(json.dumps(said))
    return 1 if said["wrong"] else 0


def run(options: argparse.Namespace, network: Network | None, stack: ExitStack) -> dict:
    word = secrets.token_hex(16)
    os.environ["DUETTO_CLUSTER_SECRET"] = word
    secret = read_secret(None)
    recorder, index = Recorder(), PrefixIndex()
    follower = EventSubscriber(index, secret)
    stack.callback(follower.close)
    prices = WaitPrices(lambda shape: 0.001 * shape.num_tokens, CONFIG)
    policy = make_policy("predicted", prices)
    router = RoutedEngine(policy, recorder.deliver, index=index)
    members = Members(lambda _facts: router, follower=follower)
    wire = Wire(secret, options.dead_after)
    stack.callback(wire.stop)
    here = network.address(0) if network else "127.0.0.1"
    bound = wire.bind(read_address(f"tcp://{here}:*", "--listen", listens=True), "--listen")
    Doorway(wire, members, __version__, "faults").listen(bound)
    wire.start()
    log = Path(tempfile.mkdtemp(prefix="faults-")) / "workers.log"
    fleet = Fleet(network, str(bound.address), word, log, options.dead_after)
    stack.callback(fleet.stop)
    if not members.wait(lambda: len(router.workers) == len(ROLES), PATIENCE_S):
        raise SystemExit(f"workers did not come: {log.read_text()[-2000:]}")
    trouble, load = Trouble(options.seed, fleet), Load(options.seed, router, recorder)
    start = time.monotonic()
    load.start()
    for _ in range(options.num):
        trouble.next()
        fleet.revive()
        time.sleep(random.Random(str(trouble.times[-1][0])).uniform(0.1, 2.0))
        fleet.revive()
    if network:
        network.clear()
    load.stop()
    wrong = [] if recorder.wait_idle(PATIENCE_S) else ["some requests never end"]
    fleet.revive()

    def all_back() -> bool:
        fleet.revive()
        return len(router.workers) == len(ROLES)

    deadline = time.monotonic() + PATIENCE_S
    while not all_back() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not all_back():
        wrong.append(f"of {len(ROLES)} workers {len(router.workers)} came back")
    took_s = time.monotonic() - start
    wrong += check_idle(router, index, recorder, load)
    more, counts = problems_of(recorder, trouble)
    wrong += more
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    return {
        "seed": options.seed,
        "faults": dict(trouble.done),
        "has_network": network is not None,
        "worker_starts": fleet.num_starts,
        "workers_lost": members.num_lost,
        "took_s": round(took_s, 1),
        **counts,
        "aborts": load.num_aborted,
        "log": str(log),
        "wrong": len(wrong),
    }


if __name__ == "__main__":
    sys.exit(main())
