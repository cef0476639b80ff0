"""The same rules as the walk's, chosen by Hypothesis, which shrinks what it finds.

Swarm testing (Groce et al., ISSTA 2012): each example leaves out some rules, so that long runs of
the others occur.
"""

from fakes import make_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from scheduler.driver import FAULTS, Driver, Fault
from scheduler.guesses import Guesses

from duetto.core.config import SchedulerConfig
from duetto.core.request import fan_out

RULES = ("abort", "stop", "preempt", "fail", "forget")
PREFIXES = ((), (1,) * 5, (1,) * 9, (1, 2, 1, 2, 1, 2))
tails = st.lists(st.integers(1, 2), min_size=1, max_size=5).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    chunked = draw(st.booleans())
    block_size = draw(st.integers(1, 4))
    return SchedulerConfig(
        num_blocks=draw(st.integers(2, 30 // block_size)),
        max_model_len=20,
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 12) if chunked else st.integers(20, 24)),
        enable_chunked_prefill=chunked,
        enable_prefix_caching=draw(st.booleans()),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority", "static"])),
        max_preemptions=draw(st.integers(0, 4)),
        ageing_s=draw(st.sampled_from([1.0, 16.0])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Requests stay in the bundle when they have ended, so that the dead are asked for too."""

    ids = Bundle("ids")

    @initialize(
        config=configs(),
        enabled=st.sets(st.sampled_from(RULES)),
        depth=st.sampled_from([0, 0, 1, 2]),
        guesses=st.none() | st.integers(0, 99).map(Guesses),
        skill=st.sampled_from([0.0, 0.7, 1.0]),
    )
    def begin(
        self,
        config: SchedulerConfig,
        enabled: set[str],
        depth: int,
        guesses: Guesses | None,
        skill: float,
    ) -> None:
        self.driver = Driver(config, depth=depth, drafts=guesses)
        self.driver.executor.skill = skill
        self.enabled = enabled

    @rule(
        target=ids,
        prefix=st.sampled_from(PREFIXES),
        tail=tails,
        max_tokens=st.integers(1, 16),
        salt=st.sampled_from([b"", b"", b"a"]),
        tenant=st.sampled_from([b"", b"", b"x", b"y"]),
        priority=st.integers(0, 3),
        n=st.sampled_from([1, 1, 2, 4]),
        stops=st.booleans(),
        scored=st.sampled_from([None, None, 0, 3]),
        min_tokens=st.integers(0, 4),
        dead_end=st.sampled_from([None, None, None, 0, 1, 3]),
    )
    def add(
        self,
        prefix: tuple[int, ...],
        tail: tuple[int, ...],
        max_tokens: int,
        salt: bytes,
        tenant: bytes,
        priority: int,
        n: int,
        stops: bool,
        scored: int | None,
        min_tokens: int,
        dead_end: int | None,
    ) -> object:
        request = make_request(
            f"r{self.driver.num_added}",
            prefix + tail,
            max_tokens,
            stop_token_ids=[1, 2] if stops else [],
            cache_salt=salt,
            tenant=tenant,
            priority=priority,
            n=n,
            prompt_logprobs=scored,
            min_tokens=min(min_tokens, max_tokens),
        )
        answers = fan_out(request)
        for answer in answers:
            self.driver.add(answer, dead_end)
        return multiple(*(answer.request_id for answer in answers))

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: "fail" in self.enabled)
    @rule(fault=st.sampled_from(FAULTS), victim=ids)
    def fail(self, fault: Fault, victim: str) -> None:
        self.driver.step(fault, victim)

    @precondition(lambda self: "abort" in self.enabled)
    @rule(request_id=ids | st.just("unknown"))
    def abort(self, request_id: str) -> None:
        self.driver.abort(request_id)

    @precondition(lambda self: "stop" in self.enabled)
    @rule(request_id=ids)
    def stop(self, request_id: str) -> None:
        self.driver.stop(request_id)

    @precondition(lambda self: "preempt" in self.enabled)
    @rule(request_id=ids)
    def preempt(self, request_id: str) -> None:
        self.driver.preempt(request_id)

    @precondition(lambda self: "forget" in self.enabled)
    @rule()
    def forget_all(self) -> None:
        self.driver.forget_all()

    @rule()
    def drain(self) -> None:
        self.driver.drain()

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.driver.check()
        self.driver.check_cache()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
