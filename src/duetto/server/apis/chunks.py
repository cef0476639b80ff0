"""OpenAI's chunks and bodies around the choices of both endpoints that sample.

What a choice looks like is its shape's affair (shapes.py). Knows no HTTP.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from duetto.core.batch import SampledToken
from duetto.server.apis.protocol import StreamOptions
from duetto.server.apis.replies import Envelope, usage_body
from duetto.server.apis.shapes import ReplyShape
from duetto.server.apis.translator import AnswerStep, Ending, Usage, WholeAnswer, data_event
from duetto.server.http.errors import ApiError
from duetto.server.http.json_parts import Json

DONE = b"data: [DONE]\n\n"
NOT_ENDED: Json = {"finish_reason": None, "stop_reason": None}


class ChunkTranslator:
    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"

    def __init__(
        self,
        shape: ReplyShape,
        envelope: Envelope,
        options: StreamOptions,
        *,
        num_choices: int,
        num_per_prompt: int,
        return_token_ids: bool = False,
    ) -> None:
        self._shape = shape
        self._envelope = envelope
        self._options = options
        self._num_choices = num_choices
        self._num_per_prompt = num_per_prompt
        self._return_token_ids = return_token_ids

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        choices = [self._shape.opening(index) for index in range(self._num_choices)]
        more = self._shape.beside_choices(())
        chunks = [
            self._envelope.around([choice | NOT_ENDED | self._ids(())], **more)
            for choice in choices
            if choice is not None
        ]
        return b"".join([self._event(chunk, usage) for chunk in chunks])

    def step(self, step: AnswerStep, usage: Callable[[], Usage]) -> bytes:
        choice = self._shape.delta(step) | self._ids(step.tokens)
        if step.ending is None:
            return self._event(self._envelope.around([choice | NOT_ENDED]), usage)
        choice |= self._finish(step.choice, step.ending)
        chunk = self._envelope.around([choice], timings=step.ending.timings)
        return self._event(chunk, usage)

    def closing(self, usage: Usage) -> bytes:
        if not self._options.include_usage:
            return DONE
        return data_event(self._envelope.around([], usage=self._usage(usage))) + DONE

    def failed(self, error: ApiError) -> bytes:
        return data_event(error.body) + DONE

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        bodies, is_single = [], len(answers) == 1
        more = self._shape.beside_choices(answers[0].scored)
        for answer in answers:
            first = answer.choice - answer.choice % self._num_per_prompt
            body = self._shape.complete(answer._replace(scored=answers[first].scored))
            if answer.ending is not None:
                body |= self._finish(answer.choice, answer.ending)
                (more if is_single else body)["timings"] = answer.ending.timings
            bodies.append(body | self._ids(answer.tokens))
        return self._envelope.around(
            bodies, usage=self._usage(usage), service_tier=None, kv_transfer_params=None, **more
        )

    def _event(self, chunk: Json, usage: Callable[[], Usage]) -> bytes:
        if self._options.include_usage:  # OpenAI's is null in every chunk but the last
            each = self._options.continuous_usage_stats
            chunk["usage"] = self._usage(usage()) if each else None
        return data_event(chunk)

    def _finish(self, choice: int, ending: Ending) -> Json:
        reason = self._shape.finish_reason(choice, ending.reason)
        return {"finish_reason": reason, "stop_reason": ending.stop_reason}

    def _usage(self, usage: Usage) -> Json:
        return usage_body(usage, self._shape.num_reasoning)

    def _ids(self, tokens: Sequence[SampledToken]) -> Json:
        return {"token_ids": [t.token_id for t in tokens] if self._return_token_ids else None}
