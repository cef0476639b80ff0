"""A file of requests, one in a line as OpenAI's Batch API has them, through an app in this process.

Answers are written as they come, each in a line, so whoever is stopped goes on where it was. Knows
no model.
"""

import asyncio
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, TypeVar

import httpx2
import msgspec
from msgspec import Raw, Struct
from starlette.applications import Starlette

from duetto.core.errors import ConfigError, EngineError
from duetto.server.apis.protocol import ChatRequest
from duetto.server.apis.reading import decode
from duetto.server.http.errors import ApiError, cut, invalid
from duetto.server.http.json_parts import Json

T = TypeVar("T")

MAX_WORDS = 300  # characters of what is wrong with a line
LOOK_S = 0.1  # how often it is asked whether to stop
FULL_S = 0.2  # after which a request is sent again that found the server full


class BatchLine(Struct, forbid_unknown_fields=True):
    ELSEWHERE: ClassVar[dict[str, type]] = {"body": ChatRequest}

    custom_id: str
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    body: Raw
    method: Literal["POST"] = "POST"


class _Body(Struct):
    stream: bool | None = None


class _Named(Struct):
    """What can be read of a line with a fault."""

    custom_id: str | None = None


class _LineError(Struct):
    line_digest: str | None = None


class _Answer(Struct):
    status_code: int = 200


class _Done(Struct):
    """What a line of the output says of the input."""

    custom_id: str | None = None
    response: _Answer | None = None
    error: _LineError | None = None

    @property
    def has_failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


@dataclass(slots=True)
class BatchCounts:
    num_answered: int = 0
    num_failed: int = 0  # refused, or no requests
    num_skipped: int = 0  # whose answers were there ...
    num_skipped_failed: int = 0  # ... and are failures
    is_stopped: bool = False  # before all were answered


