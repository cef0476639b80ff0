"""What reuse of KV does to a model's answers, measured through the engine that serves them.

Each question is answered after a full prefill. Then, for each choice, that same answer is followed
token by token with reused KV: how often the likeliest token is the same, and how far apart the
distributions are. Where they part, the model answers once more by itself, and it is counted who was
right. Knows no model, no flags and no files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

from duetto.core.batch import (
    RequestResult,
    SampledToken,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.config import SchedulerConfig
from duetto.core.errors import ConfigError, EngineError, InvalidRequest
from duetto.core.executor import Done, Executor
from duetto.core.request import FinishReason, Request
from duetto.core.reuse_choice import NO_LIMITS, ReuseChoice, ReuseLimits
from duetto.core.sampling_params import MAX_LOGPROBS, SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.engine import Engine
from duetto.engine.intake import make_request
from duetto.evals.reuse_questions import AskedPrompt, ReuseQuestion
from duetto.evals.reuse_verdicts import ChoiceQuality, PairedScore

_LEAST_SHARE = 1e-9  # of a distribution: what is left of it may round to less than nothing


class FollowedAnswers:
    """An executor with which requests say what they are told to: what it computes is another's,
    and so are the log-probabilities; only the token is exchanged that goes on to the next step."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.answers: Mapping[str, Sequence[int]] = {}  # by request

    def submit(self, batch: ScheduledBatch) -> Done:
        output = self._executor.submit(batch).result()
        pairs = zip(batch.requests, output.results, strict=True)
        results = tuple([self._followed(request, result) for request, result in pairs])
        return Done(StepOutput(results, output.drafting_s))

    def _followed(self, request: ScheduledRequest, result: RequestResult) -> RequestResult:
        answer = self.answers.get(request.request_id)
        if answer is None or not result.tokens:
            return result
        (sampled,) = result.tokens  # nothing is drafted
        place = request.rows[-1].num_output_tokens
        return result._replace(tokens=(sampled._replace(token_id=answer[place]),))


@dataclass(frozen=True, slots=True)
class QualityBench:
    """What answers questions. The engine's executor is `followed`, and it has nothing to do."""

    engine: Engine
    followed: FollowedAnswers
    codec: TextCodec
    config: SchedulerConfig
    max_tokens: int  # of an answer
    limits: ReuseLimits = NO_LIMITS

    def answers(
        self,
        prompts: Sequence[AskedPrompt],
        choice: ReuseChoice | None = None,
        follow: Sequence[Sequence[int]] | None = None,
    ) -> list["AnswerTokens"]:
        """In the prompts' order, greedy; or, token by token, what is to be followed. Without a
        choice: after a full prefill.

        Raises ConfigError for a prompt that does not fit or cannot be reused.
        """
        requests = [self._request(number, p, choice) for number, p in enumerate(prompts)]
        ids = [request.request_id for request in requests]
        self.followed.answers = {} if follow is None else dict(zip(ids, follow, strict=True))
        found = {request_id: AnswerTokens() for request_id in ids}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for update in self.engine.step().updates:
                found[update.request_id].take(update.tokens)
                if update.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"question {int(update.request_id) + 1}: {update.error}")
        return [found[request_id] for request_id in ids]

    def text(self, answer: "AnswerTokens") -> str:
        return self.codec.decode(answer.token_ids)

    def _request(self, number: int, prompt: AskedPrompt, choice: ReuseChoice | None) -> Request:
        params = SamplingParams(
            temperature=0.0, max_tokens=self.max_tokens, logprobs=MAX_LOGPROBS, seed=0
        )
        try:
            request = make_request(
                prompt.token_ids,
                params,
                codec=self.codec,
                config=self.config,
                request_id=str(number),
                arrival_time=0.0,
            )
            if choice is not None:
                if (reason := self.limits.why_not(choice, prompt.segments)) is not None:
                    raise InvalidRequest("reuse", reason)
                request = replace(request, reuse=choice.over(prompt.segments))
            self.config.check_fits(request)
        except InvalidRequest as error:
            raise ConfigError(f"question {number + 1}: {error}") from error
        return request


