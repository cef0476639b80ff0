"""Which prompts leave, what refuses them, and what the engine's thread does meanwhile."""

import logging
from random import Random

import numpy as np
import pytest
from disaggregation_world import ADDRESS, Pair
from fakes import make_request
from link_world import World, wait_until
from msgspec.structs import replace
from small_models import LLAMA, VOCAB, Kind, Model, make_model
from test_same_answer import answers

from duetto.cluster.disaggregation.counts import MovementAlarm, TransferCounts
from duetto.cluster.disaggregation.kv_frames import (
    AskPrefill,
    CancelPrefill,
    KVUnfit,
    PrefillAccepted,
    PrefillRefused,
    encode_kv_frame,
    read_from_prefill,
)
from duetto.cluster.disaggregation.prefill_choice import HereNow, PrefillChoice
from duetto.cluster.links.pair import link_pair
from duetto.core.kv_transfers import KVTransfers
from duetto.core.request import FinishReason, Request

PROMPT = np.random.default_rng(0).integers(0, VOCAB, 80).tolist()
IDLE = HereNow(0, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Model, Model]:
    kind = Kind(LLAMA, "cpu", "float32", None, "float32")
    first, second = (make_model(kind, tmp_path_factory.mktemp("model")) for _ in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone(models) -> list:
    (found,) = answers(models[0].engine(at_once=True), [asked("alone")]).values()
    return found


@pytest.fixture
def pairs(models):
    made: list[Pair] = []

    def make(**options) -> Pair:
        made.append(Pair(models, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def asked(name: str, prompt=PROMPT, **options) -> Request:
    return make_request(name, prompt, 6, **options)


# --- by price ------------------------------------------------------------------------------


def choice(**options) -> PrefillChoice:
    """A token takes 1 ms, and a block of 16 tokens a megabyte: as much, over a link of 1 GB/s."""
    return PrefillChoice(
        10**6, 16, 512, lambda shape: 1e-3 * shape.num_tokens, **{"least_timeout_s": 0.5} | options
    )


def test_an_idle_engine_computes_itself_and_one_that_answers_does_not() -> None:
    assert not choice().is_remote(1000, 0, IDLE)
    assert choice().is_remote(1000, 0, HereNow(1, 0))
    assert choice().is_remote(1000, 0, HereNow(0, 1000))  # another prompt is before it
    assert not choice().is_remote(1, 1000, HereNow(1, 0))  # the way there takes longer


def test_a_link_that_is_slow_keeps_prompts_at_home() -> None:
    one = choice()
    for _ in range(50):
        one.observe(10**6, 1.0)  # a megabyte a second
    assert not one.is_remote(1000, 0, HereNow(4, 0))
    assert one.timeout_s(1000, 0) == 60.0


def test_a_threshold_is_all_that_counts_where_it_is_given() -> None:
    one = choice(max_local_prefill=100)
    assert not one.is_remote(100, 10**6, HereNow(9, 9999))
    assert one.is_remote(101, 0, IDLE)


def test_a_transfer_may_take_a_few_times_what_was_predicted() -> None:
    assert choice().timeout_s(10, 0) == 0.5
    assert choice().timeout_s(1000, 0) == pytest.approx(4 * (1.05 + 0.002), rel=0.05)


# --- the decode side -----------------------------------------------------------------------


def test_what_scores_its_prompt_is_short_or_is_there_stays(pairs, alone) -> None:
    pair = pairs(max_local_prefill=20)
    pair.add(asked("scored", prompt_logprobs=0), asked("short", PROMPT[:15]))
    pair.wait([asked("scored"), asked("short")])
    assert pair.decode.counts.local == {"cached": 1, "price": 1}
    pair.add(asked("all"))
    assert pair.wait([asked("all")])["all"][:-2] == alone
    assert pair.decode.counts.local == {"cached": 2, "price": 1}
    pair.check()


def test_prompts_that_are_alike_come_once(pairs, alone) -> None:
    pair = pairs()
    alike = [asked(f"r{i}") for i in range(5)]
    pair.add(*alike)
    assert all(answer[:-2] == alone for answer in pair.wait(alike).values())
    assert pair.decode.counts.num_imported == 1
    pair.check()


def test_the_engine_sleeps_while_all_that_it_has_is_on_its_way(pairs, alone) -> None:
    pair = pairs()
    pair.add(asked("first", PROMPT[:20]))
    pair.wait([asked("first")])
    pair.ends[0][0].stop()  # what comes is not looked at
    pair.add(asked("r"))
    wait_until(lambda: pair.decode.num_on_their_way)
    assert not pair.decode.has_work
    assert pair.thread.has_work
    pair.ends[0][0].go_on()
    assert pair.wait([asked("r")])["r"][:-2] == alone
    timings = pair.told.updates["r"][-1].timings
    assert sum(timings.parts.values()) == pytest.approx(timings.e2e_s)
    pair.check()


def test_what_is_aborted_on_its_way_ends_at_once(pairs, alone) -> None:
    pair = pairs()
    pair.add(asked("first", PROMPT[:20]))
    pair.wait([asked("first")])
    pair.ends[0][0].stop()
    pair.add(asked("leader"), asked("follower"), asked("other"))
    wait_until(lambda: pair.decode.num_on_their_way == 3)
    for name in ("leader", "follower"):
        pair.thread.abort(name)
        assert pair.wait([asked(name)])[name] == [FinishReason.ABORT, None]
    pair.ends[0][0].go_on()
    assert pair.wait([asked("other")])["other"][:-2] == alone
    pair.check()


def test_who_is_slow_is_given_up(pairs, alone) -> None:
    pair = pairs(timeout_s=0.1)
    pair.add(asked("first", PROMPT[:20]))
    pair.wait([asked("first")])
    pair.ends[0][1].stop()  # the other engine reads nothing
    pair.add(asked("r"))
    assert pair.wait([asked("r")])["r"][:-2] == alone
    assert pair.decode.counts.local["slow"] >= 1
    pair.ends[0][1].go_on()
    pair.check()


def test_a_link_that_does_not_open_is_not_waited_for(pairs, alone) -> None:
    pair = pairs()
    pair.refuses = True
    pair.add(asked("r"))
    assert pair.wait([asked("r")])["r"][:-2] == alone
    assert pair.decode.counts.local == {"lost": 1}
    pair.add(asked("later", PROMPT[::-1]))
    pair.wait([asked("later")])
    assert pair.decode.counts.local == {"lost": 1, "no link": 1}


def test_another_engine_is_tried(models, pairs, alone) -> None:
    pair = pairs()
    opened = pair.decode._open_link
    tried = []

    def open_link(address, user):
        tried.append(address)
        if address == "dead":
            raise OSError("nobody answers")
        return opened(address, user)

    pair.decode._open_link = open_link
    request = asked("r")
    request.prefill_at = ("dead", ADDRESS)
    pair.thread.add(request)
    assert pair.wait([request])["r"][:-2] == alone
    assert tried == ["dead", ADDRESS]
    assert pair.decode.counts.num_imported == 1
    pair.check()


def test_no_room_here_is_no_wait(pairs, alone) -> None:
    pair = pairs(decode={"num_blocks": 16})  # half of them may be on their way, and it needs nine
    pair.add(asked("r"))
    assert pair.wait([asked("r")])["r"][:-2] == alone
    assert pair.decode.counts.local == {"no room": 1}
    pair.check()


# --- the prefill side ----------------------------------------------------------------------


class Stranger:
    """Somebody with a link to the prefill engine."""

    def __init__(self, pair: Pair) -> None:
        self.world = World()
        session = pair.prefill.session()
        self.link, self.other = link_pair(self.world, session)
        session.serve(self.other)
        self.hello = pair.decode._hello

    def say(self, *frames) -> None:
        for frame in frames:
            self.link.send(frame if isinstance(frame, bytes) else encode_kv_frame(frame))

    def heard(self, count: int) -> list:
        self.world.wait_for(lambda told: len(told) >= count)
        return [read_from_prefill(frame) for frame in self.world.frames()]


def ask(number: int, tokens=tuple(PROMPT[:16]), first: int = 0, count: int = 2) -> AskPrefill:
    return AskPrefill(number, tuple(tokens), b"", b"", 0, first, count, 30.0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (ask(1, PROMPT[:15]), "15 tokens are not the blocks"),
        (ask(1, first=1), "16 tokens are not the blocks"),
        (ask(1, [VOCAB] * 16), "outside the vocabulary"),
        (ask(1, [1] * 800, count=100), "transfers hold 0 blocks"),
        (ask(1, [1] * 192, count=24), "192"),  # with the token after it, beyond the context
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_numbers(pairs, wrong, told) -> None:
    pair = pairs()
    one = Stranger(pair)
    one.say(one.hello, wrong)
    refused = one.heard(2)[-1]
    if isinstance(refused, PrefillAccepted):
        refused = one.heard(3)[-1]
    assert isinstance(refused, PrefillRefused)
    assert told in refused.reason
    pair.check()


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xc1"],
        [ask(1)],  # who is it?
        ["hello", ask(2), ask(2)],
        ["hello", CancelPrefill(9)],
    ],
)
def test_who_breaks_the_rules_is_hung_up(pairs, frames, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    pair = pairs()
    one = Stranger(pair)
    one.say(*[one.hello if frame == "hello" else frame for frame in frames])
    one.world.wait_for(lambda told: any(isinstance(what, str) for what in told))
    pair.add(asked("r"))  # others are served
    assert pair.wait([asked("r")])["r"][-1] is None
    assert pair.decode.counts.num_imported == 1
    pair.check()


def test_random_frames_harm_nobody(pairs, alone, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    pair, rng = pairs(), Random(0)
    for _ in range(20):
        one = Stranger(pair)
        data = bytearray(encode_kv_frame(ask(1)))
        for _ in range(2):
            data[rng.randrange(len(data))] = rng.randrange(256)
        one.say(one.hello, bytes(data))
        one.link.close()
    pair.add(asked("r"))
    assert pair.wait([asked("r")])["r"][:-2] == alone
    pair.check()


def test_an_engine_of_another_kind_is_refused_with_both_values(pairs, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    pair = pairs()
    one = Stranger(pair)
    one.say(replace(one.hello, numerics="theirs"))
    (unfit,) = one.heard(1)[:1]
    assert isinstance(unfit, KVUnfit)
    assert "'theirs'" in unfit.reason and "'numerics'" in unfit.reason


# --- numbers -------------------------------------------------------------------------------


def test_counts_are_told_once() -> None:
    counts = TransferCounts()
    assert counts.since_told() is None
    counts.num_bytes_in = 5
    counts.note_local("price")
    assert counts.since_told() == KVTransfers(num_bytes_in=5, local=(("price", 1),))
    counts.note_local("price")
    counts.exposed_s += 0.5
    assert counts.since_told() == KVTransfers(exposed_s=0.5, local=(("price", 1),))
    assert counts.since_told() is None


def test_an_alarm_when_nothing_moves(caplog) -> None:
    counts = TransferCounts()
    alarm = MovementAlarm(counts, after_s=10.0)
    for now in (0.0, 9.0, 11.0, 12.0):
        alarm.asked(now)
    counts.num_bytes_in += 1
    alarm.asked(13.0)
    assert counts.num_alarms == 1
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "for 11 s" in told[0] and "again" in told[1]
    alarm.asked(22.0)
    alarm.asked(24.0)
    assert counts.num_alarms == 2
