"""Frames: what goes out comes back equal, and what is no frame is a FrameError and nothing else."""

import tracemalloc
from dataclasses import fields
from random import Random

import msgspec
import pytest
from fakes import make_request

from duetto.cluster import frames
from duetto.cluster.control_frames import (
    FAILED,
    control_frame,
    error_in,
    message_in,
    reply_frame,
    reply_in,
)
from duetto.cluster.facts import PROTOCOL, WorkerFacts
from duetto.cluster.frames import (
    MAX_FRAME_BYTES,
    Abort,
    AddRequest,
    Bye,
    Control,
    ControlError,
    ControlReply,
    FrameError,
    Heartbeat,
    Hello,
    Knock,
    Leaving,
    NotTaken,
    Refused,
    ReportFrame,
    SentRequest,
    Stop,
    Welcome,
    add_frame,
    decode_frame,
    encoded,
    facts_in,
    hello,
    why_not_versions,
)
from duetto.cluster.report_frames import report_frames, report_in
from duetto.core.batch import RequestUpdate, SampledToken, StepRecord, TokenLogprob
from duetto.core.cache_control import (
    CacheCounts,
    CachedText,
    Drop,
    Dropped,
    Found,
    FoundRange,
    KeptBlocks,
    ListPins,
    LookUp,
    Pin,
    PinInfo,
    Pinned,
    PinNotFound,
    PinPage,
    PinQuotaExceeded,
    Unpin,
)
from duetto.core.cache_miss import CacheMiss, MissReason, SegmentHit
from duetto.core.config import SchedulerConfig
from duetto.core.draft_counts import Chains, Speculation, StepDrafts
from duetto.core.embeddings import PoolingParams
from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.core.reuse import Reuse, TokenRange
from duetto.core.reuse_count import ReuseCount
from duetto.core.shape import BatchShape, RequestShape
from duetto.core.structured import Grammar, ReasoningBudget, StructuredOutputsParams
from duetto.core.timings import Part, RequestTimings
from duetto.engine.engine import StepReport

FACTS = WorkerFacts(
    version="1",
    worker_id="w1",
    name="m",
    model="f",
    numerics="n",
    kv_layout="k",
    block_bytes=4096,
    scheduler=SchedulerConfig(num_blocks=8, max_model_len=64, cache_namespace=b"n"),
)
# What a caller says of a request: all that its constructor takes, but for what is not on the wire.
OF_THE_CALLER = [f.name for f in fields(Request) if f.init and f.name != "num_imported_tokens"]


def rich_request():
    return Request(
        request_id="chat-1",
        prompt_token_ids=(5, 2**31 - 1, 0, *range(40)),
        sampling=make_request(
            temperature=0.7,
            logit_bias={7: -1.5},
            stop=("END",),
            bad_words=("no",),
            allowed_token_ids=(1, 2),
            logprobs=3,
            prompt_logprobs=0,
            seed=-(2**63),
            structured_outputs=StructuredOutputsParams(json={"type": "object", "é": [1, None]}),
        ).sampling,
        max_tokens=9,
        seed=2**64 - 1,
        stop_token_ids=frozenset({1, 9}),
        bad_word_ids=((3,), (4, 5)),
        arrival_time=12.25,
        priority=-3,
        tenant=b"\x00t",
        cache_salt=b"salt",
        reuse=Reuse((TokenRange(2, 20), TokenRange(21, 40)), "query", ratio=0.1, num_rounds=2),
        why_not_reused="so",
        grammar=Grammar("start: x", "key", ReasoningBudget(3, "<t>", "</t>", True)),
        pooling=PoolingParams(dimensions=3),
        prefill_at=("tcp://10.0.0.1:5", "ipc:///x"),
    )


