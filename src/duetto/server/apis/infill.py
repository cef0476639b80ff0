"""llama.cpp's `/infill`: its body, its events and its reply. Knows no HTTP and no engine.

What stands before the hole is `input_prefix` and then `prompt`, as in llama.cpp's own code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta, Raw, Struct

from duetto.core.batch import SampledToken
from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.infill import ExtraFile
from duetto.server.apis.accepted import ABSENT, Only
from duetto.server.apis.asked import Asked, AskedMiddle, AskedPrompts
from duetto.server.apis.protocol import MAX_MESSAGES, OtherSamplers
from duetto.server.apis.translator import AnswerStep, Ending, Usage, WholeAnswer, data_event
from duetto.server.door import Job
from duetto.server.http.errors import ApiError, invalid, refused
from duetto.server.http.json_parts import Json

MAX_FIELDS = 100
NO_LIMIT = -1  # of n_predict, and no seed
NAMES = {
    "prompt": "input_prefix",
    "max_tokens": "n_predict",
    "repetition_penalty": "repeat_penalty",
}
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "ignore_eos",
)


class InputExtra(Struct, forbid_unknown_fields=True):
    text: str
    filename: str = "tmp"  # as in llama.cpp
    time: Raw = ABSENT  # its clients' own


class InfillRequest(OtherSamplers, kw_only=True):
    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[InputExtra], Meta(max_length=MAX_MESSAGES)] | None = None
    prompt: str | None = None
    model: str | None = None
    stream: bool | None = None
    n_predict: int | None = None  # type: ignore[assignment]  # which others refuse
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None  # type: ignore[assignment]
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    return_tokens: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=MAX_FIELDS)] | None = None
    cache_salt: str | None = None
    id_slot: Raw = ABSENT  # which of them computes it changes nothing
    sse_ping_interval: Raw = ABSENT
    n_cmpl: Annotated[Raw, Only(1)] = ABSENT
    n_cache_reuse: Annotated[Raw, Only(0)] = ABSENT
    min_keep: Annotated[Raw, Only(0)] = ABSENT
    t_max_prompt_ms: Annotated[Raw, Only(0)] = ABSENT
    t_max_predict_ms: Annotated[Raw, Only(0)] = ABSENT


def read_infill(wire: InfillRequest, defaults: Mapping[str, Any]) -> AskedPrompts:
    """Raises ApiError 400, naming the caller's field. `defaults` are the model's own."""
    files = [ExtraFile(extra.filename, extra.text) for extra in wire.input_extra or ()]
    return AskedPrompts(
        asked=Asked(
            sampling=_sampling(wire, defaults),
            stream=bool(wire.stream),
            cache_salt=wire.cache_salt,
            names=NAMES,
        ),
        prompts=[wire.input_prefix + (wire.prompt or "")],
        body=wire,
        middle=AskedMiddle(suffix=wire.input_suffix, files=files, field="input_suffix"),
    )


def _sampling(wire: InfillRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    given = {name: getattr(wire, name) for name in _SAMPLING}
    params = {**defaults, "max_tokens": None}
    params |= {name: value for name, value in given.items() if value is not None}
    if wire.repeat_penalty is not None:
        params["repetition_penalty"] = wire.repeat_penalty
    if wire.n_predict not in (None, NO_LIMIT):
        params["max_tokens"] = wire.n_predict
    if wire.seed not in (None, NO_LIMIT):
        params["seed"] = wire.seed
    if params.get("stop") == "":
        del params["stop"]
    try:
        return SamplingParams(**params)
    except InvalidRequest as error:
        raise refused(error, NAMES) from None


def check_biases(wire: InfillRequest, vocab_size: int) -> None:
    """Refuse more of them than there are tokens, before each is looked at."""
    if (count := len(wire.logit_bias or ())) > vocab_size:
        raise invalid("logit_bias", f"{count} entries are more than the vocabulary of {vocab_size}")


class InfillTranslator:
    keep_alive: ClassVar[bytes] = b": keep-alive\n\n"

    def __init__(self, asked: AskedPrompts, job: Job, codec: TextCodec, model: str) -> None:
        self._wire: InfillRequest = asked.body
        self._job = job
        self._codec = codec
        self._model = model
        self._has_new_line = False
        self._num_predicted = 0

    def opening(self, usage: Callable[[], Usage]) -> bytes:  # noqa: ARG002
        return b""

    def step(self, step: AnswerStep, usage: Callable[[], Usage]) -> bytes:
        """The last event has what llama.cpp's has: all but the text, which has been told."""
        self._has_new_line = self._has_new_line or "\n" in step.text
        self._num_predicted += len(step.tokens)
        said = self._said(step.text, step.tokens, shows_tokens=True)
        if step.ending is None:
            return data_event({**said, "stop": False, **self._counts()})
        return data_event({**said, **self._ended(step.ending, usage())})

    def closing(self, usage: Usage) -> bytes:  # noqa: ARG002
        return b""

    def failed(self, error: ApiError) -> bytes:
        return b"error: " + data_event(error.body).removeprefix(b"data: ")

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        (answer,) = answers
        assert answer.ending is not None
        self._has_new_line = "\n" in answer.text
        self._num_predicted = len(answer.tokens)
        shows = bool(self._wire.return_tokens)
        body = self._said(answer.text, answer.tokens, shows_tokens=shows)
        body |= self._ended(answer.ending, usage)
        fields = self._wire.response_fields
        return body if fields is None else _chosen(body, fields)

    def _said(self, text: str, tokens: Sequence[SampledToken], *, shows_tokens: bool) -> Json:
        ids = [token.token_id for token in tokens] if shows_tokens else []
        return {"index": 0, "content": text, "tokens": ids, "id_slot": NO_LIMIT}

    def _counts(self) -> Json:
        return {
            "tokens_predicted": self._num_predicted,
            "tokens_evaluated": len(self._job.prompts[0].token_ids),
        }

    def _ended(self, ending: Ending, usage: Usage) -> Json:
        word = ending.stop_reason if isinstance(ending.stop_reason, str) else ""
        ids = self._job.prompts[0].token_ids
        return {
            "stop": True,
            "model": self._model,
            **self._counts(),
            "generation_settings": self._settings(),
            "prompt": self._codec.decode(ids, skip_special_tokens=False),
            "has_new_line": self._has_new_line,
            "truncated": False,
            "stop_type": "limit" if ending.reason == "length" else "word" if word else "eos",
            "stopping_word": word,
            "tokens_cached": usage.num_cached,
            "timings": ending.timings,
        }

    def _settings(self) -> Json:
        params, request = self._job.sampling, self._job.requests[0]
        named = {name: getattr(params, name) for name in _SAMPLING if name != "logit_bias"}
        return {
            **named,
            "stop": list(params.stop),
            "repeat_penalty": params.repetition_penalty,
            "n_predict": request.max_tokens,
            "seed": request.seed,
        }


def _chosen(body: Json, fields: Sequence[str]) -> Json:
    """Those that are there, under the names that they were asked by: "timings/prompt_n" too."""
    found: Json = {}
    for field in fields:
        value: Any = body
        for key in field.split("/"):
            value = value.get(key, ABSENT) if isinstance(value, Mapping) else ABSENT
        if value is not ABSENT:
            found[field] = value
    return found
