"""What the two endpoints that sample do differently: the shape of a choice.

Both answer the same questions, which exchange.py asks; what is alike is there. Knows no HTTP.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from duetto.core.batch import SampledToken, TokenLogprob
from duetto.core.text import TextCodec, bytes_shown
from duetto.dialects.pieces import CallArguments, CallStart, Content, Reasoning
from duetto.engine.detokenizer import TokenPlaces
from duetto.engine.read_answer import SaidCall, call_id, gathered
from duetto.server.apis.echo import Echo
from duetto.server.apis.protocol import ChatRequest, CompletionRequest
from duetto.server.apis.replies import chat_logprobs, completion_logprobs, id_name, prompt_logprobs
from duetto.server.apis.said import AnswerReader
from duetto.server.apis.translator import AnswerStep, WholeAnswer
from duetto.server.door import EncodedPrompt, Job
from duetto.server.http.json_parts import (
    NUM_AT_ONCE,
    EncodedParts,
    Json,
    JsonColumns,
    JsonRows,
    rows_at_once,
)

# Of a message, what this version never says; clients of OpenAI and of vLLM read these keys.
NOT_SAID: Json = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
}

_NO_ECHO = Echo("")


class ReplyShape(Protocol):
    id_prefix: ClassVar[str]
    reply_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def opening(self, index: int) -> Json | None:
        """The choice of a stream's first chunk, before any token; None if there is none."""
        ...

    def delta(self, step: AnswerStep) -> Json:
        """A choice of a later chunk."""
        ...

    def complete(self, answer: WholeAnswer) -> Json:
        """A choice of a reply that is not streamed."""
        ...

    def beside_choices(self, scored: Sequence[TokenLogprob]) -> Json:
        """What is said once per reply about the prompt."""
        ...

    def finish_reason(self, choice: int, reason: str | None) -> str | None:
        """Of a choice that has been shown, as this endpoint calls it."""
        ...

    @property
    def num_reasoning(self) -> int:
        """Tokens of what the model wrote for itself, so far."""
        ...


