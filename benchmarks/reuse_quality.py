"""The demo reader's answers to held-out questions, by which tokens of documents are computed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
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

    def request(self, name: str, variant: Variant, ends: frozenset[int]) -> Request:
        whole = _by_words(self.item.question.text, self.item.world.documents)
        return self.prompt.request(
            name,
            variant.choice,
            num_output=MAX_ANSWER_TOKENS,
            ends=ends,
            unmarked=frozenset(whole[: variant.num_whole]),
        )


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


def quality(
    num_questions: int, ratios: Sequence[float], query_rounds: Sequence[int]
) -> dict[str, Any]:
    """All variants answer the same questions, shared evenly by their kinds."""
    args = EngineArgs(max_num_seqs=AT_ONCE, kv_cache_memory_bytes=256 << 20)
    built = build(demo_model_dir(), args)
    plan = EvalPlan(num_questions=num_questions)
    items = draw_items(plan)
    questions = [Question(item, _prompt(built, item)) for item in items]
    rows = []
    for variant in variants(ratios, query_rounds):
        print(f"quality: {variant.name}", flush=True)
        engine = new_engine(built, args, enable_prefix_caching=not variant.is_full)
        answers, share = ask(built, engine, questions, variant)
        counted = count_answers(plan, items, answers)
        scores = {row.kind or "all_stated": row.score.as_json() for row in counted.rows}
        rows.append(
            {"name": variant.name, "curve": variant.curve, "share": share, "scores": scores}
        )
    lengths = [end - start for q in questions for start, end in q.prompt.documents]
    return {
        "num_questions": num_questions,
        "model": built.name,
        "mean_document_len": sum(lengths) / len(lengths),
        "rows": rows,
    }


def ask(
    built: Built, engine: Engine, questions: Sequence[Question], variant: Variant
) -> tuple[list[str | None], float]:
    """The answers, None where there is none, and the mean share of the documents' tokens (but for
    the first document's) that was computed in its place."""
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
    shares = [
        _share(request, question) for request, question in zip(requests, questions, strict=True)
    ]
    return texts, sum(shares) / len(shares)


def _share(request: Request, question: Question) -> float:
    """Of the tokens of all documents but the first."""
    _, *others = question.prompt.documents
    num_reused = sum(end - start for start, end in request.reused)
    return 1 - num_reused / sum(end - start for start, end in others)


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
