"""Layouts within a few steps of what there is, and the best of them by a forecast of each.

Knows no history: whether now is the time is decided in watch.py.
"""

from collections.abc import Callable
from itertools import product

from duetto.planner.forecast import Forecast, RoleCounts
from duetto.planner.watch_options import WatchOptions

Judge = Callable[[RoleCounts], Forecast]
Tried = tuple[Forecast, ...]


def near(current: RoleCounts, size: int, options: WatchOptions) -> list[RoleCounts]:
    """Layouts at just so many steps: a worker more or fewer, or one with another role."""
    found = []
    for replicas, prefill in product(range(-size, size + 1), repeat=2):
        is_exchange = replicas * prefill < 0
        steps = max(abs(replicas), abs(prefill)) if is_exchange else abs(replicas) + abs(prefill)
        counts = RoleCounts(current.replicas + replicas, current.prefill + prefill)
        if steps == size and _may_be(counts, options):
            found.append(counts)
    return found


def _may_be(counts: RoleCounts, options: WatchOptions) -> bool:
    return (
        counts.replicas >= options.min_replicas
        and counts.total <= options.max_workers
        and (counts.prefill == 0 or (options.disaggregate and counts.prefill > 0))
    )


def enough(
    here: Forecast, judge: Judge, options: WatchOptions, *, is_believed: bool
) -> tuple[Forecast | None, Tried]:
    """The fewest workers that reach the target, and nearest to what there is; without any, the best
    if it is clearly better. Larger steps are looked at only where smaller ones do not do. Where
    the forecast of what there is was wrong, `is_believed` is False and only more workers count."""
    current, tried = here.counts, list[Forecast]()
    fewest = current.total + (0 if is_believed else 1)
    for size in range(1, options.max_step + 1):
        tried += [judge(c) for c in near(current, size, options) if c.total >= fewest]
        good = [f for f in tried if f.within >= options.target]
        if good:
            return min(good, key=lambda f: (f.counts.total, -f.within)), tuple(tried)
    best = max(tried, key=lambda f: (round(f.within, 2), -f.ttft_p50_s), default=None)
    if best is None or best.refusal or not _is_better(best, here):
        return None, tuple(tried)
    return best, tuple(tried)


def cheaper(
    current: RoleCounts, judge: Judge, options: WatchOptions
) -> tuple[Forecast | None, Tried]:
    """One worker fewer, if that has the target and a margin."""
    steps = [c for c in near(current, 1, options) if c.total < current.total]
    tried = tuple([judge(counts) for counts in steps])
    least = min(1.0, options.target + options.margin)
    good = [f for f in tried if f.within >= least]
    return max(good, key=lambda f: f.within, default=None), tried


def _is_better(one: Forecast, other: Forecast) -> bool:
    """Clearly: in what is kept, or where nothing is, in how long it takes."""
    if one.within > other.within + 0.01:
        return True
    return one.within >= other.within - 0.01 and one.ttft_p50_s < 0.9 * other.ttft_p50_s
