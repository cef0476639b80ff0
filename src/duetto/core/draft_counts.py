"""What drafts gave: to one request over its life, and in one step. Numbers only.

A draft counts as proposed when a step verifies it, and as accepted when its token is told: one
beyond a stop token is not. The last token that a step tells is the model's own (the bonus token)
and never counts as a draft, so a step with k accepted drafts saves k steps. Definitions for people:
docs/metrics.md.
"""

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

GRAMMAR = "grammar"  # the method of drafts that a grammar makes follow: nobody is asked for them


class DraftCount(NamedTuple):
    num_proposed: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """The part that was accepted; None where nothing was proposed."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None

    def plus(self, other: "DraftCount") -> "DraftCount":
        return DraftCount(
            self.num_proposed + other.num_proposed, self.num_accepted + other.num_accepted
        )


NO_DRAFTS = DraftCount()


class Chains(NamedTuple):
    """Chains of drafts that were verified, each of one request in one step."""

    num_chains: int = 0
    proposed: tuple[int, ...] = ()  # by place: how many chains had a draft there
    accepted: tuple[int, ...] = ()  # as long

    @classmethod
    def of(cls, num_proposed: int, num_accepted: int) -> "Chains":
        """One chain, of which the first drafts were accepted."""
        rejected = num_proposed - num_accepted
        return cls(1, (1,) * num_proposed, (1,) * num_accepted + (0,) * rejected)

    def plus(self, other: "Chains") -> "Chains":
        return Chains(
            self.num_chains + other.num_chains,
            _added(self.proposed, other.proposed),
            _added(self.accepted, other.accepted),
        )

    def taken_back(self, chain: "Chains", count: int) -> "Chains":
        """The same, where one of them, `chain`, has its last `count` accepted drafts no more."""
        end = sum(chain.accepted)
        gone = range(end - count, end)
        return self._replace(accepted=tuple([n - (i in gone) for i, n in enumerate(self.accepted)]))

    @property
    def total(self) -> DraftCount:
        return DraftCount(sum(self.proposed), sum(self.accepted))

    @property
    def mean_length(self) -> float | None:
        """Tokens that a chain gave on average, the bonus token among them: vLLM's mean acceptance
        length. None without chains."""
        return 1 + sum(self.accepted) / self.num_chains if self.num_chains else None


NO_CHAINS = Chains()


class StepDrafts(NamedTuple):
    """What one step did with drafts."""

    verified: Chains = NO_CHAINS  # of proposers: what they are counted by
    num_asked: int = 0  # requests for which it proposed drafts for the next step
    drafting_s: float = 0.0  # what that took
    verifying_s: float | None = None  # price of the step, minus that without drafts; None: no price
    of_grammars: Chains = NO_CHAINS  # and those that grammars made follow

    def taken_back(self, chain: Chains, count: int, *, of_grammar: bool = False) -> "StepDrafts":
        """The same, where one of its chains has `count` accepted drafts fewer."""
        if of_grammar:
            return self._replace(of_grammars=self.of_grammars.taken_back(chain, count))
        return self._replace(verified=self.verified.taken_back(chain, count))


NOTHING_DRAFTED = StepDrafts()


@dataclass(slots=True)
class Speculation:
    """What drafts gave one request. Written by the Scheduler only."""

    chains: Chains = NO_CHAINS
    by_method: dict[str, DraftCount] = field(default_factory=dict)
    num_asked: int = 0  # steps in which a proposer was asked for drafts ...
    num_made: int = 0  # ... and the drafts that came back, verified or not
    asked: str = ""  # the method asked last
    drafting_s: float = 0.0  # its share of what proposing took
    verifying_s: float | None = None  # its share of what drafts added to steps; None: no prices
    saved_s: float | None = None  # by how much it was done earlier, by the steps' prices
    last_chain: Chains = NO_CHAINS  # that was verified, ...
    last_method: str = ""  # ... whose it was ...
    _last_gain_s: float = 0.0  # ... and what each of its accepted drafts saved

    @property
    def total(self) -> DraftCount:
        return self.chains.total

    def add_chain(self, chain: Chains, method: str | None = None) -> None:
        """One more step verified drafts of a method, by default the one that was asked last."""
        method = self.asked if method is None else method
        self.chains = self.chains.plus(chain)
        self.by_method[method] = self.by_method.get(method, NO_DRAFTS).plus(chain.total)
        self.last_chain, self.last_method, self._last_gain_s = chain, method, 0.0

    def add_price(self, *, verifying: float, saved: float, gain: float = 0.0) -> None:
        """Seconds, by the prices of a step. `gain` is what each accepted draft of the last chain
        saved, which is in `saved`."""
        self.verifying_s = (self.verifying_s or 0.0) + verifying
        self.saved_s = (self.saved_s or 0.0) + saved
        self._last_gain_s = gain

    def take_back(self, count: int) -> None:
        """The last `count` tokens of the last chain's step are not told: text stopped before. The
        last one that is told is the bonus token now."""
        self.chains = self.chains.taken_back(self.last_chain, count)
        of_method = self.by_method[self.last_method]
        self.by_method[self.last_method] = of_method.plus(DraftCount(0, -count))
        self.last_chain = self.last_chain.taken_back(self.last_chain, count)
        if self.saved_s is not None:
            self.saved_s -= count * self._last_gain_s


def tokens_per_step(num_tokens: int, num_accepted: int) -> float | None:
    """Mean output tokens of the steps that gave any, bonus tokens among them: 1 without drafts.
    Each such step gives one token beside the drafts that it accepts."""
    num_steps = num_tokens - num_accepted
    return num_tokens / num_steps if num_steps > 0 else None


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([x + y for x, y in zip_longest(a, b, fillvalue=0)])
