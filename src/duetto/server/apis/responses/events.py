"""What an answer becomes for clients of /v1/responses: its object, and its typed events.

An answer is a list of items (reasoning, message, function calls); a stream opens an item, adds to
it and closes it before the next, and numbers its events. Knows no HTTP and no store.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from duetto.core.batch import SampledToken
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.dialects.pieces import AnswerPiece, CallArguments, CallStart, Content, Reasoning
from duetto.engine.read_answer import call_id
from duetto.server.apis.replies import chat_logprobs
from duetto.server.apis.responses.body import ResponsesRequest
from duetto.server.apis.said import AnswerReader
from duetto.server.apis.translator import AnswerStep, Ending, Usage, WholeAnswer, named_event
from duetto.server.http.errors import ApiError
from duetto.server.http.json_parts import Json

_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


@dataclass(slots=True)
class _Item:
    """An item of the output, while it grows."""

    kind: str
    id: str
    name: str = ""
    call_id: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def shown(self, status: str) -> Json:
        """As it is added, or as it is done: then with its text."""
        is_new, text = status == "in_progress", self.text
        match self.kind:
            case "message":
                content = [] if is_new else [output_text(text, self.logprobs)]
                more: Json = {"role": "assistant", "content": content}
            case "reasoning":
                content = [] if is_new else [{"type": "reasoning_text", "text": text}]
                more = {"summary": [], "content": content, "encrypted_content": None}
            case _:
                more = {"call_id": self.call_id, "name": self.name, "arguments": text}
        return {"type": self.kind, "id": self.id, "status": status, **more}


def output_text(text: str, logprobs: Sequence[Json] = ()) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


class ResponsesTranslator:
    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"

    def __init__(
        self,
        request: ResponsesRequest,
        response_id: str,
        created: int,
        reader: AnswerReader,
        codec: TextCodec,
        on_end: Callable[[Json], None],
        *,
        model: str,
        stores: bool,
        sampling: SamplingParams,
    ) -> None:
        """`on_end` is given the object of an answer that has ended, and completes it. `sampling` is
        what is done: the object tells temperature and the like also where the request says nothing.
        """
        self._request = request
        self._id = response_id
        self._created = created
        self._reader = reader
        self._codec = codec
        self._on_end = on_end
        self._model = model
        self._stores = stores
        self._sampling = sampling
        self._items = list[_Item]()
        self._is_open = False
        self._waiting = list[Json]()  # log-probabilities of tokens whose text is still uncertain
        self._last = list[Json]()  # of the token that ended the answer
        self._num_events = 0
        self._ending: Ending | None = None

    # --- streamed --------------------------------------------------------------------------------

    def opening(self, usage: Callable[[], Usage]) -> bytes:  # noqa: ARG002
        body = self.body("in_progress", None)
        return b"".join(
            [
                self._event(name, response=body)
                for name in ("response.created", "response.in_progress")
            ]
        )

    def step(self, step: AnswerStep, usage: Callable[[], Usage]) -> bytes:  # noqa: ARG002
        self._ending = step.ending
        self._wait(step)
        return b"".join([self._piece(piece) for piece in self._reader.read(step)])

    def closing(self, usage: Usage) -> bytes:
        status = _status(self._ending)
        self._spend_rest()
        closed = self._close(status)
        body = self.body(status, usage)
        self._on_end(body)
        return closed + self._event(f"response.{status}", response=body)

    def failed(self, error: ApiError) -> bytes:
        said = error.body["error"]
        code = said["code"] or said["type"]
        body = self.body("failed", None)
        body["error"] = {"code": code, "message": said["message"]}
        self._on_end(body)
        first = self._event("error", code=code, message=said["message"], param=said["param"])
        return first + self._event("response.failed", response=body)

    # --- whole -----------------------------------------------------------------------------------

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        answer = answers[0]
        self._ending = answer.ending
        for step in _steps_of(answer):
            self._wait(step)
            for piece in self._reader.read(step):
                self._take(piece)
        self._spend_rest()
        self._is_open = False
        body = self.body(_status(answer.ending), usage)
        self._on_end(body)
        return body

    # --- both ------------------------------------------------------------------------------------

    def body(self, status: str, usage: Usage | None) -> Json:
        """The response object, with the items that are done."""
        request, ending = self._request, self._ending
        done = self._items[:-1] if self._is_open else self._items
        last = len(done) - 1
        output = [
            item.shown(status if i == last and status == "incomplete" else "completed")
            for i, item in enumerate(done)
        ]
        text = request.text
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {
                "effort": None if request.reasoning is None else request.reasoning.effort,
                "summary": None,
            },
            "service_tier": request.service_tier or "default",
            "store": self._stores,
            "temperature": self._sampling.temperature,
            "text": {"format": _format(request), "verbosity": "medium"}
            if text is not None
            else {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": _tool_choice(request),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": self._sampling.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None if usage is None else responses_usage(usage, self._reader.num_reasoning),
            "user": request.user,
            "metadata": request.metadata or {},
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "safety_identifier": request.safety_identifier,
            "prompt_cache_key": request.prompt_cache_key,
            "timings": None if ending is None else ending.timings,
        }

    def _piece(self, piece: AnswerPiece) -> bytes:
        kind = _kind(piece)
        if kind is None:
            return b""
        before = self._close("completed") if self._starts_item(piece, kind) else b""
        is_new, logprobs = self._take(piece)
        item, at = self._items[-1], len(self._items) - 1
        opened = before
        if is_new:
            opened += self._event(
                "response.output_item.added", output_index=at, item=item.shown("in_progress")
            )
            if kind != "function_call":
                part = _part(kind, "")
                opened += self._event("response.content_part.added", **self._at(item), part=part)
        if isinstance(piece, CallStart):
            return opened
        text = piece.text  # type: ignore[union-attr]
        if kind == "function_call":
            where = {"item_id": item.id, "output_index": at}
            name = "response.function_call_arguments.delta"
            return opened + self._event(name, **where, delta=text)
        more: Json = {"logprobs": logprobs} if kind == "message" else {}
        name = f"response.{_part(kind, '')['type']}.delta"
        return opened + self._event(name, **self._at(item), delta=text, **more)

    def _starts_item(self, piece: AnswerPiece, kind: str) -> bool:
        if isinstance(piece, CallStart) or not self._is_open:
            return True
        return self._items[-1].kind != kind

    def _take(self, piece: AnswerPiece) -> tuple[bool, list[Json]]:
        """Add a piece to the output; whether that begins an item, and the log-probabilities of a
        message's text. Those of other text are not shown."""
        kind = _kind(piece)
        if kind is None:
            return False, []
        text = piece.text if isinstance(piece, Content) else ""
        logprobs, self._waiting = _last_that_spell(text, self._waiting), []
        is_new = self._starts_item(piece, kind)
        if is_new:
            item = _Item(kind, call_id(_PREFIXES[kind]))
            if isinstance(piece, CallStart):
                item.name, item.call_id = piece.name, call_id()
            self._items.append(item)
            self._is_open = True
        item = self._items[-1]
        if not isinstance(piece, CallStart):
            item.texts.append(piece.text)  # type: ignore[union-attr]
        item.logprobs += logprobs
        return is_new, logprobs

    def _wait(self, step: AnswerStep) -> None:
        """Keep the log-probabilities of a step for the text that becomes certain."""
        shown, ending = self._logprobs(step.tokens), step.ending
        if (
            ending is not None
            and ending.reason == "stop"
            and not isinstance(ending.stop_reason, str)
        ):
            shown, self._last = shown[:-1], shown[-1:]
        self._waiting += shown

    def _spend_rest(self) -> None:
        """The token that ends an answer has no text."""
        if self._is_open and self._items[-1].kind == "message":
            self._items[-1].logprobs += [*self._waiting, *self._last]
        self._waiting = []

    def _close(self, status: str) -> bytes:
        """The events that end the item that is open."""
        if not self._is_open:
            return b""
        self._is_open = False
        item, at = self._items[-1], len(self._items) - 1
        if item.kind == "function_call":
            where = {"item_id": item.id, "output_index": at, "name": item.name}
            events = self._event(
                "response.function_call_arguments.done", **where, arguments=item.text
            )
        else:
            part = _part(item.kind, item.text, item.logprobs)
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            events = self._event(
                f"response.{part['type']}.done", **self._at(item), text=item.text, **more
            )
            events += self._event("response.content_part.done", **self._at(item), part=part)
        shown = item.shown("incomplete" if status == "incomplete" else "completed")
        return events + self._event("response.output_item.done", output_index=at, item=shown)

    def _at(self, item: _Item) -> Json:
        return {"item_id": item.id, "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._num_events += 1
        body = {"type": name, "sequence_number": self._num_events - 1, **fields}
        return named_event(name, body)

    def _logprobs(self, tokens: Sequence[SampledToken]) -> list[Json]:
        shown = [token.logprob for token in tokens if token.logprob is not None]
        if not shown:
            return []
        content: list[Json] = chat_logprobs(shown, self._codec)["content"]
        return content


def _last_that_spell(text: str, logprobs: list[Json]) -> list[Json]:
    """Those of the tokens that a text is made of; what stands before them was a marker."""
    missing, first = len(text.encode(errors="replace")), len(logprobs)
    while missing > 0 and first:
        first -= 1
        missing -= len(logprobs[first]["bytes"] or ())
    return logprobs[first:]


def _steps_of(answer: WholeAnswer) -> Iterator[AnswerStep]:
    at = 0
    *steps, last = answer.steps or [(answer.text, len(answer.tokens))]
    for text, num_tokens in steps:
        yield AnswerStep(0, text, (*answer.tokens[at : at + num_tokens],), None)
        at += num_tokens
    ending = answer.ending or Ending(None, None, None)
    yield AnswerStep(0, last[0], (*answer.tokens[at:],), ending)


def responses_usage(usage: Usage, num_reasoning: int) -> Json:
    return {
        "input_tokens": usage.num_prompt,
        # No token is billed for being written to the cache; openai's types need the field.
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_output,
    }


def _kind(piece: AnswerPiece) -> str | None:
    match piece:
        case Content():
            return "message"
        case Reasoning():
            return "reasoning"
        case CallStart() | CallArguments():
            return "function_call"
        case _:
            return None


def _part(kind: str, text: str, logprobs: Sequence[Json] = ()) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return output_text(text, logprobs)


def _status(ending: Ending | None) -> str:
    return "incomplete" if ending is not None and ending.reason == "length" else "completed"


def _format(request: ResponsesRequest) -> Json:
    wanted = None if request.text is None else request.text.format
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return {
        "type": wanted.type,
        "name": wanted.name,
        "schema": wanted.schema,
        "description": wanted.description,
        "strict": wanted.strict is not False,
    }


def _tool(tool: Any) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _tool_choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return {"type": "function", "name": choice.name}
