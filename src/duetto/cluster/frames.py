"""What doors and workers say to each other: typed frames of msgpack, strictly parsed.

A frame that another process sends is untrusted: it has a largest size, holds no field that is not
known and no value of another type, and what it says of a request is checked as at the door. What
does not parse is a FrameError, in one line, and nothing else. Knows no sockets.
"""

from typing import Literal, TypeVar

import msgspec

from duetto.cluster.facts import PROTOCOL, WorkerFacts
from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.embeddings import PoolingParams
from duetto.core.errors import DuettoError
from duetto.core.request import Request
from duetto.core.reuse import Reuse
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar

MAX_FRAME_BYTES = 32 * 2**20  # a prompt of millions of tokens; what is larger is sent in parts
MAX_TEXT = 400  # characters of a reason
MAX_ID = 256
T = TypeVar("T")


class FrameError(DuettoError):
    """What another process sent is no frame, or one that cannot be."""


class _Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class _Frame(_Struct, frozen=True, tag=True):
    pass


# --- joining ---------------------------------------------------------------------------------
# Whoever connects speaks first: a door asks who is there (Knock), a worker says it (Hello). These
# three stay as they are in all versions, so that two versions can tell each other which they are.


class Knock(_Frame, frozen=True, tag="knock"):
    """A door to a worker: who are you?"""

    protocol: int
    version: str  # of Duetto
    door: str  # for people


class Hello(_Frame, frozen=True, tag="hello"):
    """A worker to a door."""

    protocol: int
    version: str
    boot: str  # of the machine: clocks of one boot are one clock
    time: float  # of the worker's clock
    facts: bytes  # WorkerFacts, which another version may not have in this form


class Refused(_Frame, frozen=True, tag="refused"):
    """The other one cannot serve here. The connection is over."""

    reason: str


class Welcome(_Frame, frozen=True, tag="welcome"):
    """A door to a worker: requests may come now."""


# --- while both live -------------------------------------------------------------------------


class Heartbeat(_Frame, frozen=True, tag="alive"):
    """There was nothing else to say. `echo` is the `time` that came last, `held_s` ago."""

    time: float  # of the sender's clock
    echo: float | None = None
    held_s: float = 0.0


class SentRequest(_Struct, frozen=True):
    """A Request, as its caller made it. No imported tokens: their KV is not on the wire."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: frozenset[int]
    bad_word_ids: tuple[tuple[int, ...], ...]
    arrival_time: float
    priority: int
    tenant: bytes
    cache_salt: bytes
    reuse: Reuse | None
    why_not_reused: str | None
    grammar: Grammar | None
    pooling: PoolingParams | None
    prefill_at: tuple[str, ...]

    @classmethod
    def of(cls, request: Request, arrival_time: float) -> "SentRequest":
        names = cls.__struct_fields__
        values = {name: getattr(request, name) for name in names}
        return cls(**values | {"arrival_time": arrival_time})

    def request(self) -> Request:
        return Request(**{name: getattr(self, name) for name in self.__struct_fields__})


class AddRequest(_Frame, frozen=True, tag="add"):
    request: SentRequest


class Abort(_Frame, frozen=True, tag="abort"):
    request_id: str


class NotTaken(_Frame, frozen=True, tag="not-taken"):
    """A worker to a door: this request was not begun here, and could be elsewhere."""

    request_id: str
    reason: str


class ReportFrame(_Frame, frozen=True, tag="report"):
    """A StepReport, of it what concerns this door."""

    updates: tuple[RequestUpdate, ...]
    record: StepRecord | None


MessageKind = Literal["lookup", "pin", "unpin", "drop", "list"]
ReplyKind = Literal["found", "pinned", "dropped", "page"]
ErrorKind = Literal["invalid", "not-found", "quota", "engine"]


class Control(_Frame, frozen=True, tag="control"):
    number: int  # of the question, of this connection
    kind: MessageKind
    body: bytes


class ControlReply(_Frame, frozen=True, tag="control-reply"):
    number: int
    kind: ReplyKind
    body: bytes


class ControlError(_Frame, frozen=True, tag="control-error"):
    number: int
    kind: ErrorKind
    field: str
    message: str


# --- the end ---------------------------------------------------------------------------------


class Leaving(_Frame, frozen=True, tag="leaving"):
    """A worker to a door: it ends once its requests have, and takes no more."""


class Stop(_Frame, frozen=True, tag="stop"):
    """A door to a worker: end as if told by SIGTERM."""


class Bye(_Frame, frozen=True, tag="bye"):
    """Nothing follows. A worker's requests have ended; a door's are to be aborted."""

    reason: str


Frame = (
    Knock
    | Hello
    | Refused
    | Welcome
    | Heartbeat
    | AddRequest
    | Abort
    | NotTaken
    | ReportFrame
    | Control
    | ControlReply
    | ControlError
    | Leaving
    | Stop
    | Bye
)

_encoder = msgspec.msgpack.Encoder()
_decoder: "msgspec.msgpack.Decoder[Frame]" = msgspec.msgpack.Decoder(Frame)


def decode_frame(data: bytes) -> Frame:
    """Raises FrameError, and nothing else, for what is no frame."""
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes; at most {MAX_FRAME_BYTES} are accepted")
    try:
        return _decoder.decode(data)
    except Exception as error:  # of msgspec, or of a constructor that checks what it is given
        raise FrameError(f"no frame: {_line(error)}") from None


def encoded(value: object) -> bytes:
    """Raises FrameError for what is larger than a frame may be, or cannot be written."""
    try:
        data = _encoder.encode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FrameError(f"{type(value).__name__} cannot be sent: {_line(error)}") from None
    if len(data) > MAX_FRAME_BYTES:
        what = type(value).__name__
        raise FrameError(
            f"{what} of {len(data)} bytes cannot be sent; at most {MAX_FRAME_BYTES} are accepted"
        )
    return data


def decoded(data: bytes, kind: type[T]) -> T:
    """What a frame holds. Raises FrameError, and nothing else."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except Exception as error:
        raise FrameError(f"no {kind.__name__}: {_line(error)}") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:MAX_TEXT]


# --- Hello -----------------------------------------------------------------------------------


def hello(facts: WorkerFacts, boot: str, time: float) -> Hello:
    return Hello(facts.protocol, facts.version, boot, time, encoded(facts))


def facts_in(frame: Hello) -> WorkerFacts:
    """Raises FrameError for facts that cannot be."""
    facts = decoded(frame.facts, WorkerFacts)
    if (facts.protocol, facts.version) != (frame.protocol, frame.version):
        raise FrameError("a Hello whose facts are of another version")
    return facts


def why_not_versions(protocol: int, version: str, own_version: str) -> str | None:
    """Why two cannot even read each other's frames, with both values; None if they can."""
    if protocol != PROTOCOL:
        return f"another protocol: {protocol}, and here it is {PROTOCOL}"
    if version != own_version:
        return f"another version of Duetto: {version:.80}, and here it is {own_version}"
    return None


# --- requests --------------------------------------------------------------------------------


def add_frame(request: Request, arrival_time: float) -> bytes:
    """`arrival_time` is on the worker's clock. Raises FrameError for one that is too large."""
    return encoded(AddRequest(SentRequest.of(request, arrival_time)))