def rich_report():
    timings = RequestTimings(1.5)
    timings.first_scheduled_time, timings.finish_time = 2.0, 9.0
    timings.token_times = [3.0, 9.0]
    timings.accounted_until = 9.0
    timings.cache_miss = CacheMiss(MissReason.DIFFERS, 3, 4)
    timings.segment_hits = (SegmentHit(0, 4, 2, MissReason.EVICTED, None),)
    timings.speculation = Speculation()
    timings.speculation.add_chain(Chains.of(3, 2), "ngram")
    timings.reuse = ReuseCount("first:16", 1, 2, 3, 4, 5, None)
    timings.parts[Part.PROMPT] = 2.5
    scored = TokenLogprob(3, -0.5, 1, ((3, -0.5), (4, -1.5)))
    updates = (
        RequestUpdate("a", (SampledToken(3, scored), SampledToken(4)), (scored,), "té", 7),
        RequestUpdate("b", finish_reason=FinishReason.STOP, stop_reason="END", timings=timings),
        RequestUpdate("c", finish_reason=FinishReason.STOP, stop_reason=17, embedding=b"\x00\xff"),
        RequestUpdate("d", finish_reason=FinishReason.ERROR, error="why"),
    )
    shape = BatchShape((RequestShape(3, 4), RequestShape(1, 9, 2, True)))
    drafts = StepDrafts(Chains.of(2, 1), 3, 0.5, None, Chains.of(1, 1))
    record = StepRecord(
        *(1.0, 2.0, 4, 3, 2, 2, 1, 7, 8, 0, 5, 2, shape, ("a", "b"), 0.5, drafts),
        CacheCounts(1, 2, 3, 4, 5),
    )
    return StepReport(updates, record)


TEXT = CachedText(40, (b"h1", b"h2"))
INFO = PinInfo(3, 40, 2, 32, False, None, 5.0, 1.0)
MESSAGES = [
    LookUp(TEXT, (CachedText(3, (b"s",), is_segment=True),)),
    Pin(b"t", TEXT, 60.0, 35),
    Unpin(b"t", 3),
    Unpin(b"t", TEXT),
    Drop(b"t", TEXT),
    ListPins(b"t", 4, 5),
]
REPLIES = [
    Found(
        40, 32, 0, (FoundRange(0, 32, None), FoundRange(32, 40, 3, "ram")), (Found(3, 0, 3, ()),)
    ),
    Pinned(INFO, KeptBlocks(2, 8), CacheCounts(num_pinned_blocks=2)),
    Dropped(1, 2, 3, 4, True, CacheCounts(dropped=1)),
    PinPage((INFO,), True, KeptBlocks(2, 8)),
]
FRAMES = [
    Knock(1, "0.1", "door"),
    Hello(1, "0.1", "boot", 1.5, b"facts"),
    hello(FACTS, "boot", 1.5),
    Refused("why"),
    Welcome(),
    Heartbeat(1.5),
    Heartbeat(1.5, 0.5, 0.25),
    AddRequest(SentRequest.of(rich_request(), 3.0)),
    AddRequest(SentRequest.of(make_request(), 0.0)),
    Abort("a"),
    NotTaken("a", "why"),
    ReportFrame(*rich_report()),
    ReportFrame((), None),
    Control(7, "pin", b"x"),
    ControlReply(7, "found", b"x"),
    ControlError(7, "invalid", "f", "m"),
    Leaving(),
    Stop(),
    Bye("so"),
]


def test_every_kind_of_frame_is_here():
    assert {type(frame) for frame in FRAMES} == set(frames.Frame.__args__)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: type(f).__name__)
def test_what_goes_out_comes_back_equal(frame):
    again = decode_frame(encoded(frame))
    assert type(again) is type(frame)
    if isinstance(frame, ReportFrame):
        again, frame = report_in(again, 0.0), StepReport(frame.updates, frame.record)
    assert again == frame


@pytest.mark.parametrize("request_", [rich_request(), make_request()])
def test_a_request_comes_back_as_its_caller_made_it(request_):
    request_.num_computed_tokens = 7  # the scheduler's own, which stays at home
    frame = decode_frame(add_frame(request_, request_.arrival_time + 100.0))
    again = frame.request.request()
    assert again.arrival_time == request_.arrival_time + 100.0
    for name in OF_THE_CALLER:
        if name != "arrival_time":
            assert getattr(again, name) == getattr(request_, name), name
    assert again.num_computed_tokens == again.num_imported_tokens == 0
    assert again.token_ids == list(request_.prompt_token_ids)


