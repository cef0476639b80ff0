"""What is asked of a worker's KV cache and what it answers: frames, and back. Knows no sockets."""

from dataclasses import replace

from duetto.cluster.frames import (
    MAX_TEXT,
    Control,
    ControlError,
    ControlReply,
    ErrorKind,
    FrameError,
    MessageKind,
    ReplyKind,
    decoded,
    encoded,
)
from duetto.core.cache_control import (
    CacheMessage,
    CacheReply,
    Drop,
    Dropped,
    Found,
    ListPins,
    LookUp,
    Pin,
    Pinned,
    PinNotFound,
    PinPage,
    PinQuotaExceeded,
    Unpin,
)
from duetto.core.errors import DuettoError, EngineError, InvalidRequest

_MESSAGES: dict[MessageKind, type[CacheMessage]] = {
    "lookup": LookUp,
    "pin": Pin,
    "unpin": Unpin,
    "drop": Drop,
    "list": ListPins,
}
_REPLIES: dict[ReplyKind, type[CacheReply]] = {
    "found": Found,
    "pinned": Pinned,
    "dropped": Dropped,
    "page": PinPage,
}
_KIND_OF_ERROR: dict[type, ErrorKind] = {PinNotFound: "not-found", PinQuotaExceeded: "quota"}
FAILED = "the engine failed while it was asked; the log of its worker says why"


def control_frame(number: int, message: CacheMessage) -> bytes:
    """Raises FrameError for a message that is too large."""
    kind = next(name for name, each in _MESSAGES.items() if isinstance(message, each))
    return encoded(Control(number, kind, encoded(message)))


def message_in(frame: Control) -> CacheMessage:
    """Raises FrameError."""
    return decoded(frame.body, _MESSAGES[frame.kind])


def reply_frame(number: int, reply: "CacheReply | Exception") -> bytes:
    """What a control message is answered with: what it gave, or the error that it raised."""
    if isinstance(reply, Exception):
        return _error_frame(number, reply)
    try:
        kind = next(name for name, each in _REPLIES.items() if isinstance(reply, each))
        return encoded(ControlReply(number, kind, encoded(reply)))
    except FrameError as error:
        return _error_frame(number, error)


def _error_frame(number: int, error: Exception) -> bytes:
    field, kind = "", _KIND_OF_ERROR.get(type(error), "engine")
    message = str(error) if isinstance(error, DuettoError) else FAILED
    if isinstance(error, InvalidRequest):
        field, message = error.field, error.message
        kind = _KIND_OF_ERROR.get(type(error), "invalid")
    return encoded(ControlError(number, kind, field[:MAX_TEXT], message[:MAX_TEXT]))


def reply_in(frame: ControlReply) -> CacheReply:
    """Raises FrameError."""
    reply = decoded(frame.body, _REPLIES[frame.kind])
    return replace(reply, pins=tuple(reply.pins)) if isinstance(reply, PinPage) else reply


def error_in(frame: ControlError) -> DuettoError:
    """The error that the worker's engine raised."""
    match frame.kind:
        case "not-found":
            return PinNotFound()
        case "quota":
            return PinQuotaExceeded(frame.field, frame.message)
        case "invalid":
            return InvalidRequest(frame.field, frame.message)
        case "engine":
            return EngineError(frame.message)