class ChatShape:
    id_prefix: ClassVar[str] = "chatcmpl-"
    reply_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, job: Job, codec: TextCodec) -> None:
        self._request = request
        self._job = job
        self._codec = codec
        self._reader = AnswerReader(job.make_parser)
        self._callers = set[int]()  # the choices that call something
        self._shows_reasoning = request.include_reasoning is not False
        last = request.messages[-1] if request.echo and request.messages else None
        self._echoed = "" if last is None or last.role != "assistant" else last.text

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": self._echoed}
        return {"index": index, "delta": delta, "logprobs": None}

    def delta(self, step: AnswerStep) -> Json:
        shown = self._logprobs(step.tokens)
        return {"index": step.choice, "delta": self._delta(step), "logprobs": shown}

    def complete(self, answer: WholeAnswer) -> Json:
        said = gathered(self._reader.read_whole(answer))
        reasoning = said.reasoning if self._shows_reasoning and said.reasoning else None
        if said.calls:
            self._callers.add(answer.choice)
        content = self._echoed + said.content
        message = {
            "role": "assistant",
            "content": content or None if said.calls else content,
            **NOT_SAID,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": _function(call)}
                for call in said.calls
            ],
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        shown = self._logprobs(answer.tokens)
        return {"index": answer.choice, "message": message, "logprobs": shown}

    def finish_reason(self, choice: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and choice in self._callers else reason

    @property
    def num_reasoning(self) -> int:
        return self._reader.num_reasoning

    def _delta(self, step: AnswerStep) -> Json:
        """What a step added; text that is still uncertain comes with a later one."""
        pieces = self._reader.read(step)
        if len(pieces) == 1 and isinstance(pieces[0], Content):  # nearly every token
            return {"content": pieces[0].text}
        contents: list[str] = []
        thoughts: list[str] = []
        calls: list[Json] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    contents.append(text)
                case Reasoning(text):
                    thoughts.append(text)
                case CallStart(index, name):
                    self._callers.add(step.choice)
                    function = {"name": name, "arguments": ""}
                    named = {"id": call_id(), "type": "function", "function": function}
                    calls.append({"index": index, **named})
                case CallArguments(index, text):
                    calls.append({"index": index, "function": {"arguments": text}})
                case _:
                    pass
        delta: Json = {}
        if thoughts and self._shows_reasoning:
            delta["reasoning"] = delta["reasoning_content"] = "".join(thoughts)
        if calls:
            delta["tool_calls"] = calls
        if contents or not delta:
            delta["content"] = "".join(contents)
        return delta

    def beside_choices(self, scored: Sequence[TokenLogprob]) -> Json:
        more: Json = {"prompt_token_ids": None, "prompt_logprobs": None}
        if self._request.return_token_ids:
            more["prompt_token_ids"] = self._job.prompts[0].token_ids
        if self._request.prompt_logprobs is not None:
            more["prompt_logprobs"] = _prompt_rows(scored, self._codec)
        return more

    def _logprobs(self, tokens: Sequence[SampledToken]) -> Json | JsonColumns | None:
        if not self._request.logprobs:
            return None
        shown = [t.logprob for t in tokens if t.logprob is not None]
        as_ids = bool(self._request.return_tokens_as_token_ids)

        def rows(start: int, end: int) -> Json:
            return chat_logprobs(shown[start:end], self._codec, as_ids=as_ids)

        return _columns(shown, rows)


class CompletionShape:
    id_prefix: ClassVar[str] = "cmpl-"
    reply_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, request: CompletionRequest, job: Job, codec: TextCodec) -> None:
        self._request = request
        self._job = job
        self._codec = codec
        self._scored: dict[int, EncodedParts] = {}  # by prompt, whose answers all show the same
        self._shown_at: dict[int, TokenPlaces] = {}  # of the choices that show log-probabilities
        self._num_echoed = Counter[int]()  # tokens of its prompt that a stream's choice has shown

    def opening(self, index: int) -> Json | None:
        text = "" if self._shows_logprobs else self._echo(index).text  # it comes with its scores
        if not text and not self._request.return_token_ids:
            return None
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            **self._ids(index),
        }

    def delta(self, step: AnswerStep) -> Json:
        text, echoed = self._next_echoed(step.choice, len(step.scored))
        shown = self._logprobs(step.choice, step.tokens, step.scored, echoed)
        return {
            "index": step.choice,
            "text": text + step.text,
            "logprobs": shown,
            "prompt_token_ids": None,
        }

    def complete(self, answer: WholeAnswer) -> Json:
        index, scored = answer.choice, answer.scored
        echoed = slice(0, len(self._echo(index).starts))
        choice = {
            "index": index,
            "text": self._echo(index).text + answer.text,
            "logprobs": self._logprobs(index, answer.tokens, scored, echoed),
            **self._ids(index),
            "prompt_logprobs": None,
        }
        if self._request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(index, scored)
        return choice

    def beside_choices(self, scored: Sequence[TokenLogprob]) -> Json:  # noqa: ARG002
        return {}  # a completion may have many prompts, so each choice shows its own

    def finish_reason(self, choice: int, reason: str | None) -> str | None:  # noqa: ARG002
        return reason

    @property
    def num_reasoning(self) -> int:
        return 0

    def _prompt_logprobs(self, index: int, scored: Sequence[TokenLogprob]) -> EncodedParts:
        prompt = index // self._job.sampling.n
        if prompt not in self._scored:
            self._scored[prompt] = EncodedParts(_prompt_rows(scored, self._codec))
        return self._scored[prompt]

    def _prompt(self, index: int) -> EncodedPrompt:
        return self._job.prompts[index // self._job.sampling.n]

    def _echo(self, index: int) -> Echo:
        return self._prompt(index).echo or _NO_ECHO

    def _ids(self, index: int) -> Json:
        shown = self._prompt(index).token_ids if self._request.return_token_ids else None
        return {"prompt_token_ids": shown}

    @property
    def _shows_logprobs(self) -> bool:
        return self._request.logprobs is not None

    def _next_echoed(self, index: int, num_scored: int) -> tuple[str, slice]:
        """The text of a prompt that a stream shows with so many scores, and which tokens it is.
        With the first of them comes the prompt's first token, which nothing scores."""
        echo, start = self._echo(index), self._num_echoed[index]
        end = min(start + num_scored + (start == 0), len(echo.starts))
        if start == end:
            return "", slice(start, end)
        self._num_echoed[index] = end
        ends_at = echo.starts[end] if end < len(echo.starts) else len(echo.text)
        return echo.text[echo.starts[start] if start else 0 : ends_at], slice(start, end)

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[SampledToken],
        scored: Sequence[TokenLogprob],
        echoed: slice,
    ) -> Json | JsonColumns | None:
        """`echoed`: the tokens of its prompt that are shown with these."""
        if not self._shows_logprobs:
            return None
        shown = [t.logprob for t in tokens if t.logprob is not None]
        echo, as_ids = self._echo(index), bool(self._request.return_tokens_as_token_ids)
        offsets, names = [*echo.starts[echoed]], [*echo.token_bytes[echoed]]
        if as_ids and offsets:
            ids = self._prompt(index).token_ids[echoed]
            names = [id_name(token_id).encode() for token_id in ids]
        for token in shown:
            place = self._places(index).push(token.token_id)
            offsets.append(place.start)
            shows = bytes_shown(self._codec.token_bytes(token.token_id), place.text)
            names.append(id_name(token.token_id).encode() if as_ids else shows)
        scorable = [*scored, *shown] if echoed.start < echoed.stop else shown
        num_first = len(offsets) - len(scorable)  # the prompt's first token, which nothing scores

        def rows(start: int, end: int) -> Json:
            part = slice(start + num_first if start else 0, end + num_first)
            return completion_logprobs(
                scorable[start:end], self._codec, offsets[part], names[part], as_ids=as_ids
            )

        return _columns(scorable, rows)

    def _places(self, index: int) -> TokenPlaces:
        if index not in self._shown_at:
            self._shown_at[index] = TokenPlaces(
                lambda ids, skip: self._codec.decode(ids, skip_special_tokens=skip),
                self._prompt(index).token_ids,
                skip_special_tokens=self._job.sampling.skip_special_tokens,
                start=len(self._echo(index).text),
            )
        return self._shown_at[index]


def _function(call: SaidCall) -> Json:
    return {"name": call.name, "arguments": call.arguments}


def _columns(rows: Sequence[TokenLogprob], make: Callable[[int, int], Json]) -> Json | JsonColumns:
    """All rows if they are few, as in a chunk of a stream."""
    num_rows, num_at_once = len(rows), _num_at_once(rows)
    if num_rows <= num_at_once:
        return make(0, num_rows)
    return JsonColumns(num_rows, make, num_at_once)


def _num_at_once(rows: Sequence[TokenLogprob]) -> int:
    return rows_at_once(1 + len(rows[0].top)) if rows else NUM_AT_ONCE


def _prompt_rows(scored: Sequence[TokenLogprob], codec: TextCodec) -> JsonRows:
    """vLLM's list, a few tokens of the prompt at a time; nothing scores the first."""

    def rows(start: int, end: int) -> list[Json | None]:
        return prompt_logprobs(scored[start:end], codec)[1 if start else 0 :]

    return JsonRows(len(scored), rows, _num_at_once(scored))
