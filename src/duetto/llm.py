"""The offline door: prompts in, answers out, in this process and on this thread.

Names and result shapes are vLLM's. Knows no arrays: everything it runs, it runs through Engine.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

from duetto.build import Built, build
from duetto.core.config import SchedulerConfig
from duetto.core.embeddings import PoolingParams
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.outputs import EmbeddingRequestOutput, RequestOutput
from duetto.core.request import fan_out
from duetto.core.reuse_choice import ReuseChoice, ReuseRules, insisted
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar
from duetto.core.text import TextCodec
from duetto.demo import NO_MODEL_NAMED, READER
from duetto.dialects.pieces import AnswerPiece
from duetto.engine.engine import Engine
from duetto.engine.intake import make_request
from duetto.engine.offline_answer import OfflineAnswer, said_by
from duetto.engine.offline_cache import OfflineCache
from duetto.engine.offline_embedding import OfflineEmbedding, offline_embedding
from duetto.engine.prompts import A_PROMPT, Prompt, prompt_of_chat, read_prompt
from duetto.engine.read_answer import PlainParser, message_of
from duetto.engine.speech import ChatPlan
from duetto.engine.tool_rules import ToolRules, offline_rules
from duetto.engine.virtual_engines import VirtualEngines
from duetto.progress import show_progress

logger = logging.getLogger(__name__)

ChatMessage = Mapping[str, Any]
ReuseGiven = str | Mapping[str, Any] | bool | None
T = TypeVar("T")
A = TypeVar("A", OfflineAnswer, OfflineEmbedding)


class LLM:
    """A model, ready to answer.

        with LLM("path/to/checkpoint") as llm:
            (answer,) = llm.generate("Once upon a time", SamplingParams(max_tokens=20))
            print(answer.outputs[0].text)

    Without a model it is the small reader that ships with Duetto, `LLM("duetto-demo")`. Keyword
    arguments are the fields of EngineArgs (build.py), with target_itl="off" by default; or give
    `args` whole. Raises
    ConfigError or CheckpointError, in one line, if the model cannot be served as asked. One LLM
    belongs to one thread, on which several streams may be open at a time. What was chosen on the
    caller's behalf is logged as a warning.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        args: EngineArgs | None = None,
        **engine_args: Any,
    ) -> None:
        # Who generates reads whole answers, so nothing is gained by cutting prompts for the sake of
        # streams, and throughput is lost. Whoever streams beside prompts may ask for "auto".
        args = replace(args or EngineArgs(target_itl="off"), **engine_args)
        if model is None:
            logger.warning("note: %s", NO_MODEL_NAMED)
        self._open: Built | None = build(READER if model is None else model, args)
        for note in self._open.notes:
            logger.warning("note: %s", note)
        self._reuse = ReuseRules(why_not=insisted, limits=self._open.model.reuse_limits)
        self._seed = 0 if args.seed is None else args.seed
        self._num_prompts = 0
        self.is_stopped: Callable[[], bool] = lambda: False
        """Asked before each step: once true, what runs is aborted, and ends as it is."""
        # By the id of each request that has not ended.
        self._running: dict[str, OfflineAnswer | OfflineEmbedding] = {}

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
        """Abort what runs and give the model's memory back; a second time changes nothing."""
        if self._open is not None:
            self._abort(list(self._running))
            self._open.model.close()
            self._open = None

    @property
    def _built(self) -> Built:
        if self._open is None:
            raise EngineError("this LLM is closed")
        return self._open

    @property
    def engine(self) -> Engine | VirtualEngines:
        """What runs the requests, for those who measure. Raises EngineError once closed."""
        return self._built.engine

    @property
    def config(self) -> SchedulerConfig:
        return self._built.scheduler_config

    @property
    def computed_s(self) -> tuple[float, ...]:
        """Seconds that each part of the model (--tp, --pp) has computed; none: there are none."""
        return self._built.model.computed_s

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
        reuse: ReuseGiven = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, in their order. A prompt is a text, {"prompt_token_ids": [...]} or
        {"segments": [...]}: texts or ids, of which some are {"text": ..., "reusable": True}. With
        "suffix" beside "prompt" the answer is what stands between the two (fill in the middle).

        `reuse` chooses how the reusable ones are used wherever they stand (docs/api.md), as
        "first:16" or {"method": "first", "num_first": 16}. This changes answers; without it all is
        computed. `priority` has one number per prompt, lower first (scheduling_policy="priority").
        `use_tqdm` shows a progress bar if stderr is a terminal. Raises InvalidRequest, before
        anything is computed, if any prompt or parameter is refused. An answer that the engine
        failed on has finish_reason "error"; the others are whole.
        """
        answers = self._make_answers(prompts, sampling_params, priority, reuse)
        return self._whole(answers, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reuse: ReuseGiven = None,
    ) -> Iterator[RequestOutput]:
        """Answer prompts, yielding an answer each time that it has grown; outputs are cumulative.

        Refuses at once, as `generate` does; computes as the iterator is advanced. Leaving the loop
        early aborts what is still running.
        """
        answers = self._make_answers(prompts, sampling_params, None, reuse)
        return (answer.snapshot() for answer in self._run(answers))

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
        reuse: ReuseGiven = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several through the checkpoint's chat template.

        `tools` are functions that the model is told of, [{"type": "function", "function": {...}}],
        where the template shows them. `tool_choice` is OpenAI's: calls that are required, or that
        the model begins, are held to their schema. An output's `message` has the calls, and what
        the model wrote for itself, apart from its content. With `continue_final_message` the last
        message, which is the assistant's, is gone on with. Reusable are text parts with "cache":
        "reusable", and the "text" of each of `documents`, which all conversations are given, where
        the template reads them.
        """
        rules = offline_rules(tools, tool_choice)
        prompts = [
            self.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=None if rules is None else tools,
                chat_template_kwargs=chat_template_kwargs,
                documents=documents,
            )
            for conversation in _as_conversations(messages)
        ]
        plans, answers = self._make_chats(prompts, sampling_params, rules, reuse)
        found = self._whole(answers, use_tqdm=use_tqdm)
        for plan, output in zip(plans, found, strict=True):
            for completion in output.outputs:
                parser = (plan.make_parser or PlainParser)()
                completion.message = message_of(parser, completion.text)
        return found

    def stream_chat(
        self,
        messages: Sequence[ChatMessage],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> Iterator[tuple[RequestOutput, list[AnswerPiece]]]:
        """Answer one conversation: the (first) answer each time that it has grown, and what that
        adds, as content, reasoning and calls. The last output has a `message`, as of `chat`."""
        rules = offline_rules(tools, tool_choice)
        prompt = self.chat_prompt(messages, tools=None if rules is None else tools)
        (plan,), answers = self._make_chats([prompt], sampling_params, rules, None)
        return said_by(self._run(answers), plan.make_parser or PlainParser)

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """The prompt that a conversation becomes, as `generate` and `stream` take it."""
        return prompt_of_chat(
            self._built.codec,
            messages,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=chat_template_kwargs,
            documents=documents,
            tools=tools or (),
            continue_final_message=continue_final_message,
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of texts, in their order, of a model that is run for them (`runner`).

        A text may be ids, as for `generate`. `prompt_name` is one of the checkpoint's prompts
        (config_sentence_transformers.json), which is put before each text; ids are taken as they
        are. Raises InvalidRequest, before anything is computed, if any of it is refused. Where the
        engine failed, `error` says so.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        params = PoolingParams() if pooling_params is None else pooling_params
        if not isinstance(params, PoolingParams):
            raise InvalidRequest("pooling_params", f"must be PoolingParams, not {params!r:.80}")
        of_model, codec = (self._built.model.embeddings, prompt_name), self._built.codec
        found = [
            offline_embedding(number, prompt, params, *of_model, codec, self.config)
            for number, prompt in enumerate(_listed("prompt", prompts, f"{A_PROMPT}, or several"))
        ]
        with show_progress("embedding", total=len(found), visible=use_tqdm) as bar:
            for embedding in self._run(found):
                bar.advance(embedding.output.finished)
        return [embedding.output for embedding in found]

    @property
    def cache(self) -> OfflineCache:
        """What the KV cache holds of a text, and what it keeps: `lookup`, `pin`, `unpin`, `drop`
        and `pins` (docs/design/cache-control.md)."""
        return OfflineCache(self._built.codec, self.config, self.engine.control)

    def reset_prefix_cache(self) -> None:
        """Forget every reusable prefix. What lies on a disk is found by the next start only."""
        self.engine.forget_cached()

    # --- how -------------------------------------------------------------------------------

    def _whole(self, answers: list[OfflineAnswer], *, use_tqdm: bool) -> list[RequestOutput]:
        with show_progress("answering", total=len(answers), visible=use_tqdm) as bar:
            for answer in self._run(answers):
                bar.advance(answer.output.finished)
        return [answer.output for answer in answers]

    def _make_chats(
        self,
        prompts: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        rules: ToolRules | None,
        reuse: ReuseGiven,
    ) -> tuple[list[ChatPlan], list[OfflineAnswer]]:
        asked = zip(prompts, self._params_for(prompts, sampling_params), strict=True)
        plans = [self._built.speech.plan(rules, one["prompt"], params) for one, params in asked]
        params, grammars = [plan.sampling for plan in plans], [plan.grammar for plan in plans]
        return plans, self._make_answers(prompts, params, None, reuse, grammars)

    def _make_answers(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        reuse: ReuseGiven,
        grammars: Sequence[Grammar | None] | None = None,
    ) -> list[OfflineAnswer]:
        """All or nothing: a call that is refused changes no later one's seeds."""
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        each = _listed("prompt", prompts, f"{A_PROMPT}, or several")
        params = self._params_for(each, sampling_params)
        if priority is None:
            priorities = [0] * len(each)
        else:
            priorities = _listed("priority", priority, "whole numbers, one for each prompt")
        if len(priorities) != len(each):
            raise InvalidRequest("priority", f"{len(priorities)} numbers for {len(each)} prompts")
        choice = self._reuse.chosen(reuse)
        answers = [
            self._make_answer(self._num_prompts + index, *one, choice)
            for index, one in enumerate(
                zip(each, params, priorities, grammars or [None] * len(each), strict=True)
            )
        ]
        self._num_prompts += len(answers)
        return answers

    def _make_answer(
        self,
        number: int,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        grammar: Grammar | None,
        choice: ReuseChoice | None,
    ) -> OfflineAnswer:
        self.config.check_priority(priority)
        read = read_prompt(prompt, self._built.codec)
        asked = None if choice is None else self._reuse.asked(choice, read.reusable, read.refusal)
        if grammar is None and params.structured_outputs is not None:
            grammar = self._built.grammars.make(params.structured_outputs)
        request = make_request(
            read.token_ids,
            params,
            codec=self._built.codec,
            config=self.config,
            request_id=str(number),
            arrival_time=monotonic(),
            default_seed=self._seed + number,
            priority=priority,
            cache_salt=read.cache_salt,
            reuse=asked,
            grammar=grammar,
            end_token_ids=read.end_token_ids,
        )
        return OfflineAnswer.of(read.text, fan_out(request), self._built.codec)

    def _params_for(
        self,
        prompts: Sequence[Prompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            each = [given] * len(prompts)
        else:
            each = _listed("sampling_params", given, "SamplingParams, or several")
        if len(each) != len(prompts):
            raise InvalidRequest("sampling_params", f"{len(each)} for {len(prompts)} prompts")
        for params in each:
            if not isinstance(params, SamplingParams):
                raise InvalidRequest("sampling_params", f"must be SamplingParams, not {params!r}")
        return each

    def _run(self, answers: list[A]) -> Iterator[A]:
        """Run requests to their end, yielding each answer that has grown."""
        try:
            for answer in answers:
                answer.arrive(monotonic())
                for request in answer.requests:
                    self.engine.add(request)
                    self._running[request.request_id] = answer
            while any(answer.has_grown or not answer.output.finished for answer in answers):
                if not any(answer.has_grown for answer in answers):
                    if self.is_stopped():
                        self._abort(list(self._running))
                    else:
                        self._step()
                for answer in answers:
                    if answer.has_grown:
                        answer.has_grown = False
                        yield answer
        finally:
            self._abort([r.request_id for answer in answers for r in answer.requests])
            if self._open is not None and not self._running and self.engine.has_work:
                self.engine.step()  # KV that was published last goes to the disk

    def _step(self) -> None:
        """One step of the engine; another stream that is open gets what is its own."""
        for update in self.engine.step().updates:
            self._running[update.request_id].take(update)
            if update.finish_reason is not None:
                del self._running[update.request_id]

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            answer = self._running.pop(request_id, None)
            if answer is not None and (update := self.engine.abort(request_id)) is not None:
                answer.take(update)


def _listed(field: str, given: Iterable[T], accepted: str) -> list[T]:
    """What callers give several of; `accepted` is for people."""
    if not isinstance(given, Iterable):
        raise InvalidRequest(field, f"must be {accepted}, not {given!r:.80}")
    return list(given)


def _as_conversations(
    messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
) -> list[Sequence[ChatMessage]]:
    if not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest("messages", f"must be a list of messages, not {messages!r:.80}")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]  # told apart by the first element
    return list(messages)  # type: ignore[arg-type]
