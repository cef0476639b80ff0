"""`duetto explain`: where a request's time went, asked of a running server."""

import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
from rich.console import Console
from rich.table import Table

from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.cli.server_client import DEFAULT_URL, ask_server, open_client
from duetto.core.errors import ConfigError
from duetto.core.files import check_folder

_KINDS = {
    "wait": "waited",
    "prompt": "its prompt",
    "recompute": "recomputed",
    "decode": "decoded",
    "shared": "beside prompts",
}


def explain(
    request_id: str | None = None,
    *,
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    trace: Path | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Say where a request's time went, and why it was slow.

    Parameters
    ----------
    request_id
        The id of a reply (cmpl-… or chatcmpl-…); by default the slowest that ended of late.
    url
        The server, like 127.0.0.1:8000.
    api_key
        A key of the server; also read from DUETTO_API_KEY.
    trace
        Write the last steps there, for ui.perfetto.dev, instead.
    json_output
        The last line of stdout is one JSON document.
    """
    if trace is not None:
        check_folder("--trace", trace)
    with open_client(url, api_key) as client:
        if trace is not None:
            trace.write_bytes(ask_server(client, "/debug/steps.json").content)
            if json_output:
                print_json({"trace": str(trace)})
            else:
                print(f"wrote {trace}; open it at https://ui.perfetto.dev", file=sys.stderr)
            return
        name = request_id or _slowest(client)
        reply = ask_server(client, f"/v1/requests/{quote(name, safe='')}/timeline")
    if json_output:
        print_json(reply.json())
        return
    for choice in reply.json()["choices"]:
        show(choice, open_console())


def _slowest(client: httpx.Client) -> str:
    recent = ask_server(client, "/v1/requests").json()["data"]
    if not recent:
        raise ConfigError("no request has ended so far: there is nothing to explain")
    slowest: dict[str, Any] = max(recent, key=lambda each: each["total_ms"])
    return str(slowest["id"])


def _reuse_words(reuse: dict[str, Any]) -> str:
    if reuse["why_not"] is not None:
        return f"{reuse['choice']}: none, as {reuse['why_not']}"
    missing = f"; {reuse['missing']} were not there before" if reuse["missing"] else ""
    return (
        f"{reuse['choice']}: {reuse['reused']} tokens of segments reused, {reuse['recomputed']} "
        f"computed in their place{missing}"
    )


def show(choice: dict[str, Any], console: Console) -> None:
    """One request's timeline, for people. In the last table `others'` are prompt tokens of other
    requests in the same steps, `expected` what the steps should have taken together, and `longest`
    the longest of them, in milliseconds."""
    if choice["finish_reason"] is None:
        say(console, f"{_name(choice)}: {choice['prompt_tokens']} prompt tokens", style="bold")
        say(console, f"  {choice['why']}")
        _show_segments(choice, console)
        return
    say(
        console,
        f"{_name(choice)}: {choice['prompt_tokens']} prompt tokens "
        f"({choice['cached_tokens']} cached), {choice['completion_tokens']} generated, ended by "
        f"{choice['finish_reason']}",
    )
    say(console, f"  {choice['why']}")
    say(console, f"  prefix cache: {choice['cache']}")
    if "drafts" in choice:  # servers before 0.3 say nothing of it
        say(console, f"  speculation: {choice['drafts']}")
    if (reuse := choice.get("reuse")) is not None:
        say(console, f"  reuse: {_reuse_words(reuse)}")
    elif "segment_lines" in choice:  # nor of this
        say(console, "  reuse: no part of the prompt is marked reusable")
    for line in choice.get("segment_lines", ()):
        say(console, f"    {line}")
    parts = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("part", "ms", "share"):
        parts.add_column(title, justify="left" if title == "part" else "right")
    total = choice["total_ms"] or 1.0
    for name, spent in choice["parts_ms"].items():
        if spent:
            parts.add_row(name, f"{spent:.1f}", f"{spent / total:.0%}")
    parts.add_row("all", f"{total:.1f}", f"TTFT {_ms(choice['ttft_ms'])}")
    show_table(console, parts)
    _show_segments(choice, console)
    if not choice["segments_are_whole"]:
        say(console, "  its first steps are no longer remembered")
    if choice["longest_gap_ms"]:
        say(
            console,
            f"  longest gap between two tokens: {_ms(choice['longest_gap_ms'])} ms, which ended "
            f"{_ms(choice['longest_gap_end_ms'])} ms after the arrival",
        )


def _name(choice: dict[str, Any]) -> str:
    """The id that the client and the log know, with the number of the choice."""
    own, _, number = str(choice["id"]).rpartition("-")
    known = choice.get("request_id", own)
    return f"{known}-{number}" if own else str(choice["id"])


def _show_segments(choice: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("at ms", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("it")
    drafted = any(segment.get("drafts") for segment in choice["segments"])
    drafts = ("drafts",) if drafted else ()  # of the tokens: those that were only proposed
    titles = ("steps", "tokens", *drafts, "others'", "expected", "of roof", "longest")
    for title in titles:
        table.add_column(title, justify="right")
    for segment in choice["segments"]:
        waits = "steps" not in segment
        table.add_row(
            f"{segment['start_ms']:.1f}",
            f"{segment['ms']:.1f}",
            _KINDS[segment["kind"]],
            *([""] * len(titles) if waits else _numbers(segment, drafted)),
        )
    show_table(console, table, drop=("of roof", "others'", "expected"))
    if any((segment.get("of_roof") or 0.0) > 1.005 for segment in choice["segments"]):
        say(
            console,
            "  of roof above 100%: caches held what the steps read, and the roof is the memory's; "
            "or the machine was busy when it was calibrated",
        )


def _numbers(segment: dict[str, Any], drafted: bool) -> list[str]:
    roof = segment["of_roof"]
    return [
        str(segment["steps"]),
        str(segment["tokens"]),
        *([str(segment["drafts"])] if drafted else []),
        str(segment["others_prompt_tokens"]),
        _ms(segment["steps_expected_ms"]),
        "" if roof is None else f"{roof:.0%}",
        _ms(segment["longest_step_ms"]),
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
