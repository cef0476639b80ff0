"""An error in the words of the API that was asked: which one it is, its path says."""

from starlette.responses import Response

from duetto.server.apis.anthropic.events import error_body
from duetto.server.http.errors import ApiError, error_response

_MESSAGES = "/v1/messages"


def reply_in_shape(path: str, error: ApiError) -> Response:
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        return error_response(error, error_body(error))
    return error_response(error)