@dataclass(slots=True)
class AnswerTokens:
    """An answer, and at each of its tokens the likeliest ones there."""

    token_ids: list[int] = field(default_factory=list)
    likeliest: list[TokenLogprob] = field(default_factory=list)

    def take(self, tokens: Iterable[SampledToken]) -> None:
        for token in tokens:
            assert token.logprob is not None  # they were asked for
            self.token_ids.append(token.token_id)
            self.likeliest.append(token.logprob)


@dataclass(frozen=True, slots=True)
class FullAnswers:
    """Questions, and what is answered after a full prefill: measured once, for all choices."""

    questions: Sequence[ReuseQuestion]
    prompts: Sequence[AskedPrompt]
    source: str
    answers: Sequence[AnswerTokens]
    is_right: Sequence[bool]


def answer_in_full(
    bench: QualityBench,
    questions: Sequence[ReuseQuestion],
    prompts: Sequence[AskedPrompt],
    source: str,
) -> FullAnswers:
    answers = bench.answers(prompts)
    right = [q.is_right(bench.text(a)) for q, a in zip(questions, answers, strict=True)]
    return FullAnswers(questions, prompts, source, answers, right)


def measure_choice(
    bench: QualityBench, full: FullAnswers, choice: ReuseChoice, date: str
) -> ChoiceQuality:
    """Raises ConfigError for a choice that cannot be made here."""
    follow = [answer.token_ids for answer in full.answers]
    followed = bench.answers(full.prompts, choice, follow)
    agrees = [
        [so.top[0][0] == token for so, token in zip(answer.likeliest, told, strict=True)]
        for answer, told in zip(followed, follow, strict=True)
    ]
    distances = [
        divergence(whole, so)
        for answer, other in zip(full.answers, followed, strict=True)
        for whole, so in zip(answer.likeliest, other.likeliest, strict=True)
    ]
    right = _right_by_itself(bench, full, choice, [all(each) for each in agrees])
    return ChoiceQuality(
        method=choice.method,
        amount=choice.amount,
        num_rounds=int(dict(choice.numbers).get("num_rounds", 1)),
        word=str(choice),
        source=full.source,
        date=date,
        by_kind=_by_kind(full, right),
        num_tokens=len(distances),
        num_agreeing=sum(map(sum, agrees)),
        kl=sum(distances) / len(distances),
    )


def divergence(full: TokenLogprob, other: TokenLogprob) -> float:
    """The Kullback-Leibler divergence of `other` from `full`, in nats, of the likeliest tokens that
    both name and all the rest as one. No partition says more than the whole, so this is at most
    what the whole distributions have, and little less where the named tokens weigh nearly all."""
    ours, theirs = dict(full.top), dict(other.top)
    both = ours.keys() & theirs.keys()
    named = sum(exp(ours[i]) * (ours[i] - theirs[i]) for i in sorted(both))
    left = max(1.0 - sum(exp(ours[i]) for i in sorted(both)), 0.0)
    left_so = max(1.0 - sum(exp(theirs[i]) for i in sorted(both)), _LEAST_SHARE)
    rest = left * log(left / left_so) if left > _LEAST_SHARE else 0.0
    return max(0.0, named + rest)


def _right_by_itself(
    bench: QualityBench, full: FullAnswers, choice: ReuseChoice, is_same: Sequence[bool]
) -> list[bool]:
    """Who is right with reused KV. An answer that was agreed with at each token is the answer."""
    right = list(full.is_right)
    parted = [place for place, same in enumerate(is_same) if not same]
    answers = bench.answers([full.prompts[place] for place in parted], choice)
    for place, answer in zip(parted, answers, strict=True):
        right[place] = full.questions[place].is_right(bench.text(answer))
    return right


def _by_kind(full: FullAnswers, right: Sequence[bool]) -> dict[str, PairedScore]:
    found = {}
    for kind in dict.fromkeys(question.kind for question in full.questions):
        pairs = [
            (was, now)
            for question, was, now in zip(full.questions, full.is_right, right, strict=True)
            if question.kind == kind
        ]
        found[kind] = PairedScore(
            num_asked=len(pairs),
            num_right_full=sum(was for was, _ in pairs),
            num_lost=sum(was and not now for was, now in pairs),
            num_gained=sum(now and not was for was, now in pairs),
        )
    return found
