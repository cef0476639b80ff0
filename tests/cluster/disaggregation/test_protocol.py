"""The protocol of a KV transfer: every state that two engines and a link can be in."""

from collections.abc import Callable
from contextlib import suppress
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cluster.disaggregation.model import Model, Wrong, explore

from duetto.cluster.disaggregation import protocol
from duetto.cluster.disaggregation.kv_frames import (
    AskPrefill,
    CancelPrefill,
    KVHello,
    KVUnfit,
    PrefillDone,
    encode_kv_frame,
    read_from_decode,
    read_from_prefill,
    why_unfit,
)
from duetto.cluster.frames import FrameError
from duetto.cluster.links.link import RowsSent

ENDS = {"home", "aborted", "published"}


LARGE = pytest.mark.oracle  # some hundred thousand states


@pytest.mark.parametrize(("has_losses", "gives_up"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("num_transfers", "num_layers", "pieces"),
    [
        (1, 1, (1,)),
        (1, 2, (1,)),
        (1, 1, (2, 1)),
        pytest.param(1, 2, (2, 1), marks=LARGE),
        pytest.param(2, 1, (1,), marks=LARGE),
        pytest.param(2, 1, (1, 1), marks=LARGE),
    ],
)
def test_all_states(num_transfers, num_layers, pieces, has_losses, gives_up) -> None:
    """Nobody writes or reads what was given back, and all ends, once."""
    sizes = num_transfers, num_layers, pieces
    num_states, ends = explore(Model(*sizes, has_losses=has_losses, gives_up=gives_up))
    assert num_states > 15
    # The link may be lost before anything was asked.
    assert ends - {""} == (ENDS if gives_up else ENDS - {"aborted"})


def test_all_states_of_a_second_try() -> None:
    """Frames and rows of the first come when the second is under way."""
    _, ends = explore(Model(2, 1, (1,), has_losses=False))
    assert ends == ENDS


def test_when_nothing_goes_wrong_all_arrives() -> None:
    _, ends = explore(Model(1, 2, (1, 2), calm=True))
    assert ends == {"published"}
    early = with_rule("on_computed", say_done_early)
    _, ends = explore(Model(1, 2, (1, 2), calm=True, rules=early))
    assert ends == {"published", "home"}


# --- what the exploration would find -------------------------------------------------------


def with_rule(name: str, rule: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{**vars(protocol), name: rule})


def free_at_once(kv: Any, reason: str) -> Any:
    """Without waiting for what is being written."""
    if not kv.is_open:
        return kv, ()
    actions = (protocol.Say(CancelPrefill(kv.transfer_id)), protocol.GiveUp(reason, "slow"))
    return kv._replace(phase="over"), (*actions, protocol.ReturnBlocks())


def write_always(kv: Any, rows: RowsSent) -> Any:
    return kv._replace(writing=kv.writing | {rows}), (), True


def believe(kv: Any, num_rows: int) -> Any:
    """Publish though rows are being written, or it was given up."""
    done = (protocol.Say(protocol.GotPrefill(kv.transfer_id)), protocol.PublishBlocks())
    return kv._replace(phase="over"), done


def say_done_early(kv: Any) -> Any:
    kv = kv._replace(is_computed=True)
    if kv.phase != "computing":
        return kv, ()
    return kv._replace(phase="sent"), (protocol.Say(PrefillDone(kv.transfer_id, kv.num_rows)),)


def free_while_reading(kv: Any) -> Any:
    if kv.phase == "over":
        return kv, ()
    return kv._replace(phase="over"), (protocol.AbortPrefill(), protocol.ReturnBlocks())


def ignore(kv: Any, *_: object) -> Any:
    return kv, ()


@pytest.mark.parametrize(
    ("name", "rule", "found"),
    [
        ("cancel", free_at_once, "while they are written"),
        ("on_rows", write_always, "given back"),
        ("on_done", believe, "given up"),
        ("on_cancel", free_while_reading, "while they are read"),
        ("on_cancel", ignore, "held|does not end"),
        ("on_got", ignore, "held|does not end"),
        ("on_outgoing_lost", ignore, "held|does not end"),
        ("on_incoming_lost", ignore, "held|does not end|never ends"),
        ("on_refused", ignore, "held|does not end|never ends"),
        ("on_failed", ignore, "held|does not end|never ends"),
    ],
)
def test_a_wrong_rule_is_found(name, rule, found) -> None:
    model = Model(1, 2, (1,), rules=with_rule(name, rule))
    model.has_losses = name.endswith("lost")
    model.gives_up = name not in ("on_refused", "on_failed")
    with pytest.raises(Wrong, match=found):
        explore(model)


# --- frames --------------------------------------------------------------------------------

ASK = AskPrefill(1, (1, 2, 3, 4), b"salt", b"tenant", 0, 0, 1, 2.5)
HELLO = KVHello(1, "1.0", "m", "n", "l", 16, 4096, 2)


@pytest.mark.parametrize("frame", [ASK, HELLO, CancelPrefill(7)])
def test_a_frame_comes_back(frame) -> None:
    assert read_from_decode(encode_kv_frame(frame)) == frame


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        encode_kv_frame(ASK)[:-1],
        encode_kv_frame(ASK) + b"\0",
        encode_kv_frame(KVUnfit("no")),  # says who answers, not who asks
        msgspec.msgpack.encode(["ask", 1, [1, -1], b"", b"", 0, 0, 1, 1.0]),
        msgspec.msgpack.encode(["ask", 1, [1], b"", b"", 0, 0, 0, 1.0]),
        msgspec.msgpack.encode(["ask", 1, [1], b"", b"", 0, 0, 1, float("nan")]),
        msgspec.msgpack.encode(["ask", 1, [], b"", b"", 0, 0, 1, 1.0]),
        msgspec.msgpack.encode(["ask", "1", [1], b"", b"", 0, 0, 1, 1.0]),
        msgspec.msgpack.encode(["cancel", 1, 2]),
        msgspec.msgpack.encode(["nothing", 1]),
        b"\x91" * 5000,
    ],
)
def test_what_is_no_frame_is_refused_in_a_line(data) -> None:
    with pytest.raises(FrameError) as error:
        read_from_decode(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400


def test_random_bytes_raise_nothing_else() -> None:
    rng = Random(0)
    frames = [encode_kv_frame(frame) for frame in (ASK, HELLO, CancelPrefill(7), KVUnfit("no"))]
    for _ in range(3000):
        data = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        for read in (read_from_decode, read_from_prefill):
            with suppress(FrameError):
                read(bytes(data))


def test_engines_that_differ_say_in_what() -> None:
    assert why_unfit(HELLO, HELLO) is None
    other = msgspec.structs.replace(HELLO, numerics="other")
    assert why_unfit(HELLO, other) == "another numerics: 'other', and here it is 'n'"
