"""The growing answer to one prompt of `LLM`, from the updates of the requests that make it.

Result shapes are vLLM's. Knows no engine.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from duetto.core.batch import RequestUpdate, TokenLogprob
from duetto.core.outputs import CompletionOutput, Logprob, RequestOutput
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec, bytes_shown
from duetto.dialects.pieces import AnswerParser, AnswerPiece
from duetto.engine.read_answer import message_of


@dataclass(slots=True)
class OfflineAnswer:
    """The growing answer to one prompt, from the requests that make it."""

    output: RequestOutput
    requests: list[Request]
    codec: TextCodec
    has_grown: bool = False  # since it was last shown

    @staticmethod
    def of(prompt: str | None, requests: list[Request], codec: TextCodec) -> "OfflineAnswer":
        first = requests[0]
        scored = first.sampling.prompt_logprobs is not None
        output = RequestOutput(
            request_id=first.request_id,
            prompt=prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=[_empty_completion(i, r.sampling) for i, r in enumerate(requests)],
            prompt_logprobs=[None] if scored else None,
        )
        return OfflineAnswer(output, requests, codec)

    def arrive(self, now: float) -> None:
        """Latency counts from here: a stream may be made long before it is begun."""
        self.requests = [replace(request, arrival_time=now) for request in self.requests]

    def snapshot(self) -> RequestOutput:
        """The output as it is now; later growth does not show in it."""
        outputs = [
            replace(
                completion,
                token_ids=list(completion.token_ids),
                logprobs=None if completion.logprobs is None else list(completion.logprobs),
            )
            for completion in self.output.outputs
        ]
        return replace(self.output, outputs=outputs)

    def take(self, update: RequestUpdate) -> None:
        self.has_grown = True
        index = next(i for i, r in enumerate(self.requests) if r.request_id == update.request_id)
        completion = self.output.outputs[index]
        completion.text += update.text
        for token in update.tokens:
            completion.token_ids.append(token.token_id)
            if completion.logprobs is not None and token.logprob is not None:
                text = update.text if len(update.tokens) == 1 else ""
                completion.logprobs.append(self._logprobs(token.logprob, text))
                completion.cumulative_logprob = (
                    completion.cumulative_logprob or 0.0
                ) + token.logprob.logprob
        if index == 0:  # every one of n answers scores the same prompt
            self.output.num_cached_tokens = update.num_cached_tokens
            if self.output.prompt_logprobs is not None:
                self.output.prompt_logprobs += map(self._logprobs, update.prompt_logprobs)
        if update.finish_reason is not None:
            completion.finish_reason = update.finish_reason.value
            completion.stop_reason = update.stop_reason
            completion.error = update.error
            completion.timings = update.timings
            self.output.finished = all(c.finish_reason for c in self.output.outputs)

    def _logprobs(self, scored: TokenLogprob, text: str = "") -> dict[int, Logprob]:
        """The token itself, which added `text` (if that is known), and the likeliest, by id."""
        found = {scored.token_id: (scored.logprob, scored.rank)}
        for rank, (token_id, logprob) in enumerate(scored.top, start=1):
            found.setdefault(token_id, (logprob, rank))
        names = {token_id: self.codec.token_text(token_id) for token_id in found}
        if text:
            shown = bytes_shown(self.codec.token_bytes(scored.token_id), text)
            names[scored.token_id] = shown.decode(errors="replace")
        return {i: Logprob(p, rank, names[i]) for i, (p, rank) in found.items()}


def said_by(
    answers: Iterable[OfflineAnswer], make_parser: Callable[[], AnswerParser]
) -> Iterator[tuple[RequestOutput, list[AnswerPiece]]]:
    """An answer each time that it has grown, and what that adds; at its end, with its message."""
    parser, num_read = make_parser(), 0
    for answer in answers:
        output = answer.snapshot()
        completion = output.outputs[0]
        pieces = parser.push(completion.text[num_read:])
        num_read = len(completion.text)
        if output.finished:
            pieces += parser.finish()
            completion.message = message_of(make_parser(), completion.text)
        yield output, pieces


def _empty_completion(index: int, sampling: SamplingParams) -> CompletionOutput:
    return CompletionOutput(index=index, logprobs=None if sampling.logprobs is None else [])
