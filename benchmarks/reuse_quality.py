"""The demo reader's answers to held-out questions, by which tokens of documents are computed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reusing import Choice, Prompt, new_engine

from duetto.build import Built, build
from duetto.core.engine_args import EngineArgs
from duetto.core.request import FinishReason, Request
from duetto.demo import demo_model_dir
from duetto.engine.engine import Engine
from duetto.evals.evaluate import MAX_ANSWER_TOKENS, EvalPlan, Item, count_answers, draw_items
from duetto.evals.worlds.prompt import DOCUMENT

NUM_FIRST = (1, 2, 4, 6, 8)  # tokens of a document, which has about 14
WHOLE_DOCUMENTS = (1, 2, 3)
AT_ONCE = 64  # requests
KV_CACHE_BYTES = 1 << 30  # so that no document is evicted before it is used

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A choice, and how many whole documents are not marked: those that the question's words point
    at."""

    choice: Choice
    num_whole: int = 0
    is_full: bool = False  # prefill, without the prefix cache

    @property
    def name(self) -> str:
        if self.is_full:
            return "full prefill"
        return f"documents({self.num_whole})" if self.num_whole else self.choice.name

    @property
    def curve(self) -> str | None:
        """Which curve by the share of tokens computed it is a point of."""
        if self.choice.method == "none":
            return "whole documents" if self.num_whole else None
        if self.choice.method is None:
            return None
        rounds = self.choice.num_rounds
        return self.choice.method + (f", {rounds} rounds" if rounds > 1 else "")


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question, its documents as segments."""

    item: Item
    prompt: Prompt

    @property
    def num_others(self) -> int:
        """Tokens of all documents but the first."""
        _, *others = self.prompt.documents
        return sum(end - start for start, end in others)

    def request(self, name: str, variant: Variant, ends: frozenset[int]) -> Request:
        whole = _by_words(self.item.question.text, self.item.world.documents)
        return self.prompt.request(
            name,
            variant.choice,
            num_output=MAX_ANSWER_TOKENS,
            ends=ends,
            unmarked=frozenset(whole[: variant.num_whole]),
        )


@dataclass(frozen=True, slots=True)
class Answered:
    """`share` and `num_tokens`: of the documents' tokens, but for the first document's, those
    that were computed in their place; means over questions."""

    texts: tuple[str | None, ...]  # None: none came
    share: float
    num_tokens: float


def variants(ratios: Sequence[float], query_rounds: Sequence[int]) -> list[Variant]:
    none = Choice(method="none")
    first = [Choice(method="first", num_first=count) for count in NUM_FIRST]
    hkvd = [Choice(method="hkvd", ratio=ratio) for ratio in ratios]
    query = [
        Choice(method="query", ratio=ratio, num_rounds=rounds)
        for rounds in query_rounds
        for ratio in ratios
    ]
    return [
        Variant(Choice(), is_full=True),
        Variant(Choice()),
        *[Variant(choice) for choice in (none, *first, *hkvd, *query)],
        *[Variant(none, count) for count in WHOLE_DOCUMENTS],
    ]


def quality(num_questions: int, ratios: Sequence[float], query_rounds: Sequence[int]) -> Json:
    """All variants answer the same questions, shared evenly by their kinds."""
    reader = Reader(demo_model_dir())
    plan = EvalPlan(num_questions=num_questions)
    questions = reader.questions(draw_items(plan))
    chosen = variants(ratios, query_rounds)
    return {
        "num_questions": num_questions,
        "model": reader.built.name,
        "mean_document_len": mean_document_len(questions),
        "rows": [reader.row(plan, questions, variant) for variant in chosen],
    }


class Reader:
    """A model that answers questions, in an engine of its own for each variant."""

    def __init__(self, model: Path) -> None:
        self._args = EngineArgs(max_num_seqs=AT_ONCE, kv_cache_memory_bytes=KV_CACHE_BYTES)
        self.built = build(model, self._args)

    def questions(self, items: Sequence[Item]) -> list[Question]:
        return [Question(item, _prompt(self.built, item)) for item in items]

    def row(self, plan: EvalPlan, questions: Sequence[Question], variant: Variant) -> Json:
        """How many answers are right, by kind of question."""
        print(f"quality: {variant.name}", flush=True)
        is_cached = not variant.is_full
        engine = new_engine(self.built, self._args, enable_prefix_caching=is_cached)
        answered = ask(self.built, engine, questions, variant)
        counted = count_answers(plan, [q.item for q in questions], answered.texts)
        return {
            "name": variant.name,
            "curve": variant.curve,
            "share": answered.share,
            "num_tokens": answered.num_tokens,
            "scores": {row.kind or "all_stated": row.score.as_json() for row in counted.rows},
        }


def mean_document_len(questions: Sequence[Question]) -> float:
    lengths = [end - start for q in questions for start, end in q.prompt.documents]
    return sum(lengths) / len(lengths)


def ask(built: Built, engine: Engine, questions: Sequence[Question], variant: Variant) -> Answered:
    """All of them, AT_ONCE at a time."""
    ends = built.codec.eos_token_ids
    requests = [q.request(str(n), variant, ends) for n, q in enumerate(questions)]
    tokens: list[list[int]] = [[] for _ in requests]
    failed = set()
    for start in range(0, len(requests), AT_ONCE):
        for request in requests[start : start + AT_ONCE]:
            engine.add(request)
        while engine.has_work:
            for update in engine.step().updates:
                place = int(update.request_id)
                tokens[place] += [token.token_id for token in update.tokens]
                if update.finish_reason is FinishReason.ERROR:
                    failed.add(place)
    texts = [
        None if place in failed else built.codec.decode(ids) for place, ids in enumerate(tokens)
    ]
    computed = [
        question.num_others - sum(end - start for start, end in request.reused)
        for request, question in zip(requests, questions, strict=True)
    ]
    shares = [n / question.num_others for n, question in zip(computed, questions, strict=True)]
    count = len(requests)
    return Answered(tuple(texts), sum(shares) / count, sum(computed) / count)


def _prompt(built: Built, item: Item) -> Prompt:
    """Line by line, each tokenized alone, as the reader was taught. What comes before the first
    document and the document itself are one: a prefix."""
    text = built.codec.render_chat(item.messages(with_documents=True), add_generation_prompt=True)
    lines = text.splitlines(keepends=True)
    places = [n for n, line in enumerate(lines) if line.startswith(DOCUMENT)]
    tokens = [list(built.codec.encode(line, add_special_tokens=False)) for line in lines]
    first, last = places[0], places[-1]
    prefix = [token for line in tokens[: first + 1] for token in line]
    question = [token for line in tokens[last + 1 :] for token in line]
    return Prompt.of([prefix, *tokens[first + 1 : last + 1]], question)


def _by_words(question: str, documents: Sequence[str]) -> list[int]:
    """The documents but the first, those that share most words with the question before others; a
    word counts the more the fewer documents have it."""
    words = [set(re.findall(r"\w+", text.lower())) for text in documents]
    asked = set(re.findall(r"\w+", question.lower()))

    def weight(place: int) -> float:
        shared = asked & words[place]
        return sum(1 / sum(word in other for other in words) for word in shared)

    return sorted(range(1, len(documents)), key=lambda place: (-weight(place), place))
