"""Watches windows of a running cluster and decides how many workers of which role there should be.

A pure controller: time comes with the windows, the model of the cluster is the simulator's. It adds
workers fast and takes them away slowly, a step of bounded size at a time, and explains each
decision. Knows no servers and starts nothing.
"""

from collections import deque
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from duetto.measure.metrics import SLO
from duetto.planner.decision import Decision, describe_window
from duetto.planner.forecast import Forecast, Forecaster, RoleCounts
from duetto.planner.neighbours import cheaper, enough
from duetto.planner.observed import Window
from duetto.planner.resampled import MeasuredLoad
from duetto.planner.watch_options import WatchOptions

Direction = Literal["more", "other", "fewer"]
_LEAST_RATE = 1e-3  # requests/s of a cluster that nobody asks
_GAIN = 0.5  # of what a window says about prices, how much is believed
_MOST_SLOWDOWN = 5.0
_MOST_PATIENCE = 8.0


@dataclass(slots=True)
class _Memory:
    """What a controller keeps from window to window."""

    rates: deque[float]
    load: MeasuredLoad | None = None  # the last whose lengths were known
    current: RoleCounts | None = None
    changed_s: float = -inf
    changed_to: Direction | None = None
    asked: Direction | None = None  # by the last windows, ...
    num_asked: int = 0  # ... so many in a row
    num_missed: int = 0  # windows in a row that missed the target, whatever the model said
    slowdown: float = 1.0
    patience: float = 1.0  # times `dwell_fewer`


