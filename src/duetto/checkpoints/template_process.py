"""The processes in which a chat template runs, as the server sees them.

They are started when they are needed and ended when they break their budget; see
docs/design/chat-templates.md. Any thread may ask; who asks waits. Knows no Jinja.
"""

import re
import signal
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import environ
from subprocess import DEVNULL, Popen
from threading import Condition
from time import monotonic
from typing import Any

import msgspec

from duetto.checkpoints.template_answer import LENGTH, MEMORY_STATUS, AnswerKind

CPU_S, CPU_S_PER_MIB = 0.25, 0.15  # of one message: per message, and per MiB of it
MAX_BYTES, BYTES_PER_BYTE = 64 * 2**20, 16  # of a process: in all, and per byte of a message
WALL_PER_CPU = 10  # a process may have to wait for its processor
MAX_PROCESSES = 4
_ENV = re.compile(r"PYTHON|PATH$|LD_|DYLD_|LANG$|LC_|TZ$")  # what it gets: no keys, no tokens
_START_S = 30.0  # in which a process begins to answer
_PATIENCE_S = 0.02  # before a second process is started, since the first is busy
_NO_MEMORY = f"takes more than {MAX_BYTES >> 20} MiB of memory"
_START = (
    "import sys; sys.path[:] = sys.argv[5:]; from duetto.checkpoints.template_child import main; "
    "main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
)


class BudgetBroken(Exception):
    """The process ended, or was ended; the message says for what."""


class TemplateProcesses:
    """Up to MAX_PROCESSES processes with one template, started one by one as they are needed."""

    def __init__(self, source: str) -> None:
        self._load = _encode({"op": "load", "source": source})
        self._idle: list[_Process] = []
        self._num_processes = 0
        self._changed = Condition()

    def load(self) -> tuple[AnswerKind, bytes]:
        """What loading the template answers. Raises BudgetBroken."""
        with self._taken() as process:
            return process.loaded

    def ask(self, request: dict[str, Any]) -> tuple[AnswerKind, bytes]:
        """The kind of an answer and what it holds; see template_child. Raises BudgetBroken.

        Raises UnicodeEncodeError for a request that is not Unicode text.
        """
        message = _encode(request)
        with self._taken() as process:
            return process.ask(message)

    @contextmanager
    def _taken(self) -> Iterator["_Process"]:
        process = self._take()
        try:
            if process is None:
                process = _Process(self._load)
            yield process
        except BaseException as error:  # of an answer that is still to come, nothing is known
            if process is not None:
                process.end()
                process = self._another() if isinstance(error, BudgetBroken) else None
            raise
        finally:
            with self._changed:
                if process is not None and process.is_alive:
                    self._idle.append(process)
                else:
                    self._num_processes -= 1
                self._changed.notify()

    def _another(self) -> "_Process | None":
        """Instead of one that was ended: who broke it waits for it, and not the next chat."""
        try:
            return _Process(self._load)
        except (BudgetBroken, OSError):
            return None

    def _take(self) -> "_Process | None":
        """One that is idle; None: one is to be started, and is counted already."""
        with self._changed:
            if self._num_processes and not self._idle:
                self._changed.wait(_PATIENCE_S)
            while not self._idle and self._num_processes >= MAX_PROCESSES:
                self._changed.wait()
            if not self._idle:
                self._num_processes += 1
                return None
            process = self._idle.pop()
        # Between two chats it may have been ended from outside.
        return process if process.is_alive else None


class _Process:
    """One process with the template in it. Ends with this object."""

    def __init__(self, load: bytes) -> None:
        """Raises BudgetBroken, and OSError if the system starts no process."""
        self._socket, theirs = socket.socketpair()
        budget = (CPU_S, CPU_S_PER_MIB, MAX_BYTES, BYTES_PER_BYTE)
        try:
            with theirs:
                self._process = Popen(
                    [sys.executable, "-c", _START, *map(str, budget), *sys.path],
                    stdin=theirs.fileno(),
                    stdout=DEVNULL,
                    stderr=DEVNULL,
                    start_new_session=True,  # a Ctrl-C is for the server
                    env={name: value for name, value in environ.items() if _ENV.match(name)},
                )
        except BaseException:
            self._socket.close()
            raise
        self._end = weakref.finalize(self, _end, self._process, self._socket)
        self.loaded = self.ask(load, start_s=_START_S)

    @property
    def is_alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def end(self) -> None:
        self._end()

    def ask(self, message: bytes, start_s: float = 0.0) -> tuple[AnswerKind, bytes]:
        cpu_s = CPU_S + CPU_S_PER_MIB * len(message) / 2**20
        deadline = monotonic() + start_s + WALL_PER_CPU * cpu_s
        try:
            self._wait_until(deadline)
            self._socket.sendall(LENGTH.pack(len(message)) + message)
            head = self._receive(LENGTH.size + 1, deadline)
            kind, data = AnswerKind(head[-1]), self._receive(LENGTH.unpack_from(head)[0], deadline)
        except TimeoutError:
            self.end()
            raise BudgetBroken(f"takes longer than {WALL_PER_CPU * cpu_s:.1f} s") from None
        except (ConnectionError, EOFError):
            status = self._process.wait(timeout=1)
            self.end()
            raise BudgetBroken(_why(status, cpu_s)) from None
        if kind == AnswerKind.NO_MEMORY:
            self.end()
            raise BudgetBroken(_NO_MEMORY)
        return kind, data

    def _wait_until(self, deadline: float) -> None:
        self._socket.settimeout(max(1e-3, deadline - monotonic()))

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            self._wait_until(deadline)
            part = self._socket.recv(min(1 << 20, num_bytes - len(data)))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _end(process: Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()


def _why(status: int, cpu_s: float) -> str:
    if status == -signal.SIGPROF:
        return f"takes more than {cpu_s:.2f} s of computing"
    if status == MEMORY_STATUS:
        return _NO_MEMORY
    return f"{_NO_MEMORY}, or its process was ended by others (status {status})"


def _encode(request: dict[str, Any]) -> bytes:
    return msgspec.json.encode(request)
