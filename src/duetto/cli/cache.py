"""`duetto cache ls|lookup|pin|unpin|drop`: a running server's KV cache, seen and kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from rich.table import Table

from duetto.cli.output import Flat, JsonFlag, open_console, print_json, say, show_table
from duetto.cli.server_client import DEFAULT_URL, ask_server, open_client
from duetto.cli.stdin import read_stdin
from duetto.core.errors import ConfigError

app = App(name="cache", help="What a server's KV cache holds of a text, and what it keeps.")
PAGE = 100
_PLACES = {"memory": "in memory", "ram": "in the RAM tier", "disk": "on the disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheServer:
    """Who is asked."""

    url: str = DEFAULT_URL
    """The server, like 127.0.0.1:8000."""
    api_key: str | None = None
    """A key of the server; also read from DUETTO_API_KEY. Each key has a cache of its own."""

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with open_client(self.url, self.api_key) as client:
            reply: dict[str, Any] = ask_server(client, path, body).json()
            return reply


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Whose KV is meant, beside the text itself."""

    file: Path | None = None
    """A file with the text."""
    messages: Path | None = None
    """A JSON file with a list of messages, as /v1/chat/completions reads them."""
    add_generation_prompt: bool = True
    """With --messages: end where an answer begins. Without it, they may go on."""
    token_ids: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = ()
    """Token ids instead of a text."""
    segment: Annotated[bool, Parameter(negative="")] = False
    """The text is a segment, which is tokenized alone, and not a prompt."""
    cache_salt: str | None = None
    """The cache_salt that requests of this text bring."""

    def body(self, text: str | None, pin_id: str | None = None) -> dict[str, Any]:
        """What is sent. Raises ConfigError unless exactly one of all is given; with none of them,
        stdin is the text."""
        given: dict[str, Any] = {
            "the text": text,
            "--file": self.file,
            "--messages": self.messages,
            "--token-ids": self.token_ids or None,
            "--id": pin_id,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ConfigError(f"{names[1]}: with {names[0]}; give one of them")
        field = "segment" if self.segment else "prompt"
        if self.segment and names in (["--messages"], ["--id"]):
            raise ConfigError(f"--segment: with {names[0]}; a segment is a text or token ids")
        if not self.add_generation_prompt and names != ["--messages"]:
            raise ConfigError("--no-add-generation-prompt: needs --messages")
        salt = {} if self.cache_salt is None else {"cache_salt": self.cache_salt}
        match names:
            case ["--id"]:
                return {"id": pin_id, **salt}
            case ["--messages"]:
                ends = {} if self.add_generation_prompt else {"add_generation_prompt": False}
                return {"messages": _messages(self.messages), **ends, **salt}
            case ["--token-ids"]:
                return {field: list(self.token_ids), **salt}
            case ["--file"]:
                return {field: _text(self.file), **salt}
        return {field: read_stdin() if text is None else text, **salt}


@app.command
def ls(
    *,
    as_json: JsonFlag = False,
    server: Annotated[CacheServer | None, Flat] = None,
) -> None:
    """List what is pinned, or has a priority.

    Parameters
    ----------
    as_json
        The last line of stdout is one JSON document.
    """
    server = server or CacheServer()
    page = server.ask(f"/v1/cache?limit={PAGE}")
    pins = page["data"]
    while page["has_more"]:
        page = server.ask(f"/v1/cache?limit={PAGE}&after={pins[-1]['id']}")
        pins += page["data"]
    if as_json:
        print_json({**page, "data": pins})
        return
    console = open_console()
    if pins:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("id", "keeps", "tokens", "cached", "blocks", "ends in"):
            table.add_column(title, justify="left" if title in ("id", "keeps") else "right")
        for pin in pins:
            numbers = (str(pin[name]) for name in ("num_tokens", "cached_tokens", "num_blocks"))
            table.add_row(pin["id"], _how(pin), *numbers, _left(pin))
        show_table(console, table, drop=("blocks", "keeps"))
    say(console, _usage(page, len(pins)))


@app.command
def lookup(
    text: str | None = None,
    *,
    as_json: JsonFlag = False,
    what: Annotated[TextOptions | None, Flat] = None,
    server: Annotated[CacheServer | None, Flat] = None,
) -> None:
    """Say how much of a text the cache holds. Changes nothing there.

    Parameters
    ----------
    text
        The text; read from stdin if nothing else is given.
    as_json
        The last line of stdout is one JSON document.
    """
    body = (what or TextOptions()).body(text)
    found = (server or CacheServer()).ask("/v1/cache/lookup", body)
    if as_json:
        print_json(found)
        return
    console = open_console()
    words = f"{found['cached_tokens']} of {found['num_tokens']} tokens need not be computed"
    if found["loadable_tokens"]:
        words += f"; {found['loadable_tokens']} more can be loaded"
    say(console, words)
    for one in found["ranges"]:
        kind = "exact" if one["exact"] else "approximate"
        kept = f", {_how(one)}" if one["tier"] == "memory" else ""
        line = f"  {one['start']} ... {one['end'] - 1}: {kind}, {_PLACES[one['tier']]}{kept}"
        say(console, line)
    for one in found.get("segments", ()):
        own = f"{one['cached_tokens']} of its {one['num_tokens']} tokens are there"
        say(console, f"  reusable at {one['start']} ... {one['end'] - 1}: {own}")


@app.command
def pin(
    text: str | None = None,
    *,
    ttl: float | None = None,
    priority: int | None = None,
    as_json: JsonFlag = False,
    what: Annotated[TextOptions | None, Flat] = None,
    server: Annotated[CacheServer | None, Flat] = None,
) -> None:
    """Keep a text's KV, also what is computed later; the same again renews it.

    Parameters
    ----------
    text
        The text; read from stdin if nothing else is given.
    ttl
        Seconds, after which it is kept no longer; by default until unpin, drop or a restart.
    priority
        Do not pin, but evict by priority: from 0, which goes first, to 100; without any it is 35.
    as_json
        The last line of stdout is one JSON document.
    """
    body = (what or TextOptions()).body(text)
    chosen = {"ttl_s": ttl, "priority": priority}
    body |= {name: value for name, value in chosen.items() if value is not None}
    made = (server or CacheServer()).ask("/v1/cache/pin", body)
    if as_json:
        print_json(made)
        return
    tokens = f"{made['num_tokens']} tokens, {made['cached_tokens']} of them there"
    ends = f", for {_left(made)}" if made["ttl_s"] is not None else ""
    say(open_console(), f"{made['id']}: {tokens}, {_how(made)}{ends}; {_usage(made)}")


@app.command
def unpin(
    text: str | None = None,
    *,
    id: str | None = None,
    as_json: JsonFlag = False,
    what: Annotated[TextOptions | None, Flat] = None,
    server: Annotated[CacheServer | None, Flat] = None,
) -> None:
    """End a pin. What it kept stays until its blocks are needed.

    Parameters
    ----------
    text
        Its text; read from stdin if nothing else is given.
    id
        Its id, like pin-1, instead.
    as_json
        The last line of stdout is one JSON document.
    """
    body = (what or TextOptions()).body(text, id)
    ended = (server or CacheServer()).ask("/v1/cache/unpin", body)
    if as_json:
        print_json(ended)
    else:
        say(open_console(), f"{ended['id']} has ended; {_usage(ended)}")


@app.command
def drop(
    text: str | None = None,
    *,
    id: str | None = None,
    as_json: JsonFlag = False,
    what: Annotated[TextOptions | None, Flat] = None,
    server: Annotated[CacheServer | None, Flat] = None,
) -> None:
    """Forget a text's KV, from its first token on, and end its pin. What other pins keep stays.
    Files of --kv-offloading-disk are removed a moment later.

    Parameters
    ----------
    text
        The text; read from stdin if nothing else is given.
    id
        A pin's id, like pin-1, instead.
    as_json
        The last line of stdout is one JSON document.
    """
    body = (what or TextOptions()).body(text, id)
    dropped = (server or CacheServer()).ask("/v1/cache/drop", body)
    if as_json:
        print_json(dropped)
        return
    words = f"{dropped['dropped_blocks']} blocks dropped"
    if dropped["in_use_blocks"]:
        words += f", {dropped['in_use_blocks']} of them as soon as requests are done with them"
    if dropped["tier_blocks"]:
        words += f"; {dropped['tier_blocks']} in RAM or on the disk"
    if dropped["pinned_blocks"]:
        words += f"; {dropped['pinned_blocks']} stay, as other pins keep them"
    say(open_console(), words)


def _text(path: Path | None) -> str:
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path}: cannot be read as text: {error}") from None


def _messages(path: Path | None) -> Any:
    try:
        return [] if path is None else msgspec.json.decode(path.read_bytes(), type=list[Any])
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"--messages {path}: must be a JSON list of messages: {error}") from None


def _how(kept: dict[str, Any]) -> str:
    return "pinned" if kept["pinned"] else f"priority {kept['priority']}"


def _left(pin: dict[str, Any]) -> str:
    return "" if pin["ttl_s"] is None else f"{pin['ttl_s']:.0f} s"


def _usage(reply: dict[str, Any], num_pins: int | None = None) -> str:
    pins = "" if num_pins is None else f"{num_pins} {'pin' if num_pins == 1 else 'pins'}: "
    return f"{pins}{reply['kept_blocks']} of at most {reply['max_kept_blocks']} blocks are kept"