@dataclass(slots=True)
class Watcher:
    """Decides after each window. `model` says what layouts would give; of `limits` TTFT and TPOT
    count."""

    options: WatchOptions
    limits: SLO
    model: Forecaster
    _memory: _Memory = field(init=False)

    def __post_init__(self) -> None:
        self._memory = _Memory(deque(maxlen=self.options.agree_fewer))

    @property
    def slowdown(self) -> float:
        """How many times their price steps take, as learned so far."""
        return self._memory.slowdown

    def decide(self, window: Window, current: RoleCounts, *, live: int | None = None) -> Decision:
        """`current` is what there is to be now: what was decided before, if it was done; `live` is
        how many of them answer, if that is known. Windows come in order of time, and the same ones
        give the same decisions."""
        memory = self._memory
        look = _Look(window, current, live)
        look.seen = describe_window(window, self.limits)
        is_settled = self._note_change(window, current)
        memory.rates.append(window.rate)
        if window.num_finished >= self.options.min_requests and window.load().has_lengths:
            memory.load = window.load()
        elif memory.load is None or (window.num_waiting and not window.num_finished):
            return self._stay(
                look,
                f"{window.num_finished:.0f} requests ended in this window, and of fewer than "
                f"{self.options.min_requests} nothing is known",
            )
        if is_settled:
            look.learned = self._learn(window, current)
        return self._choose(look, memory.load)

    def _note_change(self, window: Window, current: RoleCounts) -> bool:
        """Whether nothing changed within the window, or just before it."""
        memory, start = self._memory, window.end_s - window.duration_s
        before = memory.current
        if before is not None and before != current:
            memory.changed_s = max(memory.changed_s, start)
            memory.changed_to = _direction(before, current)
            memory.asked, memory.num_asked, memory.num_missed = None, 0, 0
        memory.current = current
        return memory.changed_s < start

    def _learn(self, window: Window, current: RoleCounts) -> str:
        """How slow steps are: the TPOT that was measured, by the one that the model expects. A
        cluster with more requests waiting than running teaches nothing: the window's load is not
        what its answers were computed beside."""
        memory, measured = self._memory, window.tpot.mean
        if measured is None or window.num_finished < self.options.min_requests:
            return ""
        if window.num_waiting > window.num_running:
            return ""
        expected = self.model.forecast(current, window.load(), memory.slowdown).tpot_mean_s
        if not expected:
            return ""
        ratio = min(2.0, max(0.5, measured / expected))
        slowdown = memory.slowdown * ratio**_GAIN
        memory.slowdown = min(_MOST_SLOWDOWN, max(1 / _MOST_SLOWDOWN, slowdown))
        return (
            f"learned: TPOT {measured * 1000:.1f} ms where {expected * 1000:.1f} were expected; "
            f"steps are now taken to last {memory.slowdown:.2f} times their price"
        )

    def _choose(self, look: "_Look", load: MeasuredLoad) -> Decision:
        """What waits is to be gone by the next window, so it counts as arriving in it."""
        options, memory, window = self.options, self._memory, look.window
        backlog = window.num_waiting / window.duration_s
        needed = load.at(max(_LEAST_RATE, options.headroom * window.rate + backlog))
        here = self._forecast(look.current, needed)
        look.forecasts = (here,)
        measured = window.within(self.limits)
        has_missed = measured is not None and measured < options.target
        memory.num_missed = memory.num_missed + 1 if has_missed else 0
        if here.within < options.target:
            reason = f"{here.within:.1%} expected here, {options.target:.1%} are wanted"
            return self._grow(look, here, needed, reason, is_believed=True)
        if has_missed and memory.num_missed > 1:
            reason = (
                f"{memory.num_missed} windows in a row missed the target, the last with "
                f"{measured:.1%}, whatever the model says"
            )
            return self._grow(look, here, needed, reason, is_believed=False)
        return self._shrink(look, here, load)

    def _grow(
        self, look: "_Look", here: Forecast, load: MeasuredLoad, reason: str, *, is_believed: bool
    ) -> Decision:
        found, tried = enough(
            here,
            lambda counts: self._forecast(counts, load),
            self.options,
            is_believed=is_believed,
        )
        look.forecasts = (here, *tried)
        if found is None:
            return self._stay(look, f"{reason}, but nothing within reach is better")
        return self._when(look, found, reason)

    def _shrink(self, look: "_Look", here: Forecast, load: MeasuredLoad) -> Decision:
        """At the highest rate of the last windows: one quiet window is no reason."""
        rates = self._memory.rates
        most = load.at(max(_LEAST_RATE, self.options.headroom * max(rates)))
        found, tried = cheaper(
            look.current, lambda counts: self._forecast(counts, most), self.options
        )
        look.forecasts = (here, *tried)
        if found is None:
            fewer = "fewer would not do" if tried else "there must not be fewer"
            return self._stay(look, f"{here.within:.1%} expected, and {fewer}")
        reason = (
            f"{found.within:.1%} expected of {found.counts} at the highest rate of the last "
            f"{len(rates)} windows"
        )
        return self._when(look, found, reason)

    def _forecast(self, counts: RoleCounts, load: MeasuredLoad) -> Forecast:
        return self.model.forecast(counts, load, self._memory.slowdown)

    def _when(self, look: "_Look", found: Forecast, reason: str) -> Decision:
        """Now, or not yet."""
        memory, wanted = self._memory, _direction(look.current, found.counts)
        memory.num_asked = memory.num_asked + 1 if memory.asked == wanted else 1
        memory.asked = wanted
        wait = self._why_wait(look, wanted)
        if wait:
            return self._decided(look, look.current, f"{reason}: {found.counts}, but {wait}")
        end_s = look.window.end_s
        self._weigh(end_s, wanted)
        memory.changed_s, memory.changed_to = end_s, wanted
        memory.asked, memory.num_asked, memory.num_missed = None, 0, 0
        return self._decided(look, found.counts, f"{reason}; {found.within:.1%} with this change")

    def _why_wait(self, look: "_Look", wanted: Direction) -> str:
        options, memory = self.options, self._memory
        is_fewer = wanted == "fewer"
        agreed = options.agree_fewer if is_fewer else options.agree_more
        if memory.num_asked < agreed:
            return f"{memory.num_asked} of {agreed} windows in a row say so"
        dwell = memory.patience * options.dwell_fewer if is_fewer else options.dwell_more
        past = look.window.end_s - memory.changed_s
        if past < dwell:
            return f"the last change was {past:.0f} s ago, and {dwell:.0f} s must pass"
        if is_fewer and look.live is not None and look.live < look.current.total:
            return f"only {look.live} of {look.current.total} workers answer"
        return ""

    def _weigh(self, now_s: float, wanted: Direction) -> None:
        """What was taken away and is needed again soon was taken away too early: be slower."""
        memory = self._memory
        soon = 3 * memory.patience * self.options.dwell_fewer
        past = now_s - memory.changed_s
        if wanted != "fewer" and memory.changed_to == "fewer" and past < soon:
            memory.patience = min(_MOST_PATIENCE, 2 * memory.patience)
        elif past > 2 * soon:
            memory.patience = max(1.0, memory.patience / 2)

    def _stay(self, look: "_Look", why: str) -> Decision:
        """Nothing is asked for, so what was asked before does not count as in a row."""
        self._memory.asked, self._memory.num_asked = None, 0
        return self._decided(look, look.current, why)

    def _decided(self, look: "_Look", target: RoleCounts, why: str) -> Decision:
        return Decision(
            time_s=look.window.end_s,
            action="stay" if target == look.current else "change",
            current=look.current,
            target=target,
            seen=look.seen,
            why=why,
            learned=look.learned,
            forecasts=look.forecasts,
            slowdown=self._memory.slowdown,
        )


@dataclass(slots=True)
class _Look:
    """One window under way to a decision, and what is to be told of it."""

    window: Window
    current: RoleCounts
    live: int | None
    seen: str = ""
    learned: str = ""
    forecasts: tuple[Forecast, ...] = ()


def _direction(before: RoleCounts, after: RoleCounts) -> Direction:
    if after.total == before.total:
        return "other"
    return "more" if after.total > before.total else "fewer"
