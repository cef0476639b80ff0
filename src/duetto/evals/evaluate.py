"""`duetto eval`: how often a model answers questions about held-out worlds exactly right.

Draws the questions, counts the answers, and knows neither a model nor a server: whoever calls it
brings a function that answers. ask_server is such a function for OpenAI-compatible servers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from typing import Any

import httpx2

from duetto.core.errors import ConfigError
from duetto.evals.worlds.prompt import ChatTurn, is_exact, user_turn
from duetto.evals.worlds.world import (
    HOPS,
    MAX_DOCUMENTS,
    ORDERS,
    QUESTION_KINDS,
    DocumentOrder,
    Question,
    QuestionKind,
    World,
    WorldOptions,
    draw_world,
    max_sentences,
)
from duetto.measure.client import Target, open_http
from duetto.measure.metrics import JsonValue
from duetto.measure.workload import check_num_requests, check_seed

KV_MODES: tuple[str, ...] = ("full",)  # how the KV of documents came about
QUANTIZATIONS: tuple[str, ...] = ("none", "int8", "int4", "fp8")

MAX_ANSWER_TOKENS = 16
MAX_CONCURRENCY = 32  # requests in flight to a server
CONFIDENCE_Z = 1.959964  # 95 % of a normal distribution, two-sided
_LOOK_AHEAD = 200  # worlds that show which kinds of questions there are
_MAX_WORLDS_PER_QUESTION = 100
_WORLDS_PER_SEED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    """What is asked. `num_questions` of each number and order of documents, which have at least
    `num_sentences` each, most of them beside the point.

    Raises ConfigError, naming the flag, for what cannot be asked.
    """

    num_questions: int = 2000
    num_documents: tuple[int, ...] = (6,)
    num_sentences: int = 1
    orders: tuple[DocumentOrder, ...] = ("shuffled",)
    with_documents: bool = True
    kv: str = "full"
    quantization: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_num_requests(self.num_questions, "--num-questions", maximum=_WORLDS_PER_SEED)
        check_seed(self.seed)
        for count in self.num_documents:
            if not 1 <= count <= MAX_DOCUMENTS:
                raise ConfigError(f"--num-documents {count}: must be 1 to {MAX_DOCUMENTS}")
            most = max_sentences(count)
            if not 1 <= self.num_sentences <= most:
                raise ConfigError(
                    f"num_sentences {self.num_sentences}: must be 1 to {most} for {count} documents"
                )
        _check_among("--order", self.orders, ORDERS)
        _check_among("--kv", (self.kv,), KV_MODES)
        _check_among("--quantization", (self.quantization,), QUANTIZATIONS)


@dataclass(frozen=True, slots=True)
class Item:
    """One question to ask, and where it comes from."""

    world: World
    question: Question
    num_documents: int
    order: DocumentOrder

    def messages(self, with_documents: bool) -> list[ChatTurn]:
        documents = self.world.documents if with_documents else ()
        return [user_turn(documents, self.question.text)]


@dataclass(frozen=True, slots=True)
class Score:
    """So many of so many, with the 95 % interval of Wilson (1927), which holds near 0 and 1 too."""

    num_right: int
    num_asked: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_asked

    @property
    def interval(self) -> tuple[float, float]:
        n, p, z = self.num_asked, self.share, CONFIDENCE_Z
        center = p + z * z / (2 * n)
        spread = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)

    def as_json(self) -> dict[str, JsonValue]:
        low, high = self.interval
        return {
            "exact_match": self.share,
            "low": low,
            "high": high,
            "num_right": self.num_right,
            "num_asked": self.num_asked,
        }


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The score of one kind of question; `kind` None: of all that have an answer."""

    num_documents: int
    order: DocumentOrder
    kind: QuestionKind | None
    score: Score

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "num_documents": self.num_documents,
            "order": self.order,
            "kind": self.kind or "all_stated",
            "num_hops": None if self.kind is None else HOPS[self.kind],
            **self.score.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    plan: EvalPlan
    rows: tuple[ScoreRow, ...]
    num_failed: int  # questions that were not answered at all; they count as wrong

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "num_questions": self.plan.num_questions,
            "with_documents": self.plan.with_documents,
            "kv": self.plan.kv,
            "quantization": self.plan.quantization,
            "seed": self.plan.seed,
            "num_failed": self.num_failed,
            "rows": [row.as_json() for row in self.rows],
        }


