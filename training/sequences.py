"""Training sequences: one set of documents and many questions, each of which sees only itself.

Every question stands at the positions that it would have alone after the documents, so a sequence
is as many conversations as it has questions, at the price of computing the documents once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from duetto.evals.worlds.prompt import QUESTION, user_turn
from duetto.evals.worlds.world import Question, World
from training.tokenizer import ASSISTANT, END, USER

NOTHING = -1000  # the group of padding
PART_SIZE = 8  # sequences of a step that are computed at once


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, from where the documents end to where the answer begins, and the answer."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    parts: tuple[tuple[int, ...], ...]  # what is before the documents, then each document
    asked: tuple[Asked, ...]

    @property
    def num_shared(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return self.num_shared + sum(len(a.prompt) + len(a.answer) - 1 for a in self.asked)


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of a step. `wanted[i]` is a flat place whose next token is `targets[i]`."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    wanted: Tensor
    targets: Tensor
    answer_of: Tensor  # [targets] which answer each belongs to
    kinds: tuple[str, ...]  # of each answer
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        moved = [
            t.to(device)
            for t in (
                self.ids,
                self.positions,
                self.mask,
                self.wanted,
                self.targets,
                self.answer_of,
            )
        ]
        return Batch(*moved, self.kinds, self.num_tokens)


def from_world(
    world: World, questions: Sequence[Question], tokenizer: Tokenizer
) -> TrainingSequence:
    """A world as a conversation's tokens, exactly as the chat template writes them."""
    *documents, _ = user_turn(world.documents, "")["content"].split("\n")
    parts = [f"{USER}\n", *(f"{document}\n" for document in documents)]
    asked = []
    for question in questions:
        answer = encode(tokenizer, f" {question.full_answer}{END}")
        asked.append(Asked(question.kind, encode(tokenizer, asking(question)), answer))
    return TrainingSequence(tuple(encode(tokenizer, part) for part in parts), tuple(asked))


def asking(question: Question) -> str:
    """From where the documents end to where the answer begins."""
    return f"{QUESTION}{question.text}{END}\n{ASSISTANT}"


def make_parts(sequences: Sequence[TrainingSequence]) -> list[Batch]:
    """A step's sequences in batches of like lengths: of one batch, a third would be padding."""
    in_order = sorted(sequences, key=lambda sequence: sequence.num_tokens)
    return [
        make_batch(in_order[first : first + PART_SIZE])
        for first in range(0, len(in_order), PART_SIZE)
    ]


def make_batch(sequences: Sequence[TrainingSequence], *, apart: bool = False) -> Batch:
    """Sequences side by side, the shorter ones padded.

    `apart`: no document sees another, as if the KV of each had been computed alone and put in place
    with its positions corrected; questions see all of them. To measure with, not to train.
    """
    length = max(s.num_tokens for s in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    group = torch.full_like(ids, NOTHING)
    wanted: list[int] = []
    targets: list[int] = []
    answer_of: list[int] = []
    kinds: list[str] = []
    for row, sequence in enumerate(sequences):
        end = 0
        for number, part in enumerate(sequence.parts):
            start, end = end, end + len(part)
            ids[row, start:end] = torch.tensor(part)
            positions[row, start:end] = torch.arange(start, end)
            group[row, start:end] = -number if apart else 0
        for number, asked in enumerate(sequence.asked, start=1):
            tokens = asked.prompt + asked.answer[:-1]
            start, end = end, end + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = sequence.num_shared + torch.arange(len(tokens))
            group[row, start:end] = number
            place = row * length + end - len(asked.answer)
            wanted += range(place, place + len(asked.answer))
            targets += asked.answer
            answer_of += [len(kinds)] * len(asked.answer)
            kinds.append(asked.kind)
    return Batch(
        ids,
        positions,
        _mask(group),
        torch.tensor(wanted),
        torch.tensor(targets),
        torch.tensor(answer_of),
        tuple(kinds),
        int((group > NOTHING).sum()),
    )


def _mask(group: Tensor) -> Tensor:
    """Who sees whom, [batch, 1, n, n]: all that is earlier and of one's own group; questions (1
    and more) also all that is shared (0 and less)."""
    rows, columns = group[:, :, None], group[:, None, :]
    is_shared = (columns <= 0) & (columns > NOTHING)
    return ((columns == rows) | ((rows > 0) & is_shared)).tril()[:, None]


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)
