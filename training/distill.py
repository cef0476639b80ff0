"""Make a draft from a reader: fewer of its layers, trained to say what it says.

    python -m training.distill READER --out DRAFT

The draft starts as the reader's first layers and its last one, and learns the reader's
distribution at every place of an answer (Hinton et al., "Distilling the knowledge in a neural
network", 2015), so it foresees the reader's mistakes too.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from duetto.progress import show_progress
from training.climb import CLIP, MUON_RATE, make_optimizers
from training.export import export
from training.llama import Llama
from training.measure import load
from training.rungs import Rung, ladder
from training.sequences import Batch, make_parts
from training.shapes import named_shape


def shortened(reader: Llama) -> Llama:
    """A model of the draft's shape, with the reader's first layers and its last one."""
    draft = Llama(named_shape("draft", reader.shape.vocab_size))
    kept = [*range(draft.shape.num_layers - 1), reader.shape.num_layers - 1]
    draft.model.embed_tokens.load_state_dict(reader.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(reader.model.norm.state_dict())
    draft.lm_head.load_state_dict(reader.lm_head.state_dict())
    for layer, place in zip(draft.model.layers, kept, strict=True):
        layer.load_state_dict(reader.model.layers[place].state_dict())
    return draft


def distill(
    reader: Llama, draft: Llama, steps: Iterator[list[Batch]], num_steps: int
) -> Iterator[float]:
    """Train the draft; the loss of each step, in nats per token. The rate falls to zero."""
    rate = ladder()[-1].learning_rate
    optimizers = make_optimizers(draft)
    for step in range(num_steps):
        parts = next(steps)
        for optimizer, times in zip(optimizers, (1.0, MUON_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * rate * (1 - step / num_steps)
            optimizer.zero_grad()
        num_targets = sum(len(part.targets) for part in parts)
        loss = sum(_learn(reader, draft, part, num_targets) for part in parts)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
        yield loss


def _learn(reader: Llama, draft: Llama, part: Batch, num_targets: int) -> float:
    """Add the gradients of a part of a step; its share of the step's loss."""
    with torch.no_grad():
        wanted = reader(part.ids, part.positions, part.mask, part.wanted).log_softmax(-1)
    said = draft(part.ids, part.positions, part.mask, part.wanted).log_softmax(-1)
    loss = functional.kl_div(said, wanted, reduction="sum", log_target=True) / num_targets
    loss.backward()
    return loss.item()


def draw_steps(rung: Rung, tokenizer: Tokenizer, device: torch.device) -> Iterator[list[Batch]]:
    """The rung's training data, step after step."""
    first = 0
    while True:
        seeds = range(first, first + rung.batch_size)
        drawn = [rung.draw(seed, "train", tokenizer) for seed in seeds]
        yield [part.to(device) for part in make_parts(drawn)]
        first += rung.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(prog="training.distill", description=__doc__)
    parser.add_argument("reader", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="0: only shorten")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(args.reader)
    reader = loaded.model.to(device)
    draft = shortened(reader).to(device)
    steps = draw_steps(ladder()[-1], loaded.tokenizer, device)
    with show_progress("distilling", total=args.steps) as bar:
        for step, loss in enumerate(distill(reader, draft, steps, args.steps), start=1):
            bar.advance()
            if step % 50 == 0:
                print(f"step {step}: {loss:.3f} nats a token", file=sys.stderr, flush=True)
    size = export(draft, loaded.tokenizer, args.out)
    print(f"wrote {args.out}: {draft.shape.num_parameters:,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