class BatchFile:
    """Reads `source`, and appends to `target`. One run each."""

    def __init__(
        self, app: Starlette, source: Path, target: Path, advance: Callable[[int], None]
    ) -> None:
        """`advance` is told of lines that are done. Raises ConfigError for files that cannot be."""
        if not source.is_file():
            raise ConfigError(f"--input-file: {source} is no file")
        if target.exists() and source.samefile(target):
            raise ConfigError("--output-file: is the input file")
        self._app = app
        self._source = source
        self._target = target
        self._advance = advance
        self._counts = BatchCounts()
        self._names = dict[str, bool]()  # custom_ids that have an answer: whether it is a failure
        self._told = set[str]()  # digests of lines whose error is there: numbers move
        self._num_in_flight = 0

    async def run(
        self, num_at_once: int, is_stopped: Callable[[], bool] = lambda: False
    ) -> BatchCounts:
        """Raises EngineError if the engine has ended; what was answered is in the file."""
        done = _read_done(self._target)
        for one in done:
            if one.error is not None and one.error.line_digest is not None:
                self._told.add(one.error.line_digest)  # its name, mended, is asked
            elif one.custom_id is not None:
                self._names[one.custom_id] = one.has_failed
        transport = httpx2.ASGITransport(self._app, raise_app_exceptions=False)
        with self._source.open("rb") as lines, self._target.open("ab") as out:
            async with (
                self._app.router.lifespan_context(self._app),
                httpx2.AsyncClient(
                    transport=transport, base_url="http://localhost", timeout=None
                ) as client,
            ):
                asked = self._asked(lines, out)
                work = [self._work(client, asked, out) for _ in range(num_at_once)]
                await self._gathered([asyncio.create_task(each) for each in work], is_stopped)
        return self._counts

    async def _gathered(
        self, tasks: list[asyncio.Task[None]], is_stopped: Callable[[], bool]
    ) -> None:
        """Wait for all of them; end all if one fails or somebody wants it."""
        waiting = set(tasks)
        try:
            while waiting and not self._counts.is_stopped:
                ended, waiting = await asyncio.wait(waiting, timeout=LOOK_S)
                for task in ended:
                    task.result()
                self._counts.is_stopped = bool(waiting) and is_stopped()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _work(
        self, client: httpx2.AsyncClient, asked: Iterator[BatchLine], out: BinaryIO
    ) -> None:
        for line in asked:
            reply = await self._answered(client, line)
            is_answer = reply.status_code == 200
            self._counts.num_answered += is_answer
            self._counts.num_failed += not is_answer
            response = {
                "status_code": reply.status_code,
                "request_id": reply.headers.get("x-request-id"),
                "body": Raw(reply.content),
            }
            self._write(out, line.custom_id, response, None)

    async def _answered(self, client: httpx2.AsyncClient, line: BatchLine) -> httpx2.Response:
        """Sent again while others leave it no room."""
        self._num_in_flight += 1
        try:
            while True:
                headers = {"Content-Type": "application/json"}
                reply = await client.post(line.url, content=bytes(line.body), headers=headers)
                if reply.status_code not in (429, 503):
                    return reply
                said = reply.json()["error"]
                if said.get("code") == "engine_dead":
                    raise EngineError(f"{said['message']}; what was answered is in {self._target}")
                if self._num_in_flight == 1:
                    return reply
                await asyncio.sleep(FULL_S)
        finally:
            self._num_in_flight -= 1

    def _asked(self, lines: BinaryIO, out: BinaryIO) -> Iterator[BatchLine]:
        """The requests that have no answer yet. A line that is none gets its error at once."""
        own = Counter[str]()
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            try:
                line = _read_line(text)
            except ApiError as error:
                self._refuse(out, number, text, cut(error.message, MAX_WORDS))
                continue
            own[line.custom_id] += 1
            if own[line.custom_id] > 1:
                what = f"custom_id {cut(line.custom_id)!r} is there twice"
                self._refuse(out, number, text, what)
            elif line.custom_id in self._names:
                self._skip(is_failure=self._names[line.custom_id])
            else:
                yield line

    def _skip(self, *, is_failure: bool) -> None:
        self._counts.num_skipped += 1
        self._counts.num_skipped_failed += is_failure
        self._advance(1)

    def _refuse(self, out: BinaryIO, number: int, text: bytes, why: str) -> None:
        """Once for a line with this text."""
        digest = hashlib.sha256(text.strip()).hexdigest()[:32]
        if digest in self._told:
            self._skip(is_failure=True)
            return
        self._counts.num_failed += 1
        message = f"line {number}: {why}"
        told = {"code": "invalid_line", "message": message, "line": number, "line_digest": digest}
        self._write(out, _name_of(text), None, told)

    def _write(
        self, out: BinaryIO, custom_id: str | None, response: Json | None, error: Json | None
    ) -> None:
        head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id}
        out.write(msgspec.json.encode({**head, "response": response, "error": error}) + b"\n")
        out.flush()
        self._advance(1)


def _read_line(text: bytes) -> BatchLine:
    """Raises ApiError, with words for the one who wrote it."""
    line = _decoded(text, BatchLine, "the line")
    if _decoded(bytes(line.body), _Body, "body", "body.").stream:
        raise invalid("body.stream", "a file takes whole answers; leave it out")
    return line


def _decoded(text: bytes, into: type[T], what: str, before: str = "") -> T:
    """As a body is read, which may be only a part of the line: `what`."""
    try:
        return decode(text.strip(), into)
    except ApiError as error:
        if (param := error.body["error"]["param"]) is not None:
            raise invalid(f"{before}{param}", error.message.removeprefix(f"{param}: ")) from None
        raise invalid(None, error.message.replace("the body", what, 1)) from None


def _name_of(text: bytes) -> str | None:
    """The custom_id of a line that is no request, where it has one."""
    try:
        return msgspec.json.decode(text, type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _read_done(target: Path) -> list[_Done]:
    """What the output has already. A last line that was not written to its end is cut off."""
    if not target.exists():
        return []
    done, end = [], 0
    with target.open("r+b") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                break
            end += len(text)
            try:
                done.append(msgspec.json.decode(text, type=_Done))
            except msgspec.MsgspecError:
                raise ConfigError(
                    f"--output-file: line {number} of {target} is no answer of a batch; name "
                    f"another file"
                ) from None
        file.seek(0, os.SEEK_END)
        if file.tell() > end:
            file.truncate(end)
    return done
