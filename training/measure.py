"""What a trained reader owes to attention between documents, and how often a draft foresees it.

    python -m training.measure READER [--draft DRAFT]

`duetto eval` says how often a reader is right. This says it twice in torch, with documents that see
each other and with documents computed apart (positions corrected), and how often the draft's
likeliest next token is the reader's, at every token of the reader's own greedy answers.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from duetto.evals.evaluate import Score
from duetto.evals.worlds.world import WorldOptions, draw_world
from duetto.progress import show_progress
from training.llama import Llama
from training.sequences import Batch, TrainingSequence, from_world, make_batch
from training.shapes import Shape

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    model: Llama
    tokenizer: Tokenizer


def load(directory: Path) -> Checkpoint:
    """An exported checkpoint, back in torch, in fp32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        mlp_width=config["intermediate_size"],
        vocab_size=config["vocab_size"],
    )
    model = Llama(shape)
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Checkpoint(model.eval(), tokenizer)


def held_out(
    tokenizer: Tokenizer, num_worlds: int, options: WorldOptions
) -> Iterator[list[TrainingSequence]]:
    """Held-out worlds with all their questions, in lists of BATCH_SIZE."""
    for first in range(0, num_worlds, BATCH_SIZE):
        worlds = [
            draw_world(seed, "eval", options)
            for seed in range(first, min(first + BATCH_SIZE, num_worlds))
        ]
        yield [from_world(world, world.questions, tokenizer) for world in worlds]


@torch.no_grad()
def likeliest(model: Llama, batch: Batch) -> torch.Tensor:
    logits = model(batch.ids, batch.positions, batch.mask, batch.wanted)
    best: torch.Tensor = logits.argmax(-1)
    return best


def exact(model: Llama, batches: list[list[TrainingSequence]], *, apart: bool) -> dict[str, Score]:
    """Exact match by kind of question: every token of the answer is the likeliest one."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for sequences in batches:
        batch = make_batch(sequences, apart=apart)
        wrong = set(batch.answer_of[likeliest(model, batch) != batch.targets].tolist())
        asked.update(batch.kinds)
        right.update(kind for i, kind in enumerate(batch.kinds) if i not in wrong)
    return {kind: Score(right[kind], asked[kind]) for kind in sorted(asked)}


def agreement(
    reader: Llama, draft: Llama, batches: list[list[TrainingSequence]]
) -> dict[str, Score]:
    """How often the draft's next token is the reader's, along the reader's own answers, by kind of
    question.

    The reader's answer is followed as far as it is the gold one, and to its first other token:
    after that the two would have read different texts.
    """
    equal: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sequences in batches:
        batch = make_batch(sequences)
        ours, theirs = likeliest(reader, batch), likeliest(draft, batch)
        strayed: set[int] = set()
        for place, answer in enumerate(batch.answer_of.tolist()):
            if answer in strayed:
                continue
            kind = batch.kinds[answer]
            total[kind] += 1
            equal[kind] += bool(ours[place] == theirs[place])
            if ours[place] != batch.targets[place]:
                strayed.add(answer)
    return {kind: Score(equal[kind], total[kind]) for kind in sorted(total)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="training.measure", description=__doc__)
    parser.add_argument("reader", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--num-worlds", type=int, default=500)
    parser.add_argument("--num-documents", type=int, default=6)
    args = parser.parse_args()
    reader = load(args.reader)
    options = WorldOptions(num_documents=args.num_documents)
    with show_progress("drawing", total=args.num_worlds) as bar:
        batches = []
        for sequences in held_out(reader.tokenizer, args.num_worlds, options):
            batches.append(sequences)
            bar.advance(len(sequences))
    together = exact(reader.model, batches, apart=False)
    apart = exact(reader.model, batches, apart=True)
    print(f"{'kind':<12} {'together':>9} {'apart':>9} {'asked':>7}")
    for kind, score in together.items():
        print(f"{kind:<12} {score.share:>9.1%} {apart[kind].share:>9.1%} {score.num_asked:>7}")
    if args.draft is not None:
        agreed = agreement(reader.model, load(args.draft).model, batches)
        whole = Score(*(sum(column) for column in zip(*map(astuple, agreed.values()), strict=True)))
        low, high = whole.interval
        print(f"draft agrees on {whole.share:.1%} ({low:.1%} to {high:.1%}) of answer tokens:")
        print(", ".join(f"{kind} {score.share:.1%}" for kind, score in agreed.items()))


if __name__ == "__main__":
    main()
