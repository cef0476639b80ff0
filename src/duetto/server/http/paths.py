"""What is said of a path or a method that does not exist: what it is, and the nearest that does."""

from collections.abc import Collection
from difflib import get_close_matches

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from duetto.server.http.errors import ApiError, cut

# By a word in the path: what others serve and this server does not.
_NOT_OFFERED = {
    "rerank": "reranking",
    "score": "scores of pairs of texts",
    "classify": "classification",
    "moderations": "moderation",
    "audio": "audio",
    "images": "images",
    "assistants": "assistants",
    "threads": "assistants",
    "vector_stores": "vector stores",
    "files": "files",
    "uploads": "files",
    "batches": "batches",
    "fine_tuning": "fine-tuning",
    "realtime": "the Realtime API",
}
# By the last word of the path: what other servers call what is here.
_OTHER_NAMES = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "complete": "/v1/completions",
    "generate": "/v1/completions",
    "generate_stream": "/v1/completions",
    "embedding": "/v1/embeddings",  # llama.cpp's
    "embed": "/v1/embeddings",
    "pooling": "/v1/embeddings",
    "tags": "/v1/models",
    "lookup": "/v1/cache/lookup",  # LMCache's
    "clear": "/v1/cache/drop",
    "cachedcontents": "/v1/cache",  # Gemini's
    "flush_cache": "/v1/cache/drop",  # SGLang's; and vLLM's
    "reset_prefix_cache": "/v1/cache/drop",
    "get_server_info": "/server_info",  # SGLang's
    "get_load": "/load",
    "healthz": "/health",
    "livez": "/health",
    "readyz": "/health",
}
_MAX_COMPARED = 100  # characters of a path


def refused_by_routing(request: Request, error: HTTPException) -> ApiError:
    """An unknown path or method."""
    path, code = request.scope["path"], None
    message = "the request cannot be served"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        known = {route.path for route in request.app.routes if isinstance(route, Route)}
        message, code = missing(path, known), "unknown_url"
    elif error.status_code == 405:
        accepted = headers.get("Allow", "another method")
        message = f"{cut(path)} accepts {accepted}, not {cut(request.method, 16)}"
    return ApiError(error.status_code, message, code=code, headers=headers)


def missing(path: str, known: Collection[str]) -> str:
    """What a 404 says of a path."""
    message = f"there is no path {cut(path)!r}"
    nearest = _nearest(path, known)
    words = path[:_MAX_COMPARED].lower().strip("/").split("/")
    offered = next((_NOT_OFFERED[word] for word in words if word in _NOT_OFFERED), None)
    if offered is not None and nearest is None:
        return (
            f"{message}: this server does not offer {offered}; its model generates text, with "
            f"/v1/chat/completions and /v1/completions"
        )
    return f"{message}; did you mean {nearest}?" if nearest else f"{message}; /v1/models exists"


def _nearest(path: str, known: Collection[str]) -> str | None:
    """The longest end of a path that exists, also with /v1 before it; else a like spelling."""
    words = [word for word in path[:_MAX_COMPARED].lower().split("/") if word]
    for start in range(len(words)):
        end = "/" + "/".join(words[start:])
        for whole in (end, f"/v1{end}"):
            if whole in known:
                return whole
    if not words or any(word in _NOT_OFFERED for word in words):
        return None
    plain = [name for name in sorted(known) if "{" not in name]
    spelled, other = "/" + "/".join(words), _OTHER_NAMES.get(words[-1])
    if close := get_close_matches(spelled, plain, n=1, cutoff=0.9 if other else 0.7):
        return close[0]
    return other
