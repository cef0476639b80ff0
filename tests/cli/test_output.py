"""What commands print, all of them: one JSON document with --json, and whole numbers in tables."""

import json
import re
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cli.test_units import ALL
from measure.fake_server import FakeServer
from rich.table import Table
from server.fakes_server import SpeakingExecutor, make_app
from server.fakes_server import running as running_app

from duetto.cli.app import app
from duetto.cli.cache import CacheServer
from duetto.cli.output import open_console, print_json, say, show_table
from duetto.core.errors import ConfigError
from duetto.pricing.find_hardware import find_hardware

SEGMENT = {"kind": "decode", "start_ms": 12.5, "ms": 1234.5, "steps": 17, "tokens": 170}
SEGMENT |= {"others_prompt_tokens": 9876, "steps_expected_ms": 1200.25, "of_roof": 0.75}
CHOICE = {
    "id": "cmpl-1", "finish_reason": "length", "prompt_tokens": 123456, "cached_tokens": 64,
    "completion_tokens": 4321, "why": "most of its time went to decode", "cache": "64 came from it",
    "total_ms": 1300.5, "ttft_ms": 12.5, "parts_ms": {"decode": 1288.0, "waiting": 12.5},
    "segments": [SEGMENT | {"longest_step_ms": 98.75}], "segments_are_whole": True,
    "longest_gap_ms": 98.75, "longest_gap_end_ms": 501.25,
}  # fmt: skip


class Explained(BaseHTTPRequestHandler):
    """A server of which `explain` is asked."""

    def do_GET(self) -> None:
        listed = {"data": [{"id": "cmpl-1", "total_ms": 1300.5}]}
        found: Any = {"choices": [CHOICE]} if self.path.endswith("/timeline") else listed
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found, indent=2).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def explained() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Explained) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def serving() -> Iterator[str]:
    with FakeServer().running() as running:
        yield running.base_url


@pytest.fixture(scope="module")
def caching() -> Iterator[str]:
    with running_app(make_app(SpeakingExecutor("Hi!"))[0]) as url:
        yield url


LOAD = ["--num-prompts", "5", "--random-input-len", "200", "--random-output-len", "8"]
SHORT = ["--max-tokens", "2", "--backend", "reference"]
FEW = ["--num-prompts", "2", "--random-output-len", "2"]
BATCHES = ["--num-iters", "1", "--num-iters-warmup", "0"]
ONE = ["--processes", "1"]
CASES: dict[tuple[str, ...], list[str]] = {
    ("serve",): ["MODEL", "--dry-run", "--backend", "reference"],
    ("chat",): ["MODEL", "-q", "hi", *SHORT],
    ("complete",): ["MODEL", "hi", *SHORT],
    ("run-batch",): ["MODEL", "-i", "BATCH", "-o", "OUT"],
    ("tokenize",): ["hi there", "--model", "MODEL"],
    ("make-model",): ["tiny", "OUT"],
    ("bench", "latency"): [
        "MODEL",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "0",
        "--output-len",
        "2",
    ],
    ("bench", "throughput"): [
        "MODEL",
        "--num-prompts",
        "2",
        "--random-output-len",
        "2",
        "--slo",
        "itl=9s",
    ],
    ("bench", "serve"): ["--base-url", "SERVING", *FEW],
    ("bench", "kernels"): ["tiny", "--kernel", "rows", "--rows", "1"],
    ("roofline",): ["llama-3-8b", "--hardware", "h100:8"],
    ("calibrate",): ["--out", "OUT"],
    ("fit",): ["llama-3-70b", "--hardware", "h100:8"],
    ("explain",): ["--url", "EXPLAINED"],
    **{("cache", name): ["a prompt", "--url", "CACHING"] for name in ("lookup", "drop")},
    **{("cache", name): ["a longer prompt", "--url", "CACHING"] for name in ("pin", "unpin")},
    ("cache", "ls"): ["--url", "CACHING"],
    ("calibrate-reuse",): ["MODEL", "--num-questions", "2", "--choices", "none"],
    ("eval",): ["MODEL", "--num-questions", "8", "--num-documents", "1"],
    ("simulate",): ["llama-3-8b", "--hardware", "h100", "--price", "2", *LOAD],
    ("plan",): [
        "llama-3-8b",
        "--hardware",
        "h100:2",
        "--slo",
        "ttft=9s",
        "--processes",
        "1",
        "--budgets",
        "512",
        *LOAD,
    ],
    ("doctor",): [],
    ("planner",): [
        *("CACHING", "--model", "MODEL", "--hardware", "a100", "--slo-ttft", "1s"),
        *("--slo-tpot", "1s", "--num-windows", "1", "--interval", "1"),
    ],
    ("bench", "schedulers"): [
        *("MODEL", "--only-simulated", "--num-prompts", "2", "--request-rate", "inf"),
        *("--input-len", "40", "--output-len", "4"),
    ],
}
SERVERS = {("router",), ("worker",)}  # which print nothing on stdout
TABLES = [path for path in CASES if path not in {("chat",), ("complete",)}]


