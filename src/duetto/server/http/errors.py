"""Errors as the HTTP API shows them: OpenAI's shape, fixed texts, never the words of a bug."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duetto.core.errors import InvalidRequest, RequestTooLong

RETRY_AFTER_S = 1
MAX_ECHO = 64  # characters of what a caller sent; a field's name is shown twice
MAX_VERDICT = 1000
MAX_REASON = 200  # characters of words that are not ours, or may hold the caller's


class ApiError(Exception):
    """A reply that is an error. The message is written for the caller and safe to show."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])

    @property
    def reason(self) -> str:
        """Its code or its kind: of a closed set, so it may stand in a log."""
        said = self.body["error"]
        return str(said["code"] or said["type"])


def cut(text: str, most: int = MAX_ECHO) -> str:
    """Text of a caller as a message may show it: no reply grows with what was sent."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def invalid(param: str | None, message: str) -> ApiError:
    """400 that names the field at fault."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def refused(error: InvalidRequest, names: Mapping[str, str]) -> ApiError:
    """400 for what the engine's own checks refuse; `names` maps our field names to the caller's,
    and with them the places within: "messages[2].name" where it knows "messages[2]"."""
    param = _named(error.field, names)
    if isinstance(error, RequestTooLong):
        message = error.message_of(names.get("prompt", "prompt"))
        if error.field == "max_tokens":
            message += f" The length of the completion is {param}."
        return ApiError(400, message, param=param, code="context_length_exceeded")
    # A verdict on a choice has its numbers, and next to nothing of the caller's.
    most = MAX_VERDICT if error.field == "reuse" else MAX_REASON
    return ApiError(400, f"{param}: {cut(error.message, most)}", param=param)


def _named(field: str, names: Mapping[str, str]) -> str:
    ends = [len(field), *(at for at in range(len(field) - 1, 0, -1) if field[at] in ".[")]
    for end in ends:
        if (name := names.get(field[:end])) is not None:
            return name + field[end:]
    return field


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    known = cut(", ".join([repr(each) for each in served]), MAX_VERDICT)
    return ApiError(
        404,
        f"the model {cut(name)!r} does not exist; this server has {known}",
        param="model",
        code="model_not_found",
    )


def overloaded(message: str) -> ApiError:
    return unavailable(message, "server_overloaded")


def stopping() -> ApiError:
    return unavailable("the server is stopping", "server_stopping")


def unavailable(message: str, code: str) -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, message, kind="service_unavailable", code=code, headers=headers)


def engine_failure(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error", code="engine_error")


def internal_error() -> ApiError:
    return ApiError(
        500, "internal error; the log of the server has the details", kind="server_error"
    )


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def error_response(error: ApiError, body: Any = None) -> Response:
    """`body` is the error in another API's shape."""
    content = msgspec.json.encode(error.body if body is None else body)
    reply = _ErrorReply(content, error.status, error.headers, "application/json")
    reply.reported = {"reason": error.reason, "param": error.body["error"]["param"]}
    return reply


class _ErrorReply(Response):
    """Leaves its reason and its field in `scope["state"]`, for the log."""

    reported: dict[str, str | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {}).update(self.reported)
        await super().__call__(scope, receive, send)
