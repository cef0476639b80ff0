"""What is kept of a model's reuse of KV, and which choices it refuses and allows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import ReuseChoice
from duetto.evals.reuse_verdicts import (
    ChoiceQuality,
    ModelVerdicts,
    PairedScore,
    ReuseGate,
    read_verdicts,
    refusal,
    verdict_file,
    write_verdicts,
)

KEY = "0123456789abcdef"
GOOD = PairedScore(num_asked=400, num_right_full=390, num_lost=1, num_gained=1)
BAD = PairedScore(num_asked=400, num_right_full=390, num_lost=60, num_gained=2)


def row(method: str = "none", amount: float | None = None, **changes: Any) -> ChoiceQuality:
    word = method if amount is None else f"{method}:{amount:g}"
    fields: dict[str, Any] = {
        "method": method,
        "amount": amount,
        "word": word,
        "source": "400 questions",
        "date": "2026-11-27",
        "by_kind": {"one_hop": GOOD},
        "num_tokens": 2000,
        "num_agreeing": 1990,
        "kl": 0.01,
    }
    return ChoiceQuality(**fields | changes)


def keep(folder: Path, *rows: ChoiceQuality) -> None:
    write_verdicts(KEY, ModelVerdicts(model="m", numerics="cpu", rows=rows), folder)


# --- what is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        # (0.5 - 0.5) / 402 -+ 1.959964 sqrt(1) / 402
        (PairedScore(num_asked=400, num_right_full=390, num_lost=0, num_gained=0), (0, 0.004876)),
        # 8 / 102 -+ 1.959964 sqrt(15 - 64 / 102) / 102
        (
            PairedScore(num_asked=100, num_right_full=90, num_lost=11, num_gained=3),
            (0.08, 0.151273),
        ),
        (
            PairedScore(num_asked=100, num_right_full=50, num_lost=0, num_gained=9),
            (-0.09, -0.029934),
        ),
    ],
)
def test_the_loss_and_the_end_of_its_interval(score: PairedScore, expected: Any) -> None:
    lost, least, most = score.loss
    assert (lost, most) == pytest.approx(expected, abs=1e-4)
    assert least <= lost <= most


def test_a_total_adds_up_the_kinds() -> None:
    total = row(by_kind={"a": GOOD, "b": BAD}).total
    assert total == PairedScore(num_asked=800, num_right_full=780, num_lost=61, num_gained=3)
    assert total.num_right == 722


# --- faults ------------------------------------------------------------------------------------


def test_what_is_good_enough_has_no_fault() -> None:
    assert row().faults == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"by_kind": {"one_hop": BAD}},
            "it answers 83.0% of 400 questions right and a full prefill 97.5%: up to 18.0 points "
            "may be lost, and 2 are accepted",
        ),
        ({"num_agreeing": 1900}, "is that of a full prefill at 95.0% of the answers' tokens, and"),
        ({"kl": 0.0312}, "a divergence of 0.0312 nats, and 0.02 are accepted"),
    ],
)
def test_a_fault_has_its_numbers(changes: dict[str, Any], message: str) -> None:
    (fault,) = row(**changes).faults
    assert message in fault


def test_one_kind_of_question_may_be_the_fault() -> None:
    """All together are hardly worse, as one kind is rare and loses a third."""
    rare = PairedScore(num_asked=60, num_right_full=60, num_lost=20, num_gained=0)
    many = PairedScore(num_asked=9940, num_right_full=9900, num_lost=0, num_gained=0)
    assert row(by_kind={"rare": rare, "many": many}).faults == (
        "rare: 66.7% for 100.0%, 33.3 points lost",
    )


def test_few_questions_prove_nothing() -> None:
    few = PairedScore(num_asked=20, num_right_full=20, num_lost=0, num_gained=0)
    (fault,) = row(by_kind={"question": few}).faults
    assert fault.endswith("more questions may tell")


# --- who is refused ----------------------------------------------------------------------------


def test_without_a_verdict_it_says_what_to_run(tmp_path: Path) -> None:
    said = refusal(KEY, "query", 0.15, folder=tmp_path)
    assert said == (
        "query:0.15 changes answers, and how much was not measured on this model; "
        "run duetto calibrate-reuse"
    )


def test_what_was_good_is_allowed_and_what_was_bad_is_refused_with_numbers(tmp_path: Path) -> None:
    keep(tmp_path, row("query", 0.3), row("hkvd", 0.15, by_kind={"two_hop": BAD}))
    assert refusal(KEY, "query", 0.3, folder=tmp_path) is None
    said = refusal(KEY, "hkvd", 0.15, folder=tmp_path)
    assert said is not None
    assert said.startswith(
        "hkvd:0.15 changes too many answers of this model. hkvd:0.15, measured 2"
    )
    assert "83.0% of 400 questions right and a full prefill 97.5%" in said


def test_another_model_or_method_or_number_of_rounds_is_another_matter(tmp_path: Path) -> None:
    keep(tmp_path, row("query", 0.3))
    assert refusal("another", "query", 0.3, folder=tmp_path) is not None
    assert refusal(KEY, "hkvd", 0.3, folder=tmp_path) is not None
    said = refusal(KEY, "query", 0.3, 2, folder=tmp_path)
    assert said is not None
    assert said.startswith("query:0.3:2 changes answers, and how much was not measured")


@pytest.mark.parametrize(
    ("ratio", "is_allowed"),
    [
        (0.05, False),
        (0.15, False),
        (0.2, False),
        (0.3, True),
        (0.4, True),
        (0.5, True),
        (0.9, True),
    ],
)
def test_between_what_was_measured_both_must_be_good(
    tmp_path: Path, ratio: float, is_allowed: bool
) -> None:
    bad = {"by_kind": {"two_hop": BAD}}
    keep(tmp_path, row("query", 0.15, **bad), row("query", 0.3), row("query", 0.5))
    assert (refusal(KEY, "query", ratio, folder=tmp_path) is None) is is_allowed


def test_below_the_least_that_was_measured(tmp_path: Path) -> None:
    keep(tmp_path, row("query", 0.3), row("query", 0.15))
    said = refusal(KEY, "query", 0.05, folder=tmp_path)
    assert said is not None
    assert "not measured on this model: of query query:0.15 is the least that was" in said


def test_a_larger_ratio_that_failed_spoils_what_lies_before_it(tmp_path: Path) -> None:
    keep(tmp_path, row("query", 0.15), row("query", 0.3, kl=1.0))
    assert refusal(KEY, "query", 0.15, folder=tmp_path) is None
    assert "query:0.3, measured" in (refusal(KEY, "query", 0.2, folder=tmp_path) or "")


def test_a_full_prefill_needs_no_verdict(tmp_path: Path) -> None:
    assert refusal(KEY, "query", 1.0, folder=tmp_path) is None
    assert refusal(KEY, "hkvd", 1, 1, folder=tmp_path) is None
    assert refusal(KEY, "first", 1, folder=tmp_path) is not None  # one token of each segment


def test_a_gate_is_asked_for_choices(tmp_path: Path) -> None:
    keep(tmp_path, row("first", 16), row("none", kl=1.0))
    gate = ReuseGate(KEY, tmp_path)
    first = ReuseChoice("first", (("num_first", 16),))
    assert gate.why_not(first) is None
    assert gate.why_not(replace(first, numbers=(("num_first", 8),))) is not None
    assert "nats" in (gate.why_not(ReuseChoice("none")) or "")


# --- the file ----------------------------------------------------------------------------------


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    assert read_verdicts(KEY, tmp_path / "nowhere") is None
    kept = ModelVerdicts(model="m", numerics="cpu", rows=(row(), row("query", 0.15)))
    file = write_verdicts(KEY, kept, tmp_path / "deep" / "down")
    assert read_verdicts(KEY, tmp_path / "deep" / "down") == kept
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_choice_that_is_measured_again_has_its_last_row() -> None:
    kept = ModelVerdicts(model="m", numerics="cpu", rows=(row(), row("query", 0.15)))
    again = kept.with_rows((row("query", 0.15, kl=0.5), row("hkvd", 0.5)))
    assert [(each.word, each.kl) for each in again.rows] == [
        ("none", 0.01),
        ("query:0.15", 0.5),
        ("hkvd:0.5", 0.01),
    ]


def test_few_questions_do_not_stand_over_many() -> None:
    few = PairedScore(num_asked=50, num_right_full=50, num_lost=0, num_gained=0)
    kept = ModelVerdicts(model="m", numerics="cpu", rows=(row("query", 0.15),))
    quick = row("query", 0.15, by_kind={"one_hop": few}, kl=0.0)
    assert kept.with_rows((quick,)) == kept
    assert kept.kept_over(quick) == kept.rows[0]
    more = row("query", 0.15, by_kind={"one_hop": GOOD, "two_hop": few})
    assert kept.with_rows((quick, more)).rows == (more,)
    assert kept.with_rows((more,)).kept_over(more) is None


def test_a_choice_has_one_row_however_it_is_written() -> None:
    """Else the gate might ask the one that was measured with few questions."""
    few = PairedScore(num_asked=50, num_right_full=50, num_lost=0, num_gained=0)
    kept = ModelVerdicts(model="m", numerics="cpu", rows=(row("query", 0.15),))
    another = row("query", 0.15, word="query:0.15:1", by_kind={"one_hop": few})
    assert kept.with_rows((another,)) == kept


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"rows": []}', b"\xff"])
def test_a_damaged_file_allows_nothing(tmp_path: Path, data: bytes) -> None:
    keep(tmp_path, row("query", 0.3))
    verdict_file(KEY, tmp_path).write_bytes(data)
    said = refusal(KEY, "query", 0.3, folder=tmp_path)
    assert said is not None
    assert said.startswith("query:0.3: ")
    assert "cannot be read" in said
    with pytest.raises(ConfigError, match="run duetto calibrate-reuse again"):
        read_verdicts(KEY, tmp_path)


def test_a_file_of_another_format_allows_nothing(tmp_path: Path) -> None:
    keep(tmp_path, row("query", 0.3))
    file = verdict_file(KEY, tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    assert "format 99" in (refusal(KEY, "query", 0.3, folder=tmp_path) or "")


def test_what_is_no_file_allows_nothing(tmp_path: Path) -> None:
    verdict_file(KEY, tmp_path).mkdir()
    assert "is a directory" in (refusal(KEY, "none", folder=tmp_path) or "")


def test_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdict_file(KEY) == tmp_path / "duetto" / "reuse" / f"{KEY}.json"
    write_verdicts(KEY, ModelVerdicts(model="m", numerics="cpu", rows=(row("query", 0.3),)))
    assert refusal(KEY, "query", 0.3) is None
    assert msgspec.json.decode(verdict_file(KEY).read_bytes())["format"] == 1