@pytest.fixture
def run(
    tiny_model: Path,
    explained: str,
    serving: str,
    caching: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setattr("duetto.models.make_model._TRAINING_CHARACTERS", 50_000)
    monkeypatch.setattr("duetto.measure.kernels.SECONDS", 0.01)
    monkeypatch.setattr(
        "duetto.cli.calibrate.measure_host", lambda *_, **_more: find_hardware("a100")
    )
    words = {"MODEL": str(tiny_model), "EXPLAINED": explained, "SERVING": serving}
    words["CACHING"] = caching
    words["BATCH"] = str(tmp_path / "batch.jsonl")
    batch = {"custom_id": "a", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "a"}}
    Path(words["BATCH"]).write_text(json.dumps(batch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run_one(path: tuple[str, ...], *more: str, out: str = "out") -> None:
        if path == ("cache", "unpin"):  # something must be pinned
            CacheServer(url=caching).ask("/v1/cache/pin", {"prompt": CASES[path][0]})
        given = [words.get(word, word) for word in (*path, *CASES[path], *more)]
        given = [str(tmp_path / out) if word == "OUT" else word for word in given]
        try:
            app(given, exit_on_error=False, print_error=False, result_action="return_value")
        except SystemExit as end:
            assert not end.code

    return run_one


def test_every_command_is_tried() -> None:
    assert set(CASES) == set(ALL) - SERVERS


@pytest.mark.parametrize("path", CASES, ids=" ".join)
def test_json_is_the_whole_of_stdout(
    path: tuple[str, ...], run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(path, "--json")
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(document, dict) and document


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def numbers(text: str) -> set[str]:
    return set(re.findall(r"[0-9][0-9.,]*[0-9]|[0-9]", text))


MEASURED = {
    ("serve",),
    ("bench",),
    ("eval",),
    ("doctor",),
    ("cache",),
}  # other numbers in every run


@pytest.mark.parametrize("path", TABLES, ids=" ".join)
def test_no_number_is_cut(
    path: tuple[str, ...],
    run: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(path, out="a")
    piped = capsys.readouterr().out
    assert piped and "…" not in piped
    for width, name in ((40, "b"), (60, "c"), (80, "d")):
        monkeypatch.setenv("COLUMNS", str(width))
        with monkeypatch.context() as terminal:
            terminal.setattr("sys.stdout", Terminal())
            run(path, out=name)
            shown = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
        assert "…" not in shown
        if path[:1] not in MEASURED:
            assert numbers(shown) <= numbers(piped), width


def wide_table() -> Table:
    table = Table(
        "name",
        "GFLOP",
        "MB",
        "ms",
        title="one 1,234 [b]two[/] " + "three " * 19 + "three",
        box=None,
    )
    table.add_row("attention x32", "1,234,567.1", "3.25", "[red]1.234[/]")
    table.add_row("mlp", "2", "4,444.5", "0.001")
    return table


def printed(width: int | None, *, drop: tuple[str, ...] = ()) -> list[str]:
    out = StringIO()
    console = open_console(out, width)
    show_table(console, wide_table(), drop=drop)
    say(console, "[a b] note: 12,345,678 of 9 and some more words, 1.5 GiB :100: said")
    return out.getvalue().splitlines()


def test_a_narrow_terminal_loses_columns_and_is_told_so() -> None:
    for width in range(20, 60):
        lines = printed(width, drop=("MB",))
        assert max(map(len, map(str.rstrip, lines))) <= width
        assert numbers("\n".join(lines)) <= numbers("\n".join(printed(None)))
    assert "not shown, for want of width: MB" in printed(35, drop=("MB",))
    assert "not shown, for want of width: GFLOP, MB, ms" in " ".join(printed(20, drop=("MB",)))


def test_numbers_stand_under_each_other() -> None:
    out = StringIO()
    table = Table("name", box=None, pad_edge=False)
    table.add_column("ms", justify="right")
    for name, number in (("a", "1.25"), ("b", "1,234.50")):
        table.add_row(name, number)
    show_table(open_console(out), table)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "name        ms", "a         1.25", "b     1,234.50"
    ]  # fmt: skip


def test_no_line_is_wider_than_the_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    for path in (("fit",), ("roofline",), ("simulate",), ("plan",), ("explain",)):
        with monkeypatch.context() as terminal:
            terminal.setattr("sys.stdout", Terminal())
            run(path)
            shown = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 40, path


def test_what_is_piped_is_not_wrapped() -> None:
    lines = printed(None)
    assert len(lines) == 5
    assert lines[0] == "one 1,234 two " + "three " * 19 + "three"
    assert lines[-1] == "[a b] note: 12,345,678 of 9 and some more words, 1.5 GiB :100: said"


def test_texts_of_a_table_break_between_words() -> None:
    out = StringIO()
    table = Table(show_header=False, box=None)
    table.add_row("KV", "1.5 GiB", "1,234,567 tokens in blocks of 32, 128.0 KiB each")
    show_table(open_console(out, 40), table, wrap=(2, 1))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(out.getvalue().split()).startswith("KV 1.5 GiB 1,234,567 tokens in")


def test_json_in_a_terminal_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    out = TextIOWrapper(BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", out)
    print_json({"text": "ö 😀", "never": float("inf")})
    assert json.loads(out.buffer.getvalue()) == {"text": "ö 😀", "never": None}


def test_json_needs_something_that_ends() -> None:
    with pytest.raises(ConfigError, match="--json: needs --dry-run"):
        app(["serve", "--json"], exit_on_error=False, print_error=False)
    with pytest.raises(ConfigError, match="--json: needs --quick"):
        app(["chat", "--json"], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("path", [("plan",), ("simulate",), ("bench", "serve")], ids=" ".join)
def test_limits_have_one_meaning_everywhere(path: tuple[str, ...], run: Any) -> None:
    with pytest.raises(ConfigError, match=r"--slo itl=50: needs a unit: itl=50ms or itl=50s\?"):
        run(path, "--slo", "itl=50")
    with pytest.raises(ConfigError, match="--slo ttft:1: needs a unit"):
        run(path, "--goodput", "ttft:1")
