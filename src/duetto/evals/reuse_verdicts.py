"""How good answers are with reused KV on one model, and which choices are good enough to be served.

`duetto calibrate-reuse` measures and writes; a server asks `refusal`. A file is one model, held in
one way (its key), and has a row for each choice. What is kept is what was counted: whether that is
good enough follows from the limits below when it is read. Knows no model and no engine.
"""

import os
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from duetto.core.errors import ConfigError
from duetto.core.files import UnfitFile, read_file, user_cache
from duetto.core.reuse_choice import ReuseChoice
from duetto.evals.evaluate import CONFIDENCE_Z

# A choice is good enough if, on the questions that it was measured with,
# - it costs at most this share of right answers, at the upper end of the 95 % interval, and of no
#   kind of question surely more (at the lower end);
MAX_LOSS = 0.02
# - at this share of the answers' tokens its likeliest token is that of a full prefill. Most tokens
#   follow from the ones before: the demo reader with `none` still agrees at 97 %, and has 7 of 10
#   answers of two hops wrong;
MIN_AGREEMENT = 0.99
# - its distributions there are, on average, no farther from those of a full prefill, in nats. This
#   is for answers that are sampled; the reader's with `none` are 0.09 away.
MAX_KL = 0.02
_FORMAT = 1
_MAX_FILE_BYTES = 16 << 20
_MEASURE = "run duetto calibrate-reuse"


class PairedScore(msgspec.Struct, frozen=True, kw_only=True):
    """The same questions answered twice: after a full prefill, and with reused KV."""

    num_asked: int
    num_right_full: int
    num_lost: int  # right after a full prefill only
    num_gained: int  # right with reused KV only

    @property
    def num_right(self) -> int:
        return self.num_right_full - self.num_lost + self.num_gained

    @property
    def loss(self) -> tuple[float, float, float]:
        """The share of right answers that is lost, and its 95 % interval: of paired proportions,
        after Agresti and Min (2005), who add half a question to each of four outcomes. That holds
        where none was lost, too."""
        n, lost, gained = self.num_asked + 2, self.num_lost + 0.5, self.num_gained + 0.5
        center = (lost - gained) / n
        spread = CONFIDENCE_Z * sqrt(lost + gained - (lost - gained) ** 2 / n) / n
        return (self.num_lost - self.num_gained) / self.num_asked, center - spread, center + spread


ChoiceKey = tuple[str, float | None, int]  # method, amount and rounds, however they are written


