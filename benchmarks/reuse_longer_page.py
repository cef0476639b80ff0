"""The section about longer documents, of the page of reuse.py. Measures nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from in_process import markdown_table

from duetto.demo import READER

Found = Mapping[str, Any]
KINDS = {"one_hop": "one hop", "two_hop": "two hops"}


def score_text(score: Found) -> str:
    return f"{score['exact_match']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def longer_section(result: Found) -> str:
    lengths = result["lengths"]
    points = 100 * result["tolerance"]
    return f"""## Longer documents

Six documents of more sentences, most of them beside the point: they tell of other things, which no
question is about. The facts, the {result["num_questions"]} questions of each kind and their answers
are the same at all lengths (seed {result["seed"]}). {_reader(result["model"])}

How much must be computed for the same answers of two hops: the smallest share measured from which
on exact answers stay within {points:.0f} points of full prefill, and the tokens that it is (a mean,
of all tokens of the documents but the first). A dash: not even the largest share does.

{_needed(lengths, "two_hop")}

{_verdict(lengths)}

How much of what `none` loses on two hops is won back with `query`, and with how many tokens: this
compares lengths at which the reader itself is not equally good.

{_won_back(lengths)}

{_tables(lengths)}"""


def _reader(model: str) -> str:
    if model == READER:
        return "The reader is the one that ships, taught documents of one or two sentences."
    return f"""The reader
that ships was taught documents of one or two sentences; this one, `{model}`, goes on
from its weights and was taught longer ones too (`python -m training.train reader --longer`)."""


def _needed(lengths: Sequence[Found], kind: str) -> str:
    curves = list(lengths[0]["needed"][kind])
    header = ["documents of", "tokens each", "tokens that may be reused"]
    header += ["full prefill, the reader that ships", "full prefill", "none", *curves]
    rows = []
    for length in lengths:
        by_name = {row["name"]: row["scores"][kind]["exact_match"] for row in length["rows"]}
        rows.append(
            [
                _sentences(length),
                f"{length['mean_document_len']:.0f}",
                f"{length['num_others']:.0f}",
                f"{length['shipped'][kind]['exact_match']:.3f}",
                *(f"{by_name[name]:.3f}" for name in ("full prefill", "none")),
                *(_share(length["needed"][kind][curve]) for curve in curves),
            ]
        )
    return markdown_table(header, rows)


def _verdict(lengths: Sequence[Found]) -> str:
    """Whether the share that `query` takes shrinks from the shortest documents to the longest."""
    first, last = (length["needed"]["two_hop"]["query"] for length in (lengths[0], lengths[-1]))
    if first is None or last is None:
        return "No share measured is enough at all lengths."
    shrinks = "shrinks" if last["share"] < first["share"] else "does not shrink"
    return f"So with `query` the share {shrinks}: from {_share(first)} to {_share(last)}."


def _won_back(lengths: Sequence[Found]) -> str:
    names = [row["name"] for row in lengths[0]["rows"] if row["curve"] == "query"]
    rows = []
    for length in lengths:
        by_name = {row["name"]: row for row in length["rows"]}
        right = {name: row["scores"]["two_hop"]["num_right"] for name, row in by_name.items()}
        lost = right["full prefill"] - right["none"]
        cells = [
            f"{(right[name] - right['none']) / lost:.0%} ({by_name[name]['num_tokens']:.0f})"
            if lost > 0
            else "-"
            for name in names
        ]
        rows.append([_sentences(length), *cells])
    return markdown_table(["documents of", *names], rows)


def _tables(lengths: Sequence[Found]) -> str:
    """Everything measured, a table for each length."""
    tables = []
    for length in lengths:
        rows = [
            [
                row["name"],
                "" if row["name"] == "full prefill" else f"{row['share']:.0%}",
                "" if row["name"] == "full prefill" else f"{row['num_tokens']:.0f}",
                *(score_text(row["scores"][kind]) for kind in KINDS),
            ]
            for row in length["rows"]
        ]
        header = ["", "computed", "tokens computed", *KINDS.values()]
        table = markdown_table(header, rows)
        tables.append(f"Documents of {_sentences(length)}, 95 % intervals:\n\n{table}")
    return "\n\n".join(tables)


def _sentences(length: Found) -> str:
    number = length["num_sentences"]
    return "one or two sentences" if number == 1 else f"{number} sentences"


def _share(needed: Found | None) -> str:
    return "-" if needed is None else f"{needed['share']:.0%} ({needed['num_tokens']:.0f} tokens)"
