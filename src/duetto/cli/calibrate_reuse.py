"""`duetto calibrate-reuse`: what reuse of KV does to a model's answers, measured and kept."""

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from duetto.build import Built, build, model_key
from duetto.cli.default_model import say_that_none_was_named
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.reuse_choice import ReuseChoice, ReuseLimits, parse_reuse
from duetto.demo import READER
from duetto.engine.engine import Engine
from duetto.evals.evaluate import MAX_ANSWER_TOKENS
from duetto.evals.reuse_quality import (
    FollowedAnswers,
    QualityBench,
    answer_in_full,
    measure_choice,
)
from duetto.evals.reuse_questions import (
    ReuseQuestion,
    make_prompts,
    read_questions,
    world_questions,
)
from duetto.evals.reuse_verdicts import (
    ChoiceQuality,
    ModelVerdicts,
    read_verdicts,
    verdict_file,
    write_verdicts,
)
from duetto.program.reuse import reuse_limits
from duetto.progress import show_progress
from duetto.scheduler.scheduler import Scheduler

CHOICES = (
    "none",
    "first:4",
    "first:16",
    *(f"{method}:{ratio}" for method in ("hkvd", "query") for ratio in (0.05, 0.15, 0.3, 0.5)),
)
NUM_DOCUMENTS = 6


def calibrate_reuse(
    model: str | None = None,
    *,
    choices: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = CHOICES,
    questions: Path | None = None,
    num_questions: int = 800,
    seed: int = 0,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    show: Annotated[bool, Parameter(negative="")] = False,
    as_json: JsonFlag = False,
    args: Annotated[EngineArgs | None, Parameter(name="*")] = None,
) -> None:
    """Measure what reused KV does to a model's answers, against full prefill, and keep it: a server
    refuses what is not good enough. Of one choice what more questions said is kept.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    choices
        Which tokens are computed all the same: none, first:16 (of each document), hkvd:0.15,
        query:0.15, or query:0.15:2 in rounds.
    questions
        A JSONL file: in each line documents (a list of texts), question, answer (a text, or a list
        of which each is right) and perhaps kind. By default questions about held-out worlds, as
        duetto eval asks them.
    num_questions
        Of the worlds.
    seed
        Of the worlds: other seeds ask about others.
    max_answer_tokens
        The most tokens of an answer.
    show
        Measure nothing: print what is kept.
    as_json
        The last line of stdout is one JSON document: what is kept.
    """
    parsed = _parse(choices)
    args = _engine_args(args)
    if max_answer_tokens < 1:
        raise ConfigError(f"--max-answer-tokens {max_answer_tokens}: must be 1 or more")
    asked, source = _questions(questions, num_questions, seed)
    built = build(READER if model is None else model, args)
    if model is None:
        say_that_none_was_named()
    key = model_key(built)
    file = verdict_file(key)
    if file is None:
        raise ConfigError("nothing can be kept: this user has no home; set XDG_CACHE_HOME")
    kept = read_verdicts(key) or ModelVerdicts(
        model=built.name, numerics=built.model.numerics, rows=()
    )
    measured: tuple[ChoiceQuality, ...] = ()
    if not show:
        parsed = _possible(parsed, reuse_limits(built.model.program), is_asked=choices != CHOICES)
        measured = _measure(built, parsed, asked, source, max_answer_tokens)
        kept = (read_verdicts(key) or kept).with_rows(measured)  # others may measure meanwhile
        write_verdicts(key, kept)
    elif not kept.rows:
        raise ConfigError(f"--show: nothing is kept ({file} is not there)")
    not_kept = [(row, better) for row in measured if (better := kept.kept_over(row)) is not None]
    if as_json:
        told = [
            {**_row_json(row), "kept_num_asked": best.total.num_asked} for row, best in not_kept
        ]
        print_json({"file": str(file), **_as_json(kept), "not_kept": told})
    else:
        _print(kept, file)
        for row, better in not_kept:
            say(open_console(), _why_not_kept(row, better, file))


def _parse(words: tuple[str, ...]) -> list[ReuseChoice]:
    found = []
    for word in words:
        try:
            choice = parse_reuse(word, "--choices")
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        if choice is None:
            raise ConfigError(f"--choices {word}: is a full prefill, which all are compared with")
        found.append(choice)
    if not found:
        raise ConfigError(f"--choices: names none; accepted: such as {', '.join(CHOICES[:3])}")
    return list(dict.fromkeys(found))


