"""Questions about documents, and the prompts that they become with each document a text of its own.

They come from held-out worlds, or from a file with an object in each line. Knows no engine.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from duetto.core.errors import ConfigError, InvalidRequest
from duetto.core.files import UnfitFile, read_file
from duetto.core.reuse import TokenRange
from duetto.core.text import TextCodec
from duetto.evals.evaluate import EvalPlan, draw_items
from duetto.evals.worlds.prompt import DOCUMENT, QUESTION, is_exact

FLAG = "--questions"
MAX_QUESTIONS = 100_000
_MAX_FILE_BYTES = 256 << 20
_CONTENT = "the-content-of-the-user-turn-48151623"  # no template changes it, or writes it
_FIELDS = ("documents", "question", "answer", "kind")


@dataclass(frozen=True, slots=True)
class ReuseQuestion:
    """Documents, a question about them, and what is right to answer."""

    documents: tuple[str, ...]
    text: str
    answers: tuple[str, ...]  # any of them
    kind: str = "question"
    is_world: bool = False

    def is_right(self, answer: str) -> bool:
        """Of a world: equal to the answer. Else: it says one of the answers, in whatever case,
        somewhere, as whole words."""
        if self.is_world:
            return is_exact(answer, self.answers[0])
        said = f" {_plain(answer)} "
        return any(f" {_plain(right)} " in said for right in self.answers)


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    token_ids: tuple[int, ...]
    segments: tuple[TokenRange, ...]  # one for each document


def world_questions(num_questions: int, seed: int, num_documents: int) -> list[ReuseQuestion]:
    """As `duetto eval` asks them, evenly of all kinds. Raises ConfigError, naming the flag."""
    plan = EvalPlan(num_questions=num_questions, seed=seed, num_documents=(num_documents,))
    return [
        ReuseQuestion(
            item.world.documents,
            item.question.text,
            (item.question.answer,),
            item.question.kind,
            is_world=True,
        )
        for item in draw_items(plan)
    ]


def read_questions(file: Path) -> tuple[list[ReuseQuestion], str]:
    """The questions of a JSONL file, and a name for them that changes with the file: an object in
    each line with `documents` (texts), `question`, `answer` (a text, or several of which each is
    right) and perhaps `kind`, by which they are counted.

    Raises ConfigError, with the line and the field.
    """
    try:
        data = read_file(file, _MAX_FILE_BYTES)
    except UnfitFile as error:
        raise ConfigError(f"{FLAG} {file}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{FLAG} {file}: {error.strerror or error}") from None
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            found.append(_read_line(f"{FLAG} {file}, line {number}", line))
        if len(found) > MAX_QUESTIONS:
            raise ConfigError(f"{FLAG} {file}: more than {MAX_QUESTIONS:,} questions")
    if not found:
        raise ConfigError(
            f"{FLAG} {file}: holds no question; accepted: JSON objects, one in a line"
        )
    return found, f"{file.name} ({sha256(data).hexdigest()[:8]})"


def make_prompts(
    codec: TextCodec, questions: Sequence[ReuseQuestion]
) -> tuple[list[AskedPrompt], str | None]:
    """Prompts as `duetto eval` has them, through the chat template where there is one, and what is
    to be said about it. Each document is tokenized alone: its ids are the same wherever it stands.

    Raises ConfigError for a chat template that changes what the user says.
    """
    note: str | None = None
    try:
        text = codec.render_chat([{"role": "user", "content": _CONTENT}])
    except InvalidRequest as error:
        note = f"prompts are plain text, without a chat: {error.message}"
        before, after = codec.encode(""), "\nAnswer:"
    else:
        if text.count(_CONTENT) != 1:
            raise ConfigError(
                "the chat template does not write what the user says once and as it is, so "
                "documents cannot be marked in it"
            )
        start, after = text.split(_CONTENT)
        before = codec.encode(start, add_special_tokens=False) if start else []
    return [_make_prompt(codec, question, before, after) for question in questions], note


def _make_prompt(
    codec: TextCodec, question: ReuseQuestion, before: Sequence[int], after: str
) -> AskedPrompt:
    token_ids, segments = list(before), list[TokenRange]()
    for document in question.documents:
        ids = codec.encode(f"{DOCUMENT}{document}\n", add_special_tokens=False)
        segments.append(TokenRange(len(token_ids), len(token_ids) + len(ids)))
        token_ids += ids
    token_ids += codec.encode(f"{QUESTION}{question.text}{after}", add_special_tokens=False)
    return AskedPrompt(tuple(token_ids), tuple(segments))


def _read_line(where: str, line: bytes) -> ReuseQuestion:
    try:
        given = msgspec.json.decode(line)
    except ValueError as error:  # msgspec's are ValueErrors
        raise ConfigError(f"{where}: is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: must be an object with {', '.join(_FIELDS[:3])}")
    for key in given:
        if key not in _FIELDS:
            raise ConfigError(f"{where}: {key!s:.40}: is not known; accepted: {', '.join(_FIELDS)}")
    answers = given.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    return ReuseQuestion(
        documents=_texts(where, "documents", given.get("documents")),
        text=_text(where, "question", given),
        answers=_texts(where, "answer", answers),
        kind=_text(where, "kind", {"kind": "question"} | given),
    )


def _texts(where: str, field: str, given: object) -> tuple[str, ...]:
    is_list = isinstance(given, list) and bool(given)
    if not is_list or not all(isinstance(each, str) and each.strip() for each in given):  # type: ignore[attr-defined]
        what = "a text, or a list of texts" if field == "answer" else "a list of texts"
        raise ConfigError(f"{where}: {field}: must be {what}, none of them empty")
    return tuple(given)  # type: ignore[arg-type]


def _text(where: str, field: str, given: Mapping[str, Any]) -> str:
    (found,) = _texts(where, field, [given.get(field)])
    return found


def _plain(text: str) -> str:
    """Words in small letters with single spaces between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))
