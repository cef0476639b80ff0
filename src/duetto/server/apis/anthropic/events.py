"""What an answer becomes for clients of /v1/messages: its body, and its events.

Content is a list of blocks; a stream opens a block, adds to it and closes it before the next. Knows
no HTTP.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import msgspec

from duetto.dialects.pieces import AnswerPiece, CallArguments, CallStart, Content, Reasoning
from duetto.engine.read_answer import call_id
from duetto.server.apis.said import AnswerReader
from duetto.server.apis.translator import AnswerStep, Ending, Usage, WholeAnswer, named_event
from duetto.server.http.errors import ApiError
from duetto.server.http.json_parts import Json

CALL_PREFIX = "toolu_"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Told so, a client sends the whole conversation each time (anthropic-python's tool_runner).
_NO_THREADS: Json = {"error_code": "thread_unsupported_request"}


def error_body(error: ApiError) -> Json:
    """Anthropic's shape, which has no place for the field at fault: the message begins with it."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, usual)
    said: Json = {"type": kind, "message": str(error)}
    if error.body["error"]["param"] == "thread":
        said["details"] = _NO_THREADS
    return {"type": "error", "error": said}


class MessagesTranslator:
    keep_alive: ClassVar[bytes] = named_event("ping", {"type": "ping"})

    def __init__(
        self, message_id: str, model: str, reader: AnswerReader, *, shows_thinking: bool = True
    ) -> None:
        """Thinking that is not shown leaves its block, without text."""
        self._shows_thinking = shows_thinking
        self._id = message_id
        self._model = model
        self._reader = reader
        self._num_blocks = 0
        self._open: str | None = None  # the type of the block that is open
        self._has_calls = False
        self._ending: Ending | None = None

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        message = self._message([], None, usage())
        return named_event("message_start", {"type": "message_start", "message": message})

    def step(self, step: AnswerStep, usage: Callable[[], Usage]) -> bytes:  # noqa: ARG002
        self._ending = step.ending
        return b"".join([self._piece(piece) for piece in self._reader.read(step)])

    def closing(self, usage: Usage) -> bytes:
        stop = self._stop(self._ending, self._has_calls)
        delta: Json = {"type": "message_delta", "delta": stop, "usage": messages_usage(usage)}
        if self._ending is not None:
            delta["timings"] = self._ending.timings
        end = named_event("message_stop", {"type": "message_stop"})
        return self._close() + named_event("message_delta", delta) + end

    def failed(self, error: ApiError) -> bytes:
        return named_event("error", error_body(error))

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        answer = answers[0]
        blocks = self._blocks(self._reader.read_whole(answer))
        has_calls = any(block["type"] == "tool_use" for block in blocks)
        message = self._message(blocks, answer.ending, usage, has_calls=has_calls)
        timings = None if answer.ending is None else answer.ending.timings
        return {**message, "timings": timings}

    def _blocks(self, pieces: Sequence[AnswerPiece]) -> list[Json]:
        """In the order in which they were said, as a stream has them."""
        blocks, texts = list[Json](), list[list[str]]()
        for piece in pieces:
            match piece:
                case CallStart(_, name):
                    named = {"id": call_id(CALL_PREFIX), "name": name}
                    blocks.append({"type": "tool_use", **named})
                    texts.append([])
                case CallArguments(_, text):
                    texts[-1].append(text)
                case Content(text) | Reasoning(text):
                    kind = "text" if isinstance(piece, Content) else "thinking"
                    if not blocks or blocks[-1]["type"] != kind:
                        blocks.append({"type": kind})
                        texts.append([])
                    texts[-1].append(text)
                case _:
                    pass
        for block, parts in zip(blocks, texts, strict=True):
            match block["type"]:
                case "tool_use":
                    block["input"] = _input("".join(parts))
                case "text":
                    block["text"] = "".join(parts)
                case _:
                    block["thinking"] = "".join(parts) if self._shows_thinking else ""
                    block["signature"] = ""
        return blocks or [{"type": "text", "text": ""}]

    def _message(
        self, blocks: list[Json], ending: Ending | None, usage: Usage, *, has_calls: bool = False
    ) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **self._stop(ending, has_calls),
            "usage": messages_usage(usage),
        }

    def _stop(self, ending: Ending | None, has_calls: bool) -> Json:
        if ending is None:
            return {"stop_reason": None, "stop_sequence": None}
        if ending.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(ending.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop_reason}
        return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}

    def _piece(self, piece: AnswerPiece) -> bytes:
        match piece:
            case Content(text):
                begin = self._begin("text", {"type": "text", "text": ""})
                return begin + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                block: Json = {"type": "thinking", "thinking": "", "signature": ""}
                delta = {"type": "thinking_delta", "thinking": text}
                begin = self._begin("thinking", block)
                return begin + self._delta(delta) if self._shows_thinking else begin
            case CallStart(_, name):
                self._has_calls = True
                named = {"id": call_id(CALL_PREFIX), "name": name}
                block = {"type": "tool_use", **named, "input": {}}
                return self._close() + self._begin("tool_use", block)
            case CallArguments(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})
            case _:
                return b""

    def _begin(self, kind: str, block: Json) -> bytes:
        if self._open == kind:
            return b""
        closed, self._open = self._close(), kind
        self._num_blocks += 1
        start = {"type": "content_block_start", "index": self._num_blocks - 1}
        return closed + named_event("content_block_start", {**start, "content_block": block})

    def _delta(self, delta: Json) -> bytes:
        body = {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}
        return named_event("content_block_delta", body)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        stop = {"type": "content_block_stop", "index": self._num_blocks - 1}
        return named_event("content_block_stop", stop)


def messages_usage(usage: Usage) -> Json:
    """Anthropic counts what was found in the cache apart from the rest of the prompt."""
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_output,
    }


def _input(arguments: str) -> Json:
    """An object; of a call that was cut off by the limit, its text."""
    try:
        given = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {"unfinished": arguments}
    return given if isinstance(given, dict) else {"value": given}
