"""The process in which a chat template runs: all that Jinja does is done here, within a budget.

Started by template_process.py, with a socket as its standard input. Each message is a length (u32,
network order) and JSON with `op`; the answer is a length, one byte that says what follows, and
that. What takes too much memory raises MemoryError or ends the process; what takes too long ends
it. Imports the standard library and jinja2 only: it is to be small, and to start fast.
"""

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, UndefinedError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from duetto.checkpoints.template_answer import LENGTH, MEMORY_STATUS, AnswerKind
from duetto.checkpoints.template_content import content_taken, keys_read
from duetto.checkpoints.template_trials import Trials

_STATM = Path("/proc/self/statm")


class _Refusal(TemplateError):
    """The template refuses the messages in its own words."""


class _TooLong(Exception):
    """More characters than a prompt may have."""


class _Generation(Extension):
    """`{% generation %}` marks what the model writes, for training; here it is a plain block."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class CompiledTemplate:
    """A compiled template. Raises what jinja2 raises for a source that does not compile."""

    def __init__(self, source: str) -> None:
        self._now = datetime.min
        environment = _environment()
        environment.globals["strftime_now"] = lambda form: self._now.strftime(form)
        parsed = environment.parse(source)
        self._template = environment.from_string(parsed)
        self._takes, self._keys = content_taken(parsed), keys_read(parsed)
        self._reads = meta.find_undeclared_variables(parsed) - environment.globals.keys()

    def facts(self) -> dict[str, Any]:
        """Names and keys that it reads, and what it takes as content as far as its source tells."""
        return {"reads": sorted(self._reads), "keys": sorted(self._keys), "takes": self._takes}

    def render(self, arguments: Mapping[str, Any], now: str, max_characters: int) -> str:
        """Raises whatever the template raises, and _TooLong."""
        self._now = datetime.fromisoformat(now)
        pieces, size = [], 0
        for piece in self._template.generate(arguments):
            pieces.append(piece)
            size += len(piece)
            if size > max_characters:
                raise _TooLong
        return "".join(pieces)

    def trials(self, request: Mapping[str, Any]) -> Trials:
        """What a request's arguments are tried with."""
        now, max_characters = request["now"], request["max_characters"]
        return Trials(lambda each: self.render(each, now, max_characters), request["arguments"])


class _Environment(ImmutableSandboxedEnvironment):
    """Raises errors as they are: jinja2 compiles a false frame for each real one, only to show
    the template's lines in a traceback that nobody sees; a deep recursion breaks the budget so.
    """

    def handle_exception(self, source: str | None = None) -> NoReturn:
        if source is None:  # while rendering
            raise
        super().handle_exception(source)


def _environment() -> Environment:
    def raise_exception(message: str) -> NoReturn:
        raise _Refusal(message)

    def tojson(  # jinja2's own escapes for HTML
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


class _Child:
    """Answers one message after the other."""

    def __init__(self) -> None:
        self._program: CompiledTemplate | None = None

    def answer(self, message: bytes) -> tuple[AnswerKind, bytes]:
        try:
            return self._answer(json.loads(message))
        except _Refusal as error:
            return AnswerKind.REFUSED, _encoded(str(error))
        except _TooLong:
            return AnswerKind.TOO_LONG, b""
        except UndefinedError as error:
            return AnswerKind.UNDEFINED, _line(error)
        except UnicodeEncodeError:
            return AnswerKind.SURROGATE, b""
        except MemoryError:
            return AnswerKind.NO_MEMORY, b""
        except Exception as error:  # a template can raise whatever Python's operators raise
            return AnswerKind.FAILED, _line(error)

    def _answer(self, request: dict[str, Any]) -> tuple[AnswerKind, bytes]:
        if request["op"] == "load":
            try:
                self._program = CompiledTemplate(request["source"])
            except (TemplateError, RecursionError, SyntaxError) as error:
                return AnswerKind.NO_JINJA, _line(error)
            return AnswerKind.FACTS, json.dumps(self._program.facts()).encode()
        assert self._program is not None
        if request["op"] == "try":
            trials = self._program.trials(request)
            no_tools = trials.no_tools()
            takes = trials.contents(request["roles"], no_tools)
            facts = {"no_tools": no_tools, "takes": takes}
            return AnswerKind.FACTS, json.dumps(facts).encode()
        if request["op"] == "try_tools":
            found = self._program.trials(request).tools(request["user"], request["no_tools"])
            return AnswerKind.FACTS, json.dumps(found).encode()
        text = self._program.render(request["arguments"], request["now"], request["max_characters"])
        return AnswerKind.TEXT, text.encode()  # half a surrogate pair is not text


def _line(error: BaseException) -> bytes:
    line = getattr(error, "lineno", None)
    text = " ".join(str(error)[:2000].split()) or type(error).__name__
    return _encoded(f"line {line}: {text:.300}" if line else f"{text:.300}")


def _encoded(text: str) -> bytes:
    return text[:1000].encode(errors="replace")


def _limit_memory(num_bytes: int) -> None:
    """From now on an allocation fails that would make this process larger than this."""
    size, resident, *_ = (
        int(pages) * resource.getpagesize() for pages in _STATM.read_text().split()
    )
    most = size + max(0, num_bytes - resident)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


class _Watch:
    """Ends the process when it is larger than its budget, where the system does not."""

    def __init__(self) -> None:
        self.max_bytes = sys.maxsize
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        while True:
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > self.max_bytes:
                os._exit(MEMORY_STATUS)
            time.sleep(0.01)


def _receive(channel: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        part = channel.recv(min(1 << 20, num_bytes - len(data)))
        if not part:
            os._exit(0)  # the server is gone, or has no more use for this process
        data += part
    return bytes(data)


def main(cpu_s: float, cpu_s_per_mib: float, max_bytes: int, bytes_per_byte: int) -> None:
    """Serve the socket that is the standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the server, who ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel, child = socket.socket(fileno=0), _Child()
    watch = None if _STATM.exists() else _Watch()
    while True:
        (length,) = LENGTH.unpack(_receive(channel, LENGTH.size))
        if watch is None:
            _limit_memory(max_bytes + bytes_per_byte * length)
        else:
            watch.max_bytes = max_bytes + bytes_per_byte * length
        signal.setitimer(signal.ITIMER_PROF, cpu_s + cpu_s_per_mib * length / 2**20)
        kind, data = child.answer(_receive(channel, length))
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.sendall(LENGTH.pack(len(data)) + bytes([kind]) + data)
        if kind == AnswerKind.NO_MEMORY:
            os._exit(MEMORY_STATUS)
