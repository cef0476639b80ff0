"""Questions to a running server, as commands ask them."""

import os
from typing import Any

import httpx2 as httpx

from duetto.cli.door_options import API_KEY_VARIABLE
from duetto.cli.server_url import server_url
from duetto.core.errors import ConfigError

TIMEOUT_S = 30.0
DEFAULT_URL = "http://127.0.0.1:8000"


def open_client(url: str, api_key: str | None) -> httpx.Client:
    """For the server at `url`, with this key or that of the environment."""
    key = api_key or os.environ.get(API_KEY_VARIABLE)
    if key and not key.isascii():
        raise ConfigError("--api-key: must be ASCII, as HTTP's headers are")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server_url("--url", url), headers=headers, timeout=TIMEOUT_S)


def ask_server(
    client: httpx.Client, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    """GET, or POST of a body. Raises ConfigError, in the server's words, for a refusal."""
    try:
        reply = client.get(path) if body is None else client.post(path, json=body)
    except ValueError as error:  # a lone surrogate of the command line, say, or no number
        raise ConfigError(f"this cannot be sent: {error}") from None
    except httpx.HTTPError as error:
        raise ConfigError(
            f"--url {client.base_url}: no Duetto answers there ({error}); is `duetto serve` "
            f"running?"
        ) from None
    if reply.status_code != 200:
        raise ConfigError(f"{reply.url}: {_message(reply)}")
    return reply


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {reply.status_code}, from what is no Duetto"
