"""The offline door: prompts in, answers out, in this process and on this thread.

Names and result shapes are vLLM's. Knows no arrays: everything it runs, it runs through Engine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from duetto.build import EngineArgs, build
from duetto.core.batch import RequestUpdate, TokenLogprob
from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.outputs import CompletionOutput, Logprob, RequestOutput
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.intake import make_requests
from duetto.progress import show_progress

Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model, ready to answer.

        with LLM("path/to/checkpoint") as llm:
            (answer,) = llm.generate("Once upon a time", SamplingParams(max_tokens=20))
            print(answer.outputs[0].text)

    Keyword arguments are those of EngineArgs (build.py). Raises ConfigError or CheckpointError, in
    one line, if the model cannot be served as asked. One LLM belongs to one thread.
    """

    def __init__(self, model: str | Path, **engine_args: Any) -> None:
        args = EngineArgs(**engine_args)
        self._built = build(model, args)
        self.engine = self._built.engine
        self.config = self._built.scheduler_config
        self._seed = args.seed
        self._ids = count()
        self._is_closed = False

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the model's memory back. Nothing can be generated afterwards."""
        self._is_closed = True
        del self._built, self.engine

    def get_tokenizer(self) -> TextCodec:
        return self._built.codec

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, over our defaults."""
        return SamplingParams(**self._built.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, in their order. A prompt is a text or {"prompt_token_ids": [...]}.

        `priority` has one number per prompt, lower first (scheduling_policy="priority").
        `use_tqdm` shows a progress bar if stderr is a terminal. Raises InvalidRequest, before
        anything is computed, if any prompt or parameter is refused. An answer that the engine
        failed on has finish_reason "error"; the others are whole.
        """
        answers = self._make_answers(prompts, sampling_params, priority)
        with show_progress("answering", total=len(answers), visible=use_tqdm) as bar:
            for output in self._run(answers):
                bar.advance(output.finished)
        return [answer.output for answer in answers]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer prompts, yielding an answer each time that it grows; outputs are cumulative.

        Leaving the loop early aborts what is still running.
        """
        return self._run(self._make_answers(prompts, sampling_params, None))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several through the checkpoint's chat template."""
        prompts = [
            self.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in _as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The prompt that a conversation becomes, as `generate` and `stream` take it."""
        text = self._built.codec.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=chat_template_kwargs,
        )
        # The template has written the special tokens; the tokenizer must not add them again.
        token_ids = self._built.codec.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def reset_prefix_cache(self) -> None:
        """Forget every reusable prefix."""
        self.engine.scheduler.pool.forget_all()

    # --- how -------------------------------------------------------------------------------

    def _make_answers(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list["_Answer"]:
        if self._is_closed:
            raise EngineError("this LLM is closed")
        each = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(each, sampling_params)
        priorities = [0] * len(each) if priority is None else list(priority)
        if len(priorities) != len(each):
            raise InvalidRequest("priority", f"{len(priorities)} numbers for {len(each)} prompts")
        return [self._make_answer(*one) for one in zip(each, params, priorities, strict=True)]

    def _make_answer(self, prompt: Prompt, params: SamplingParams, priority: int) -> "_Answer":
        text, token_ids = self._tokenize(prompt)
        number = next(self._ids)
        requests = make_requests(
            token_ids,
            params,
            codec=self._built.codec,
            config=self.config,
            request_id=str(number),
            arrival_time=monotonic(),
            default_seed=self._seed + number,
            priority=priority,
        )
        return _Answer.of(text, requests, self._built.codec)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._built.codec.encode(prompt)
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), list(prompt["prompt_token_ids"])
        if isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], self._built.codec.encode(prompt["prompt"])
        raise InvalidRequest("prompt", 'must be a text or {"prompt_token_ids": [...]}')

    def _params_for(
        self,
        prompts: Sequence[Prompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * len(prompts)
        if len(given) != len(prompts):
            raise InvalidRequest("sampling_params", f"{len(given)} for {len(prompts)} prompts")
        return list(given)

    def _run(self, answers: list["_Answer"]) -> Iterator[RequestOutput]:
        """Run requests to their end, yielding each answer that a step changed."""
        owner = {r.request_id: answer for answer in answers for r in answer.requests}
        try:
            for answer in answers:
                for request in answer.requests:
                    self.engine.add(request)
            while not all(answer.output.finished for answer in answers):
                changed: dict[str, _Answer] = {}
                for update in self.engine.step().updates:
                    answer = owner[update.request_id]
                    answer.take(update)
                    changed[answer.output.request_id] = answer
                for answer in changed.values():
                    yield answer.output
        finally:
            for request_id in owner:
                self.engine.abort(request_id)


@dataclass(slots=True)
class _Answer:
    """The growing answer to one prompt, from the requests that make it."""

    output: RequestOutput
    requests: list[Request]
    codec: TextCodec

    @staticmethod
    def of(prompt: str | None, requests: list[Request], codec: TextCodec) -> "_Answer":
        first = requests[0]
        scored = first.sampling.prompt_logprobs is not None
        output = RequestOutput(
            request_id=first.request_id,
            prompt=prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=[_empty_completion(i, r.sampling) for i, r in enumerate(requests)],
            prompt_logprobs=[None] if scored else None,
        )
        return _Answer(output, requests, codec)

    def take(self, update: RequestUpdate) -> None:
        index = next(i for i, r in enumerate(self.requests) if r.request_id == update.request_id)
        completion = self.output.outputs[index]
        completion.text += update.text
        for token in update.tokens:
            completion.token_ids.append(token.token_id)
            if completion.logprobs is not None and token.logprob is not None:
                completion.logprobs.append(self._logprobs(token.logprob))
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

    def _logprobs(self, scored: TokenLogprob) -> dict[int, Logprob]:
        """The token itself and the likeliest, by token id."""
        found = {scored.token_id: (scored.logprob, scored.rank)}
        for rank, (token_id, logprob) in enumerate(scored.top, start=1):
            found.setdefault(token_id, (logprob, rank))
        return {i: Logprob(p, rank, self.codec.token_text(i)) for i, (p, rank) in found.items()}


def _empty_completion(index: int, sampling: SamplingParams) -> CompletionOutput:
    return CompletionOutput(index=index, logprobs=None if sampling.logprobs is None else [])


def _as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]  # told apart by the first element
    return list(messages)  # type: ignore[arg-type]
