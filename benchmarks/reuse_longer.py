"""The same questions about longer documents: how much must be computed for the same answers.

Sentences that are beside the point are added to the documents of held-out worlds; the facts, the
questions and the answers stay (`WorldOptions.num_sentences`), so lengths are compared on the same
questions. The demo reader has not learned to read long documents: `training.train --longer` teaches
it.
"""

from collections.abc import Sequence
from pathlib import Path

from reuse_quality import Json, Question, Reader, Variant, mean_document_len
from reusing import Choice

from duetto.demo import demo_model_dir
from duetto.evals.evaluate import EvalPlan, Item, draw_items
from duetto.evals.worlds.world import QUESTION_KINDS, QuestionKind

KINDS: tuple[QuestionKind, ...] = ("one_hop", "two_hop")
SEED = 21  # of worlds that neither a choice nor a reader was made with
FULL = Variant(Choice(), is_full=True)
FEW_RATIOS = (0.05, 0.15, 0.5)  # of first and hkvd, to compare with
TOLERANCE = 0.05  # of exact answers, below full prefill


def longer(
    model: Path, num_questions: int, ratios: Sequence[float], sentences: Sequence[int]
) -> Json:
    """So many questions of each kind, at each number of sentences a document."""
    reader, shipped = Reader(model), Reader(demo_model_dir())
    lengths = []
    for num_sentences in sentences:
        print(f"documents of {num_sentences} sentences", flush=True)
        plan = EvalPlan(
            num_questions=num_questions * len(QUESTION_KINDS),
            num_sentences=num_sentences,
            seed=SEED,
        )
        questions = reader.questions(_of_kinds(draw_items(plan)))
        rows = [reader.row(plan, questions, each) for each in _variants(questions, ratios)]
        lengths.append(
            {
                "num_sentences": num_sentences,
                "mean_document_len": mean_document_len(questions),
                "num_others": sum(q.num_others for q in questions) / len(questions),
                "rows": rows,
                "shipped": shipped.row(plan, questions, FULL)["scores"],
                "needed": {
                    kind: {curve: _needed(rows, curve, kind) for curve in _curves(rows)}
                    for kind in KINDS
                },
            }
        )
    return {
        "num_questions": num_questions,
        "model": reader.built.name,
        "seed": SEED,
        "tolerance": TOLERANCE,
        "lengths": lengths,
    }


def _of_kinds(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.question.kind in KINDS]


def _variants(questions: Sequence[Question], ratios: Sequence[float]) -> list[Variant]:
    """`first` of so many tokens as FEW_RATIOS are of a document."""
    length = mean_document_len(questions)
    counts = dict.fromkeys(max(1, round(ratio * length)) for ratio in FEW_RATIOS)
    choices = [Choice(method="none"), *(Choice(method="first", num_first=n) for n in counts)]
    choices += [Choice(method="hkvd", ratio=ratio) for ratio in FEW_RATIOS]
    choices += [Choice(method="query", ratio=ratio) for ratio in ratios]
    return [FULL, *(Variant(choice) for choice in choices)]


def _curves(rows: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(row["curve"] for row in rows if row["curve"]))


def _needed(rows: Sequence[Json], curve: str, kind: QuestionKind) -> Json | None:
    """The row of the smallest share measured from which on the curve stays within TOLERANCE of full
    prefill; None: not even the largest."""
    full = next(row for row in rows if row["name"] == "full prefill")
    score = full["scores"][kind]
    least = score["num_right"] - TOLERANCE * score["num_asked"]
    found = None
    points = [row for row in rows if row["curve"] == curve]
    for row in sorted(points, key=lambda row: row["share"], reverse=True):
        if row["scores"][kind]["num_right"] < least:
            break
        found = {key: row[key] for key in ("name", "share", "num_tokens")}
    return found
