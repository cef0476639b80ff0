"""What a router of simulated replicas sees: what it sent, and what came back until now.

The policies are those of real routers (routing/).
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from duetto.core.request import Request
from duetto.routing.policies import RouterName, WorkerView, make_policy
from duetto.routing.predicted_wait import WaitPrices
from duetto.routing.prompt_blocks import prompt_hashes
from duetto.routing.sent_prefixes import SentPrefixes
from duetto.simulation.replica import ReplicaSpec


class SimulatedRouter:
    """Of replicas that are alike. What it is asked and told comes in the order of time."""

    def __init__(
        self,
        name: RouterName,
        spec: ReplicaSpec,
        num_replicas: int,
        run_until: Callable[[float], None],
    ) -> None:
        """`run_until` lets the replicas reach an instant."""
        places = spec.scheduler.max_num_seqs * spec.num_batches
        self._config = replace(spec.scheduler, max_num_seqs=places)
        self._policy = make_policy(name, WaitPrices(spec.planned_time, self._config))
        self._workers = [str(i) for i in range(num_replicas)]
        self._run_until = run_until
        self._prompt_tokens = [0] * num_replicas
        self._live: list[dict[str, tuple[Request, int]]]  # with the tokens that seemed cached
        self._live = [{} for _ in range(num_replicas)]
        self._ends: list[tuple[float, int, str]] = []  # instant, replica, request; a heap
        self._sent = SentPrefixes()

    def offer(
        self, request: Request, time: float, take: Callable[[int, Request, float], None]
    ) -> int:
        """Give a request that arrives at `time` to `take`, with the replica that it is for, which
        is returned. Raises what `take` raises: then nothing has been sent."""
        self._forget_ended(time)
        hashes: list[bytes] = []
        cached: Mapping[str, int] = {}
        chosen = 0
        if len(self._workers) > 1:
            if self._policy.looks_at_prefix:
                hashes = prompt_hashes(request, self._config)
                cached = self._sent.cached(hashes)
            size = self._config.block_size
            counts = [cached.get(worker, 0) * size for worker in self._workers]
            chosen = self._policy.choose(request, self._workers, lambda: self._views(time, counts))
        take(chosen, request, time)
        worker = self._workers[chosen]
        num_cached = cached.get(worker, 0) * self._config.block_size
        self._live[chosen][request.request_id] = (request, num_cached)
        self._prompt_tokens[chosen] += request.num_prompt_tokens
        if hashes:
            self._sent.sent(worker, hashes, self._config.num_blocks)
        return chosen

    def ended(self, request_id: str, replica: int, time: float) -> None:
        """A request ends at an instant that the router may not have reached yet."""
        heappush(self._ends, (time, replica, request_id))

    def _views(self, time: float, cached: Sequence[int]) -> list[WorkerView]:
        self._run_until(time)
        self._forget_ended(time)
        return [self._view(i, time, cached[i]) for i in range(len(self._workers))]

    def _forget_ended(self, time: float) -> None:
        while self._ends and self._ends[0][0] <= time:
            _, replica, request_id = heappop(self._ends)
            request, _ = self._live[replica].pop(request_id)
            self._prompt_tokens[replica] -= request.num_prompt_tokens

    def _view(self, replica: int, time: float, cached_tokens: int) -> WorkerView:
        view = WorkerView(
            self._workers[replica], self._prompt_tokens[replica], cached_tokens=cached_tokens
        )
        if not self._policy.looks_at_prefix:
            return view  # nobody looks at the rest, which takes longer
        num_waiting = waiting = num_answers = context = 0
        for request, num_cached in self._live[replica].values():
            num_prompt, times = request.num_prompt_tokens, request.timings.token_times
            num_tokens = bisect_right(times, time)
            if num_tokens:
                num_answers += 1
                context += num_prompt + num_tokens
            else:
                num_waiting += 1
                waiting += num_prompt - max(num_cached, request.num_imported_tokens)
        return view._replace(
            num_waiting=num_waiting,
            waiting_tokens=waiting,
            num_answers=num_answers,
            context_tokens=context,
        )
