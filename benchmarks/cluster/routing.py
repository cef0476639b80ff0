"""Four policies over four workers on Mooncake's conversations: real and simulated.

    python benchmarks/cluster/routing.py --trace mooncake_conversation.jsonl

Prompts are scaled to a small model, arrivals drawn at a rate (the trace's own come in bursts of
3 s). The workers are processes with one thread each; the simulator has the very functions that
route, the workers' own scheduler configuration, and prices that were learned from four workers
with other requests of the trace. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any, get_args

from duetto import __version__
from duetto.cluster.address import read_address
from duetto.cluster.child_workers import WorkerChild, worker_command
from duetto.cluster.doorway import Doorway
from duetto.cluster.events.subscriber import EventSubscriber
from duetto.cluster.members import RemoteMembers
from duetto.cluster.router import RoutedEngine
from duetto.cluster.wire import Wire
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.demo import demo_model_dir
from duetto.engine.engine import StepReport
from duetto.measure.traces import TraceFit
from duetto.pricing.learned import LearnedStepTime
from duetto.routing.policies import RouterName, make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.routing.prefix_index import PrefixIndex
from duetto.simulation.replica import ReplicaSpec
from duetto.simulation.simulation import Fleet, simulate
from duetto.simulation.workload import Traffic, read_trace, timed

SCALE = 1 / 32
BLOCK = 16  # tokens; of the trace's blocks of 512
_WORDS = 900  # of the model's vocabulary that prompts are made of
_FLAGS = [
    *("--block-size", str(BLOCK), "--threads", "1", "--max-num-seqs", "16"),
    *("--max-model-len", "2048", "--log-level", "error"),
]


_CONFIG = SchedulerConfig(num_blocks=1024, max_model_len=2048, block_size=BLOCK)  # for prices


class Client:
    """Sends a workload at its times, and takes what is reported."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.first: dict[str, float] = {}
        self.cached: dict[str, int] = {}
        self.errors: list[str] = []
        self._num_live = 0
        self.records: list[Any] = []

    def deliver(self, report: StepReport) -> None:
        now = time.monotonic()
        with self._changed:
            for update in report.updates:
                if update.tokens:
                    self.first.setdefault(update.request_id, now)
                if update.finish_reason is not None:
                    self.cached[update.request_id] = update.num_cached_tokens
                    if update.error:
                        self.errors.append(update.error)
                    self._num_live -= 1
                    self._changed.notify_all()

    def run(self, router: RoutedEngine, requests: Sequence[Request]) -> None:
        """Sets the arrivals, to when they are sent."""
        start = time.monotonic()
        for request in requests:
            time.sleep(max(0.0, start + request.arrival_time - time.monotonic()))
            request.arrival_time = time.monotonic()
            with self._changed:
                self._num_live += 1
            router.add(request)
        self._wait()

    def _wait(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._num_live, 120.0):
                raise SystemExit("requests do not end")


class Workers:
    """A router, and workers that are processes, with empty caches."""

    def __init__(self, num: int, policy: RouterName, times: LearnedStepTime, kv_bytes: int) -> None:
        self.client, self.records = Client(), []
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            index = PrefixIndex()
            follower = EventSubscriber(index)
            stack.callback(follower.close)
            prices = WaitPrices(times.step_time, _CONFIG)
            self.router = RoutedEngine(
                make_policy(policy, prices),
                self.client.deliver,
                index=index,
                observe=self.records.append,
            )
            self.members = RemoteMembers(lambda _facts: self.router, follower=follower)
            wire = Wire()
            stack.callback(wire.stop)
            door = read_address(f"ipc://{folder}/door", "--listen", listens=True)
            Doorway(wire, self.members, __version__, "routing").listen(wire.bind(door, "--listen"))
            wire.start()
            command = worker_command(
                [
                    *(str(demo_model_dir()), "--join", f"ipc://{folder}/door", *_FLAGS),
                    *("--kv-cache-memory-bytes", str(kv_bytes)),
                ]
            )("both")
            for _ in range(num):
                child = WorkerChild(command)
                stack.callback(child.end, 0.0)
            if not self.members.wait(lambda: len(self.router.workers) == num, 120.0):
                raise SystemExit("the workers did not come")
            self._stack = stack.pop_all()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def config(self) -> SchedulerConfig:
        facts = self.members.facts
        assert facts is not None
        return facts.scheduler