def _possible(
    choices: list[ReuseChoice], limits: ReuseLimits, *, is_asked: bool
) -> list[ReuseChoice]:
    """Those that this model can do. Raises ConfigError, with the reason, for one that was asked
    for and is not, and where none is."""
    refused = {choice: reason for choice in choices if (reason := limits.why_not(choice))}
    if is_asked or len(refused) == len(choices):
        for choice, reason in refused.items():
            raise ConfigError(f"--choices {choice}: {reason}")
    for reason in dict.fromkeys(refused.values()):
        print(f"note: not measured: {reason}", file=sys.stderr)
    return [choice for choice in choices if choice not in refused]


def _engine_args(args: EngineArgs | None) -> EngineArgs:
    args = args or EngineArgs()
    if args.speculative_config is not None or args.speculative_model is not None:
        raise ConfigError("--speculative-config and calibrate-reuse: drafts change no answer")
    return replace(args, target_itl="off")


def _questions(file: Path | None, count: int, seed: int) -> tuple[list[ReuseQuestion], str]:
    if file is not None:
        return read_questions(file)
    asked = world_questions(count, seed, NUM_DOCUMENTS)
    return asked, f"{len(asked)} questions about worlds of {NUM_DOCUMENTS} documents, seed {seed}"


def _measure(
    built: Built,
    choices: list[ReuseChoice],
    questions: list[ReuseQuestion],
    source: str,
    max_tokens: int,
) -> tuple[ChoiceQuality, ...]:
    prompts, note = make_prompts(built.codec, questions)
    for line in (*built.notes, *([note] if note else [])):
        print(f"note: {line}", file=sys.stderr)
    config, followed = built.scheduler_config, FollowedAnswers(built.model.runner)
    engine = Engine(Scheduler(config), followed)
    limits = reuse_limits(built.model.program)
    bench = QualityBench(engine, followed, built.codec, config, max_tokens, limits)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    rows = []
    with show_progress("choices", total=len(choices) + 1) as bar:
        full = answer_in_full(bench, questions, prompts, source)
        bar.advance()
        for choice in choices:
            rows.append(measure_choice(bench, full, choice, today))
            bar.advance()
    return tuple(rows)


def _as_json(kept: ModelVerdicts) -> dict[str, object]:
    rows = [_row_json(row) for row in kept.rows]
    return {"model": kept.model, "numerics": kept.numerics, "choices": rows}


def _row_json(row: ChoiceQuality) -> dict[str, object]:
    return {
        "choice": row.word,
        "is_good_enough": not row.faults,
        "faults": list(row.faults),
        "agreement": row.agreement,
        "kl": row.kl,
        "num_tokens": row.num_tokens,
        "source": row.source,
        "date": row.date,
        "scores": {
            name: {
                "num_asked": score.num_asked,
                "full": score.num_right_full / score.num_asked,
                "reused": score.num_right / score.num_asked,
                "loss": list(score.loss),
            }
            for name, score in {"all": row.total, **row.by_kind}.items()
        },
    }


def _why_not_kept(row: ChoiceQuality, better: ChoiceQuality, file: Path) -> str:
    total = row.total
    return (
        f"{row.word}: not kept, as {total.num_asked} questions say less than the "
        f"{better.total.num_asked} of {better.date} that are kept; of these it answered "
        f"{total.num_right / total.num_asked:.1%} right, a full prefill "
        f"{total.num_right_full / total.num_asked:.1%}. To begin anew, remove {file}"
    )


def _print(kept: ModelVerdicts, file: Path) -> None:
    console = open_console()
    kinds = list(dict.fromkeys(kind for row in kept.rows for kind in row.by_kind))
    table = Table(box=None)
    table.add_column("choice")
    for heading in ("agreement", "KL", "right", "full", "lost at most", *kinds):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in kept.rows:
        total = row.total
        table.add_row(
            row.word,
            f"{row.agreement:.1%}",
            f"{row.kl:.4f}",
            f"{total.num_right / total.num_asked:.1%}",
            f"{total.num_right_full / total.num_asked:.1%}",
            f"{100 * total.loss[2]:.1f}",
            *(
                f"{100 * row.by_kind[kind].loss[0]:+.1f}" if kind in row.by_kind else ""
                for kind in kinds
            ),
            "refused" if row.faults else "good enough",
        )
    show_table(console, table, drop=("full", *kinds, "KL"))
    say(console, "by kind: points lost; lost at most: of all, at the end of the 95 % interval")
    for row in kept.rows:
        for fault in row.faults:
            say(console, f"{row.word}: {fault}")
    say(console, f"{kept.model}, {kept.numerics}; kept in {file}")