def test_the_fields_of_a_request_on_the_wire_are_those_of_its_caller():
    assert set(SentRequest.__struct_fields__) == set(OF_THE_CALLER)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_control_messages(message):
    frame = decode_frame(control_frame(5, message))
    assert frame.number == 5 and message_in(frame) == message


@pytest.mark.parametrize("reply", REPLIES, ids=lambda m: type(m).__name__)
def test_control_replies(reply):
    frame = decode_frame(reply_frame(5, reply))
    assert frame.number == 5 and reply_in(frame) == reply


@pytest.mark.parametrize(
    "error",
    [
        PinNotFound(),
        PinQuotaExceeded("ttl_s", "too many"),
        InvalidRequest("f", "m"),
        EngineError("e"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_of_control_messages(error):
    again = error_in(decode_frame(reply_frame(5, error)))
    assert type(again) is type(error) and str(again) == str(error)


def test_an_unexpected_error_shows_nothing_of_the_inside():
    again = error_in(decode_frame(reply_frame(5, RuntimeError("/secret/path"))))
    assert type(again) is EngineError and str(again) == FAILED


def test_instants_are_told_on_the_receivers_clock():
    report = report_in(decode_frame(encoded(ReportFrame(*rich_report()))), clock_offset=100.0)
    timings = report.updates[1].timings
    assert timings.arrival_time == -98.5 and timings.token_times == [-97.0, -91.0]
    assert timings.first_scheduled_time == -98.0
    assert timings.finish_time == timings.accounted_until == -91.0
    assert timings.e2e_s == 7.5 and timings.parts[Part.PROMPT] == 2.5
    assert (report.record.start_time, report.record.end_time) == (-99.0, -98.0)


def test_facts_come_back_and_versions_are_compared_first():
    frame = decode_frame(encoded(hello(FACTS, "boot", 1.5)))
    assert facts_in(frame) == FACTS
    assert why_not_versions(PROTOCOL, "1", "1") is None
    assert (
        why_not_versions(PROTOCOL + 1, "1", "1")
        == f"another protocol: {PROTOCOL + 1}, and here it is {PROTOCOL}"
    )
    assert "0.2, and here it is 0.1" in why_not_versions(PROTOCOL, "0.2", "0.1")
    with pytest.raises(FrameError, match="no WorkerFacts"):
        facts_in(Hello(PROTOCOL, "1", "boot", 1.5, msgspec.msgpack.encode({"version": "1"})))
    with pytest.raises(FrameError, match="another version"):
        facts_in(Hello(PROTOCOL, "2", "boot", 1.5, frame.facts))
    bad = msgspec.msgpack.decode(frame.facts)
    bad["scheduler"]["block_size"] = -1
    with pytest.raises(FrameError, match="block-size"):  # a config is checked as at start-up
        facts_in(Hello(PROTOCOL, "1", "boot", 1.5, msgspec.msgpack.encode(bad)))


def joined(parts):
    """What reports say together of each request."""
    found = {}
    for part in parts:
        for update in part.updates:
            tokens, scores, text, finals = found.get(update.request_id, ((), (), "", ()))
            assert not finals, "nothing follows a final update"
            finals = () if update.finish_reason is None else (update.finish_reason,)
            found[update.request_id] = (
                tokens + update.tokens,
                scores + update.prompt_logprobs,
                text + update.text,
                finals,
            )
    return found


def test_a_report_that_is_too_large_is_sent_in_parts(monkeypatch):
    report = rich_report()
    scores = tuple(TokenLogprob(i, -0.5, 1, ((i, -0.5),)) for i in range(50))
    large = RequestUpdate(
        "big", (SampledToken(1), SampledToken(2)), scores, "text", 3, FinishReason.LENGTH
    )
    report = StepReport((large, *report.updates), report.record)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 900)
    sent = list(report_frames(report))
    assert len(sent) > 3 and all(len(data) <= 900 for data in sent)
    parts = [report_in(decode_frame(data), 0.0) for data in sent]
    assert joined(parts) == joined([report])
    assert [part.record for part in parts if part.record] == [report.record]


def test_what_is_too_large_is_told_with_both_numbers(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match=r"AddRequest of \d+ bytes cannot be sent; at most 100"):
        add_frame(rich_request(), 0.0)
    with pytest.raises(FrameError, match=r"a frame of 101 bytes; at most 100 are accepted"):
        decode_frame(b"x" * 101)


def changed_add(**changes):
    """An AddRequest of which fields are what no caller of ours writes."""
    kind, values = msgspec.msgpack.decode(add_frame(make_request(), 0.0))
    for name, value in changes.items():
        values[SentRequest.__struct_fields__.index(name)] = value
    return msgspec.msgpack.encode([kind, values])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_id": 7}, "Expected `str`"),
        ({"prompt_token_ids": [1.5]}, "Expected `int`"),
        ({"prompt_token_ids": ["1"]}, "Expected `int`"),
        ({"prompt_token_ids": [True]}, "Expected `int`"),
        ({"seed": 1.0}, "Expected `int`"),
        ({"sampling": {"temperature": -1.0}}, "temperature: must be from 0"),
        ({"sampling": {"temperature": float("nan")}}, "temperature: must be from 0"),
        ({"sampling": {"n": 10**6}}, "n: must be from 1"),
        ({"sampling": {"logit_bias": {"a": 1.0}}}, "Expected `int`"),
        ({"sampling": {"structured_outputs": {"choice": []}}}, "choice"),
        ({"pooling": {"dimensions": 0}}, "dimensions: must be 1"),
        ({"tenant": "text"}, "Expected `bytes`"),
        ({"reuse": {"segments": [[1, 2]], "method": "magic"}}, "Invalid enum value 'magic'"),
    ],
)
def test_what_a_request_says_is_checked_again(changes, words):
    with pytest.raises(FrameError, match=words) as caught:
        decode_frame(changed_add(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"hello",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode(["unknown"]),
        msgspec.msgpack.encode(["abort"]),
        msgspec.msgpack.encode(["abort", "a", "more"]),
        msgspec.msgpack.encode({"type": "abort", "request_id": "a"}),
        encoded(Welcome()) + b"\x00",
        encoded(Abort("a"))[:-1],
        b"\xdd\xff\xff\xff\xff",  # an array of 4 G elements, of which none is there
        b"\x92\xa5abort\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        msgspec.msgpack.encode(["report", 3, None]),
    ],
    ids=range(14),
)
def test_what_is_no_frame(data):
    with pytest.raises(FrameError, match="no frame: "):
        decode_frame(data)