def in_words(workload: Traffic, index: int) -> Request:
    """A request of the trace in the model's vocabulary: what says which block it is takes three
    tokens of it."""
    request = workload.request(index)
    tokens: list[int] = []
    for start in range(0, request.num_prompt_tokens, BLOCK):
        first = request.prompt_token_ids[start]
        number = first % 2**31 + (first >= 2**40)
        words = [number % _WORDS, number // _WORDS % _WORDS, number // _WORDS**2 % _WORDS]
        tokens += [3 + word for word in (*words, *[0] * (BLOCK - 3))]
    ids = tuple(tokens[: request.num_prompt_tokens])
    return replace(request, prompt_token_ids=ids)


def learned(aside: Traffic, options: Any) -> LearnedStepTime:
    """What steps take beside other workers on these cores, from requests that are not asked
    again."""
    times = LearnedStepTime()
    count = len(aside.arrivals)
    aside = aside.at(timed(count, options.rate, burstiness=1.0, seed=options.seed + 1))
    with Workers(options.workers, "round-robin", times, options.kv_bytes) as workers:
        requests = [in_words(aside, i) for i in range(count)]
        workers.client.run(workers.router, requests)
        for record in workers.records:
            times.observe(record.shape, record.end_time - record.start_time)
    return times


def real(policy: RouterName, workload: Traffic, times: LearnedStepTime, options: Any) -> dict:
    with Workers(options.workers, policy, times, options.kv_bytes) as workers:
        requests = [in_words(workload, i) for i in range(len(workload.arrivals))]
        workers.client.run(workers.router, requests)
        client = workers.client
        if client.errors:
            raise SystemExit(f"a request failed: {client.errors[0]}")
        ttfts = [client.first[r.request_id] - r.arrival_time for r in requests]
        cached = sum(client.cached.values())
        busy = sum(r.end_time - r.start_time for r in workers.records)
        return _told(ttfts, cached, requests) | {"busy_s": round(busy, 2)}


def simulated(
    policy: RouterName, workload: Traffic, times: LearnedStepTime, config: SchedulerConfig, num: int
) -> dict:
    spec = ReplicaSpec(scheduler=config, step_time=times.step_time)
    fleet = Fleet(replica=spec, num_replicas=num, router=policy)
    served = simulate(workload, fleet).served
    requests = [workload.request(i) for i in range(len(served))]
    ttfts = [
        one.timings.token_times[0] - request.arrival_time
        for one, request in zip(served, requests, strict=True)
    ]
    return _told(ttfts, sum(one.num_cached_tokens for one in served), requests)


def _told(ttfts: Sequence[float], cached: int, requests: Sequence[Request]) -> dict:
    ms = [1000 * ttft for ttft in ttfts]
    return {
        "hit_rate": round(cached / sum(r.num_prompt_tokens for r in requests), 4),
        "ttft_mean_ms": round(mean(ms), 2),
        "ttft_p50_ms": round(median(ms), 2),
        "ttft_p90_ms": round(quantiles(ms, n=10)[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--num", type=int, default=400)
    parser.add_argument("--rate", type=float, default=12.0, help="requests/s")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kv-bytes", type=int, default=24 << 20, help="of each worker")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    fit = TraceFit(SCALE, 1900, 100)
    whole = read_trace(options.trace, num_requests=options.num + 150, fit=fit)
    assert whole.hash_block == BLOCK
    aside = replace(whole, arrivals=whole.arrivals[options.num :])
    workload = whole.first(options.num)
    workload = workload.at(timed(options.num, options.rate, burstiness=1.0, seed=options.seed))
    times = learned(aside, options)
    said: dict[str, Any] = {}
    for policy in get_args(RouterName):
        with Workers(1, policy, times, options.kv_bytes) as one:
            config = one.config
        said[policy] = {
            "real": real(policy, workload, times, options),
            "simulated": simulated(policy, workload, times, config, options.workers),
        }
        print(policy, said[policy], file=sys.stderr)
    for figures in said.values():
        figures["ttft_mean_off"] = round(
            figures["simulated"]["ttft_mean_ms"] / figures["real"]["ttft_mean_ms"] - 1, 3
        )
    print(
        json.dumps(
            {"workers": options.workers, "rate": options.rate, "blocks": config.num_blocks, **said}
        )
    )


if __name__ == "__main__":
    main()