def draw_items(plan: EvalPlan) -> list[Item]:
    """The questions, as many of each kind as can be, and at most one of a kind from each world."""
    return [
        item
        for num_documents, order in product(plan.num_documents, plan.orders)
        for item in _draw(plan, num_documents, order)
    ]


def count_answers(
    plan: EvalPlan, items: Sequence[Item], answers: Sequence[str | None]
) -> Evaluation:
    """Score the answers, which stand in the items' order. None: there was none."""
    right = [
        answer is not None and is_exact(answer, item.question.answer)
        for item, answer in zip(items, answers, strict=True)
    ]
    rows = []
    for num_documents, order in product(plan.num_documents, plan.orders):
        here = [
            (item.question.kind, is_right)
            for item, is_right in zip(items, right, strict=True)
            if (item.num_documents, item.order) == (num_documents, order)
        ]
        groups: list[tuple[QuestionKind | None, list[bool]]] = [
            (kind, [is_right for other, is_right in here if other == kind])
            for kind in QUESTION_KINDS
        ]
        groups.append((None, [is_right for kind, is_right in here if kind != "not_stated"]))
        rows += [
            ScoreRow(num_documents, order, kind, Score(sum(marks), len(marks)))
            for kind, marks in groups
            if marks
        ]
    return Evaluation(plan, tuple(rows), sum(answer is None for answer in answers))


def ask_server(
    target: Target,
    conversations: Sequence[Sequence[ChatTurn]],
    on_done: Callable[[], None] = lambda: None,
) -> list[str | None]:
    """Answers from an OpenAI-compatible server, greedy. None where the server failed.

    Raises ConfigError if it answered none, with what it said last.
    """
    return asyncio.run(_ask_all(target, conversations, on_done))


def _draw(plan: EvalPlan, num_documents: int, order: DocumentOrder) -> list[Item]:
    options = WorldOptions(
        num_documents=num_documents, num_sentences=plan.num_sentences, order=order
    )
    first = plan.seed * _WORLDS_PER_SEED  # seeds of different evaluations do not overlap

    def world(number: int) -> World:
        return draw_world(first + number, "eval", options)

    seen = {q.kind for number in range(_LOOK_AHEAD) for q in world(number).questions}
    kinds = [kind for kind in QUESTION_KINDS if kind in seen]
    left = {
        kind: plan.num_questions // len(kinds) + (place < plan.num_questions % len(kinds))
        for place, kind in enumerate(kinds)
    }
    items: list[Item] = []
    for number in range(plan.num_questions * _MAX_WORLDS_PER_QUESTION):
        if not any(left.values()):
            break
        drawn = world(number)
        for kind in kinds:
            fitting = [q for q in drawn.questions if q.kind == kind]
            if fitting and left[kind]:
                left[kind] -= 1
                # Not always the first: that is about the first document.
                question = fitting[number % len(fitting)]
                items.append(Item(drawn, question, num_documents, order))
    return items


def _check_among(flag: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    for value in given:
        if value not in accepted:
            raise ConfigError(f"{flag} {value}: must be one of {', '.join(accepted)}")


async def _ask_all(
    target: Target, conversations: Sequence[Sequence[ChatTurn]], on_done: Callable[[], None]
) -> list[str | None]:
    room = asyncio.Semaphore(MAX_CONCURRENCY)
    failures: list[str] = []

    async def one(http: httpx2.AsyncClient, messages: Sequence[ChatTurn]) -> str | None:
        async with room:
            try:
                return await _ask(http, target, messages)
            except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                failures.append(f"{type(error).__name__}: {error}"[:300])
                return None
            finally:
                on_done()

    async with open_http(target) as http:
        waiting: list[Awaitable[str | None]] = [one(http, c) for c in conversations]
        answers = list(await asyncio.gather(*waiting))
    if failures and len(failures) == len(answers):
        raise ConfigError(
            f"{target.base_url}{target.path}: no question was answered: {failures[-1]}"
        )
    return answers


async def _ask(
    http: httpx2.AsyncClient, target: Target, messages: Sequence[Mapping[str, Any]]
) -> str:
    body = {
        "model": target.model,
        "messages": list(messages),
        "max_tokens": MAX_ANSWER_TOKENS,
        "temperature": 0.0,
    }
    reply = await http.post(target.path, json=body, timeout=target.timeout_s)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])