def mutated(rng, data):
    """A frame with some bytes changed, gone, doubled, or swapped for parts of another."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(6):
            case 0 if data:
                data[at] = rng.randrange(256)
            case 1 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.choice((1, 3, 50))]
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 4)))
            case 4:  # lengths that lie
                data[at : at + 1] = rng.choice((b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"))
            case 5:
                other = encoded(rng.choice(FRAMES))
                data[at:at] = other[rng.randrange(len(other)) :][: rng.randrange(40)]
    return bytes(data)


@pytest.mark.parametrize("seed", range(2))
def test_fuzz(seed):
    """Whatever comes is a frame or a FrameError, and takes no more memory than it is large."""
    rng = Random(seed)
    originals = [encoded(frame) for frame in FRAMES]
    originals += [control_frame(1, m) for m in MESSAGES] + [reply_frame(1, r) for r in REPLIES]
    num_read = 0
    tracemalloc.start()
    try:
        for _ in range(6000):
            is_noise = rng.random() < 0.1
            data = (
                rng.randbytes(rng.randrange(60))
                if is_noise
                else mutated(rng, rng.choice(originals))
            )
            try:
                frame = decode_frame(data)
                num_read += 1
                understood(frame)
            except FrameError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert num_read > 100


def understood(frame):
    """All that is done with what a frame says, before an engine sees it."""
    match frame:
        case Control():
            message_in(frame)
        case ControlReply():
            reply_in(frame)
        case ControlError():
            error_in(frame)
        case Hello():
            facts_in(frame)
        case AddRequest(request):
            request.request()
        case ReportFrame():
            report_in(frame, 1.5)


def test_sizes():
    assert MAX_FRAME_BYTES == 32 * 2**20
    million = make_request(prompt=[2**31 - 1] * 10**6)
    assert len(add_frame(million, 0.0)) < MAX_FRAME_BYTES / 4
