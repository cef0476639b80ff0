"""Which of several workers gets a request. The simulator's fleets and real routers call the same.

A policy sees of each worker what was sent there, what came back, and how much of this prompt is
cached there (WorkerView). Knows no sockets, no clocks, and no worker itself.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from duetto.core.errors import ConfigError
from duetto.core.request import Request
from duetto.routing.predicted_wait import WaitPrices
from duetto.scheduler.block_pool import BlockHash, next_hash, root_hash

RouterName = Literal["round-robin", "least-loaded", "prefix-affinity", "predicted"]

_BLOCK = 128  # tokens; what affinity knows of a prefix, it knows in steps of this size
_MAX_PREFIXES = 200_000  # that affinity remembers, 25 million tokens; about 40 MB
_OVERLOAD = 1.25  # times the mean load, at which affinity gives way
_LARGE = 8192  # tokens; ... unless the load is this small anyway


class WorkerView(NamedTuple):
    """What a router sees of one worker."""

    worker: str  # its name
    prompt_tokens: int = 0  # of the prompts of all requests there that have not ended
    num_waiting: int = 0  # of those requests, without any token of an answer so far ...
    waiting_tokens: int = 0  # ... and of their prompts, what is not cached there
    num_answers: int = 0  # the others, which are being answered ...
    context_tokens: int = 0  # ... and what of their prompts and answers is there
    cached_tokens: int = 0  # of this prompt


Views = Callable[[], Sequence[WorkerView]]


class RoutingPolicy(Protocol):
    """One router's. The workers are those that may be chosen now: at least one, in an order that
    stays, though some may come and go."""

    looks_at_prefix: bool  # it needs `cached_tokens`, which costs something

    def choose(self, request: Request, workers: Sequence[str], views: Views, /) -> int:
        """The place of a worker in `workers`. `views` are of them, in their order; they cost
        something, so they are asked for only if needed."""
        ...

    def left(self, worker: str, /) -> None:
        """It is no worker any more."""
        ...


class RoundRobin:
    """In turn."""

    looks_at_prefix = False

    def __init__(self) -> None:
        self._next = 0

    def choose(self, _request: Request, workers: Sequence[str], _views: Views, /) -> int:
        return self.turn(len(workers))

    def turn(self, num_workers: int) -> int:
        chosen = self._next % num_workers
        self._next = chosen + 1
        return chosen

    def left(self, _worker: str, /) -> None:
        pass


class LeastLoaded:
    """Where the fewest tokens are under way; ties go in turn, so that idle ones share."""

    looks_at_prefix = False

    def __init__(self) -> None:
        self._turn = RoundRobin()

    def choose(self, _request: Request, _workers: Sequence[str], views: Views, /) -> int:
        return self.least([view.prompt_tokens for view in views()])

    def least(self, loads: Sequence[float]) -> int:
        turn = self._turn.turn(len(loads))
        return min(range(len(loads)), key=lambda i: (loads[i], (i - turn) % len(loads)))

    def left(self, _worker: str, /) -> None:
        pass


class PrefixAffinity:
    """Where the longest beginning of the prompt was sent before, unless that worker is overloaded.

    Bounded as consistent hashing with bounded loads is (Mirrokni et al., SODA 2018): a worker with
    more than 1.25 times the mean load gets nothing for affinity's sake. Without a match, and for an
    overloaded one, the least loaded is chosen. What was not sent for longest is forgotten.
    """

    looks_at_prefix = False  # it looks at its own, of larger blocks

    def __init__(self, max_prefixes: int = _MAX_PREFIXES) -> None:
        self._others = LeastLoaded()
        self._max_prefixes = max_prefixes
        self._sent: OrderedDict[BlockHash, str] = OrderedDict()  # where it was sent last

    def __len__(self) -> int:
        return len(self._sent)

    def choose(self, request: Request, workers: Sequence[str], views: Views, /) -> int:
        hashes = _prefix_hashes(request)
        known = (self._sent[h] for h in reversed(hashes) if h in self._sent)
        home = next((worker for worker in known if worker in workers), None)
        loads = [view.prompt_tokens for view in views()]
        chosen = None if home is None else workers.index(home)
        if chosen is None or loads[chosen] > max(_LARGE, _OVERLOAD * sum(loads) / len(loads)):
            chosen = self._others.least(loads)
        for block_hash in reversed(hashes):  # so that a prefix outlives what goes on from it
            self._sent[block_hash] = workers[chosen]
            self._sent.move_to_end(block_hash)
        while len(self._sent) > self._max_prefixes:
            self._sent.popitem(last=False)
        return chosen

    def left(self, _worker: str, /) -> None:
        """What was sent there is overwritten once it is sent elsewhere, or forgotten in time."""


class Predicted:
    """Where the first token should come first: what waits there, and what of this prompt is not
    cached there, beside the answers there. Ties go in turn. A worker that has no place left for a
    request comes after those that have."""

    looks_at_prefix = True

    def __init__(self, prices: WaitPrices) -> None:
        self._prices = prices
        self._turn = RoundRobin()

    def choose(self, request: Request, _workers: Sequence[str], views: Views, /) -> int:
        known = views()
        turn = self._turn.turn(len(known))
        return min(
            range(len(known)),
            key=lambda i: (*self.predicted(request, known[i]), (i - turn) % len(known)),
        )

    def predicted(self, request: Request, view: WorkerView) -> tuple[bool, float]:
        """Whether it has no place left, and the seconds to the first token beside that."""
        prices = self._prices
        beside = (view.num_answers, view.context_tokens)
        waiting = max(1, view.num_waiting)
        # Of a prompt that waits, its middle is what a chunk stands behind on average.
        before_s = prices.seconds(view.waiting_tokens, view.waiting_tokens // waiting // 2, *beside)
        left = max(1, request.num_prompt_tokens - view.cached_tokens)
        past = request.num_prompt_tokens - left + left // 2
        own_s = prices.seconds(left, past, *beside)
        is_full = view.num_waiting + view.num_answers >= prices.max_num_seqs
        return is_full, before_s + own_s

    def left(self, _worker: str, /) -> None:
        pass


def make_policy(name: RouterName, prices: WaitPrices) -> RoutingPolicy:
    """Raises ConfigError for a name that there is not. `prices` are of a worker's steps."""
    match name:
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded()
        case "prefix-affinity":
            return PrefixAffinity()
        case "predicted":
            return Predicted(prices)
    accepted = ", ".join(get_args(RouterName))
    raise ConfigError(f"--router: {name!r} is not one of {accepted}")


def _prefix_hashes(request: Request) -> list[BlockHash]:
    """Of whole blocks of the prompt; no tenant's prefix is another's."""
    prompt, hashes = request.prompt_token_ids, []
    parent = root_hash(b"router", request.cache_salt)
    for start in range(0, len(prompt) - _BLOCK + 1, _BLOCK):
        parent = next_hash(parent, prompt[start : start + _BLOCK])
        hashes.append(parent)
    return hashes
