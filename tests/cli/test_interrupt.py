"""Ctrl-C, as it is typed: real processes, and a pseudo-terminal where a person would sit."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from measure.fake_server import FakeServer

from duetto.checkpoints.shapes import SHAPES
from duetto.models.make_model import make_model

PATIENCE_S = 60.0  # a machine may be busy


class Typed:
    """A command in a terminal of its own, whose Ctrl-C all its processes get."""

    def __init__(self, *words: str | Path, **variables: str) -> None:
        self.process_id, self.terminal = pty.fork()
        if not self.process_id:
            command = [sys.executable, "-m", "duetto", *map(str, words)]
            os.execve(sys.executable, command, os.environ | {"TERM": "dumb"} | variables)
        self.shown = ""

    def until(self, is_there: Callable[[str], bool]) -> str:
        """What was shown since the last time, as soon as it has this."""
        end = time.monotonic() + PATIENCE_S
        while not is_there(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.terminal, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert is_there(self.shown), self.shown
        shown, self.shown = self.shown, ""
        return shown

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self) -> None:
        self.type("\x03")

    def end(self) -> tuple[int, str]:
        """The exit code, and what was shown until then."""
        while True:
            if not select.select([self.terminal], [], [], PATIENCE_S)[0]:
                os.kill(self.process_id, signal.SIGKILL)  # it waits for something: fail, not hang
                break
            try:
                text = os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
            self.shown += text
            if not text:
                break
        _, status = os.waitpid(self.process_id, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status), self.shown


def has(text: str) -> Callable[[str], bool]:
    return lambda shown: text in shown


SLOW = ("--backend", "reference", "--max-tokens", "100000")  # some milliseconds for each token


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that talks for as long as it may: a minute of tokens fits into its context."""
    path = tmp_path_factory.mktemp("models") / "long"
    config = {**SHAPES["tiny"], "max_position_embeddings": 200_000}
    make_model(config, path, source=path)
    return path


def test_in_chat_it_ends_the_answer_and_at_the_prompt_the_program(long_model: Path) -> None:
    chat = Typed("chat", long_model, *SLOW, "--max-model-len", "100Ki")
    chat.until(has("> "))
    chat.type("hello\n")
    chat.until(lambda text: len(text) > 30)
    chat.interrupt()
    shown = chat.until(lambda text: text.endswith("> "))
    assert "ended by abort" in shown and "stays in the conversation" in shown
    chat.type("and again\n")
    chat.until(lambda text: len(text) > 30)
    chat.interrupt()
    shown = chat.until(lambda text: text.endswith("> "))
    (line,) = (line for line in shown.splitlines() if "prompt tokens" in line)
    assert int(line[1:].split()[0]) > 30  # the answer that was broken off is part of the prompt
    # CPython shows the prompt a moment before it waits for a key; a signal that comes in between is
    # heeded at the next key only. No person types that fast.
    time.sleep(0.5)
    chat.interrupt()
    code, shown = chat.end()
    assert code == 130
    assert "Traceback" not in shown


def test_one_answer_that_is_broken_off(long_model: Path) -> None:
    for words in (
        ("chat", long_model, "--quick", "hello"),
        ("complete", long_model, "hello", "--ignore-eos"),
    ):
        typed = Typed(*words, *SLOW, "--max-model-len", "100Ki")
        typed.until(lambda text: len(text) > 20)
        typed.interrupt()
        code, shown = typed.end()
        assert code == 130, shown
        assert "Traceback" not in shown and "ended by abort]" in shown


@pytest.fixture(scope="module")
def serving() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


def interrupted(
    *words: str | Path, when: Callable[[], bool], delay_s: float = 0.0
) -> subprocess.CompletedProcess[str]:
    """The command, with SIGINT to it once `when` says so and `delay_s` is over."""
    command = [sys.executable, "-m", "duetto", *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        end = time.monotonic() + PATIENCE_S
        while not when() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in out + err, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


BENCH = ("--random-input-len", "8", "--random-output-len", "4", "--num-prompts", "400")


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_serve_tells_what_was_measured(serving: FakeServer, as_json: bool) -> None:
    before = len(serving.bodies)
    run = interrupted(
        "bench", "serve", "--base-url", serving.base_url, *BENCH, "--max-concurrency", "2",
        *(["--json"] if as_json else []), when=lambda: len(serving.bodies) > before + 8,
    )  # fmt: skip
    assert run.returncode == 130, run.stderr
    if as_json:
        found = json.loads(run.stdout.splitlines()[-1])
        assert found["interrupted"] is True
        assert 0 < found["completed"] < 400 and found["failed"] == 0
    else:
        assert "requests answered in" in run.stdout and "TTFT" in run.stdout
        assert "note: interrupted: " in run.stdout and "of 400 requests had ended" in run.stdout


def test_bench_serve_before_anything_was_measured(serving: FakeServer) -> None:
    before = len(serving.bodies)
    run = interrupted(
        "bench", "serve", "--base-url", serving.base_url, "--random-output-len", "1000", "--json",
        "--num-prompts", "2", when=lambda: len(serving.bodies) > before + 1,
    )  # fmt: skip
    assert run.returncode == 130
    assert json.loads(run.stdout) == {"completed": 0, "interrupted": True}
    assert run.stderr == "interrupted: nothing was measured so far\n"


@pytest.mark.parametrize(
    "words",
    [
        "latency --output-len 32 --batch-size 2 --num-iters-warmup 0 --num-iters 5k",
        "throughput --random-output-len 60 --num-prompts 2k",
    ],
)
def test_bench_in_this_process_tells_what_was_measured(tiny_model: Path, words: str) -> None:
    name, *flags = words.split()
    run = interrupted("bench", name, tiny_model, *flags, "--json", when=lambda: True, delay_s=5)
    assert run.returncode == 130, run.stderr
    if run.stdout:  # else it came while the model was loaded
        found = json.loads(run.stdout.splitlines()[-1])
        assert found["interrupted"] is True


def test_bench_kernels_tells_what_was_measured() -> None:
    words = ("bench", "kernels", "llama-3.2-1b", "--rows", "1", "--json")
    run = interrupted(*words, when=lambda: True, delay_s=5)
    assert run.returncode == 130, run.stderr
    if run.stdout:
        assert json.loads(run.stdout)["interrupted"] is True
        assert "measurements so far" in run.stderr


def test_calibrate_ends_at_once(tmp_path: Path) -> None:
    kept, temporary = tmp_path / "kept.json", tmp_path / "temporary"
    kept.write_text("as it was")
    temporary.mkdir()
    os.environ["TMPDIR"], before = str(temporary), os.environ.get("TMPDIR")
    try:
        run = interrupted("calibrate", "--out", kept, when=lambda: any(temporary.iterdir()))
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    assert run.returncode == 130
    assert run.stdout == ""
    assert kept.read_text() == "as it was"
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("tokenize",),
        ("complete",),
        ("simulate", "llama-3-8b", "--hardware", "h100", "--num-prompts", "100k"),
        ("plan", "llama-3-8b", "--hardware", "h100:8", "--slo", "ttft=1s", "--processes", "2"),
        ("eval", "--num-questions", "100k"),
    ],
    ids=lambda words: words[0],
)
def test_elsewhere_it_ends_the_program_without_a_word(words: tuple[str, ...]) -> None:
    typed = Typed(*words)
    time.sleep(2.5)
    typed.interrupt()
    code, shown = typed.end()
    assert code == 130, shown
    assert "Traceback" not in shown and "Error" not in shown
