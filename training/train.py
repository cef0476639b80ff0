"""Train a demo model from nothing, or from where an interrupted training stopped.

    python -m training.train reader --work .demo/training --out .demo/duetto-demo
    python -m training.train reader --longer .demo/duetto-demo --work .demo/more --out .demo/longer

The second goes on from a reader that is trained already, and teaches it documents of more
sentences. Needs the `train` extra. A GPU is used if torch finds one.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from duetto.progress import show_progress
from training.climb import Climb, Plan
from training.export import export
from training.llama import Llama
from training.measure import Checkpoint, load
from training.record import write_record
from training.rungs import ladder, longer
from training.shapes import named_shape
from training.tokenizer import train_tokenizer


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = load(args.longer) if args.longer else _untrained(args.shape)
    shape = start.model.shape
    plan = Plan(
        directory=args.work / args.shape,
        device=device,
        time_limit_s=args.minutes and args.minutes * 60,
    )
    rungs = [
        replace(rung, learning_rate=rung.learning_rate * args.rate)
        for rung in (longer() if args.longer else ladder())
    ]
    climb = Climb(start.model, start.tokenizer, rungs, plan)
    print(
        f"{args.shape}: {shape.num_parameters:,} parameters, {shape.vocab_size} tokens, "
        f"{device.type}; {climb.progress.rung} of {len(rungs)} rungs passed",
        flush=True,
    )
    with show_progress(f"training {args.shape}", total=len(rungs)) as bar:

        def report(line: str) -> None:
            print(line, flush=True)
            bar.reach(climb.progress.rung, len(rungs))

        is_done = climb.run(report)
    size = export(climb.model, start.tokenizer, args.out)
    print(f"wrote {args.out}: {size / 1e6:.1f} MB")
    if args.curve:
        _write_curve(climb, args)
    if not is_done:
        print(f"out of time on rung {rungs[climb.progress.rung].name}; the same command goes on")
        sys.exit(3)


def _write_curve(climb: Climb, args: argparse.Namespace) -> None:
    # Only here: the climb itself needs no matplotlib.
    from training.curve import draw_curve  # noqa: PLC0415

    draw_curve(climb.progress, args.curve, f"Training of duetto-demo ({args.shape})")
    record, device = args.curve.with_suffix(".json"), climb.plan.device.type
    write_record(climb.progress, climb.model.shape, args.seed, device, record)
    print(f"wrote {args.curve} and {record}")


def _untrained(shape: str) -> Checkpoint:
    tokenizer = train_tokenizer()
    return Checkpoint(Llama(named_shape(shape, tokenizer.get_vocab_size())), tokenizer)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__)
    parser.add_argument("shape", choices=("reader", "draft", "nano"))
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face checkpoint")
    parser.add_argument("--curve", type=Path, help="write the loss to this PNG, and a JSON beside")
    parser.add_argument(
        "--longer", type=Path, metavar="READER", help="teach this one longer documents instead"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on later")
    parser.add_argument("--rate", type=float, default=1.0, help="times every learning rate")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