class ChoiceQuality(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice does to the answers to some questions."""

    method: str
    amount: float | None = None  # ratio, or number of first tokens
    num_rounds: int = 1
    word: str  # as people write it
    source: str  # of the questions
    date: str
    by_kind: dict[str, PairedScore]
    num_tokens: int  # of the answers after a full prefill, which were followed token by token
    num_agreeing: int  # of those: the likeliest token is the same
    kl: float  # of the distribution with reused KV from the full one, mean over those tokens

    @property
    def key(self) -> ChoiceKey:
        return self.method, self.amount, self.num_rounds

    @property
    def total(self) -> PairedScore:
        kinds = self.by_kind.values()
        return PairedScore(
            num_asked=sum(kind.num_asked for kind in kinds),
            num_right_full=sum(kind.num_right_full for kind in kinds),
            num_lost=sum(kind.num_lost for kind in kinds),
            num_gained=sum(kind.num_gained for kind in kinds),
        )

    @property
    def agreement(self) -> float:
        return self.num_agreeing / self.num_tokens

    @property
    def faults(self) -> tuple[str, ...]:
        """In what it is not good enough; () if it is."""
        found = []
        total, (_, _, most) = self.total, self.total.loss
        if most > MAX_LOSS:
            few = "; more questions may tell" if total.num_lost <= total.num_gained else ""
            found.append(
                f"it answers {_share(total.num_right, total)} of {total.num_asked} questions right "
                f"and a full prefill {_share(total.num_right_full, total)}: up to "
                f"{100 * most:.1f} points may be lost, and {100 * MAX_LOSS:.0f} are accepted{few}"
            )
        for name, kind in self.by_kind.items():
            lost, least, _ = kind.loss
            if least > MAX_LOSS and len(self.by_kind) > 1:
                found.append(
                    f"{name}: {_share(kind.num_right, kind)} for "
                    f"{_share(kind.num_right_full, kind)}, {100 * lost:.1f} points lost"
                )
        if self.agreement < MIN_AGREEMENT:
            found.append(
                f"its likeliest token is that of a full prefill at {self.agreement:.1%} of the "
                f"answers' tokens, and {MIN_AGREEMENT:.0%} are wanted"
            )
        if self.kl > MAX_KL:
            found.append(f"a divergence of {self.kl:.4f} nats, and {MAX_KL:g} are accepted")
        return tuple(found)


class ModelVerdicts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was measured of one model, held in one way."""

    format: int = _FORMAT
    model: str
    numerics: str
    rows: tuple[ChoiceQuality, ...]

    def with_rows(self, rows: tuple[ChoiceQuality, ...]) -> "ModelVerdicts":
        """A choice has one row: what was measured with the most questions, and of that the last.
        Few questions may miss what more have shown, or show by chance what more have not."""
        kept: dict[ChoiceKey, ChoiceQuality] = {}
        for row in (*self.rows, *rows):
            known = kept.get(row.key)
            if known is None or known.total.num_asked <= row.total.num_asked:
                kept[row.key] = row
        return msgspec.structs.replace(self, rows=tuple(kept.values()))

    def kept_over(self, row: ChoiceQuality) -> ChoiceQuality | None:
        """What stands for its choice instead of a row that was measured; None if that row does."""
        return next((kept for kept in self.rows if kept.key == row.key and kept != row), None)


@dataclass(frozen=True, slots=True)
class ReuseGate:
    """Says which choices are good enough on one model. Reads the file each time that it is asked:
    a model may be measured while it is served."""

    model_key: str
    folder: Path | None = None  # None: in the user's cache

    def why_not(self, choice: ReuseChoice) -> str | None:
        numbers = dict(choice.numbers)
        return refusal(
            self.model_key,
            choice.method,
            choice.amount,
            int(numbers.get("num_rounds", 1)),
            folder=self.folder,
        )


def refusal(
    model_key: str,
    method: str,
    amount: float | None = None,
    num_rounds: int = 1,
    *,
    folder: Path | None = None,
) -> str | None:
    """Why a choice is not to be served; None if it is good enough. `amount` is its ratio, or its
    number of first tokens.

    Between two amounts that were measured both must be good enough, as more is not always better;
    beyond the largest, that one.
    """
    if amount == 1 and method != "first":
        return None  # a full prefill
    name = method if amount is None else f"{method}:{amount:g}"
    name += f":{num_rounds}" if num_rounds > 1 else ""
    try:
        verdicts = read_verdicts(model_key, folder)
    except ConfigError as error:
        return f"{name}: {error}"
    same = [
        (-1.0 if row.amount is None else row.amount, row)
        for row in (verdicts.rows if verdicts is not None else ())
        if row.method == method and row.num_rounds == num_rounds
    ]
    wanted = -1.0 if amount is None else amount
    below = max([pair for pair in same if pair[0] <= wanted], default=None, key=_amount_of)
    above = min([pair for pair in same if pair[0] >= wanted], default=None, key=_amount_of)
    if below is None:
        least = f": of {method} {above[1].word} is the least that was" if above else ""
        return (
            f"{name} changes answers, and how much was not measured on this model{least}; "
            f"{_MEASURE}"
        )
    for _, row in (below, above or below):
        if row.faults:
            return (
                f"{name} changes too many answers of this model. {row.word}, measured "
                f"{row.date} on {row.source}: {'; '.join(row.faults)}"
            )
    return None


def verdict_file(model_key: str, folder: Path | None = None) -> Path | None:
    """Where what was measured of a model is kept, by default in the user's cache; None: nowhere
    (core/files.user_cache)."""
    if folder is None:
        cache = user_cache()
        folder = None if cache is None else cache / "reuse"
    return None if folder is None else folder / f"{model_key}.json"


def read_verdicts(model_key: str, folder: Path | None = None) -> ModelVerdicts | None:
    """None if nothing was measured. Raises ConfigError, in one line, for a file that is damaged or
    somebody else's."""
    file = verdict_file(model_key, folder)
    if file is None:
        return None
    try:
        found = msgspec.json.decode(
            read_file(file, _MAX_FILE_BYTES, is_private=True), type=ModelVerdicts
        )
        if found.format != _FORMAT:
            raise ValueError(f"is of format {found.format}, and this version reads {_FORMAT}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnfitFile as error:
        raise ConfigError(f"{file}: {error}") from None
    except (OSError, ValueError) as error:  # msgspec's are ValueErrors
        raise ConfigError(f"{file} cannot be read ({error}); {_MEASURE} again") from error
    return found


def write_verdicts(model_key: str, verdicts: ModelVerdicts, folder: Path | None = None) -> Path:
    """Keep them, whole or not at all. Raises OSError if that cannot be done."""
    file = verdict_file(model_key, folder)
    if file is None:
        raise OSError("this user has no home, and XDG_CACHE_HOME is not set")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    data = msgspec.json.format(msgspec.json.encode(verdicts), indent=2) + b"\n"
    with NamedTemporaryFile(dir=file.parent, prefix=".unfinished-", delete=False) as new:
        try:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    return file


def _amount_of(pair: tuple[float, ChoiceQuality]) -> float:
    return pair[0]


def _share(count: int, score: PairedScore) -> str:
    return f"{count / score.num_asked:.1%}"
