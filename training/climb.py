"""The training loop: one rung after the other, each until held-out data reaches its marks."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from training import checkpoint
from training.checkpoint import Progress
from training.draws import Draw
from training.llama import Llama
from training.muon import Muon
from training.rungs import Rung
from training.sequences import Batch, make_batch, make_parts

NUM_HELD_OUT = 64  # sequences of a test
WARM_UP_STEPS = 50
CLIP = 1.0
MUON_RATE = 10.0  # times the rate of the other parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to climb."""

    directory: Path  # for checkpoints
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    test_every: int = 50  # steps
    save_every_s: float = 60.0
    time_limit_s: float | None = None  # of this call; the state is saved, to go on from


class Climb:
    """A model on its way up the ladder. `run` goes on from the checkpoint, if there is one."""

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, rungs: Sequence[Rung], plan: Plan
    ) -> None:
        self.model = model.to(plan.device)
        self.tokenizer = tokenizer
        self.rungs = rungs
        self.plan = plan
        self.optimizers = make_optimizers(model)
        loaded = checkpoint.load(plan.directory, model, self.optimizers)
        self.progress = loaded or Progress()

    def run(self, report: Callable[[str], None] = lambda _line: None) -> bool:
        """Climb. True at the top; False if time ran out.

        A rung that is not passed in its steps is left behind all the same: the next ones go on with
        what it draws. `report` is told of each test, in a line.
        """
        started, saved, before = time.monotonic(), time.monotonic(), self.progress.seconds
        while self.progress.rung < len(self.rungs):
            rung = self.rungs[self.progress.rung]
            self._step(rung)
            self.progress.seconds = before + time.monotonic() - started
            limit = self.plan.time_limit_s
            is_late = limit is not None and time.monotonic() - started > limit
            is_last = self.progress.step >= rung.max_steps
            if self.progress.step % self.plan.test_every == 0 or is_last:
                is_passed = self._test(rung, report)
                if is_passed or is_last:
                    self.progress.rung, self.progress.step = self.progress.rung + 1, 0
                    self.save(self.plan.directory / rung.name)  # to go back to by hand
            if is_late or time.monotonic() - saved > self.plan.save_every_s:
                self.save()
                saved = time.monotonic()
            if is_late:
                return False
        self.save()
        return True

    def save(self, directory: Path | None = None) -> None:
        """Write a checkpoint, of the plan's directory if no other is given."""
        target = directory or self.plan.directory
        checkpoint.save(target, self.model, self.optimizers, self.progress)

    def _step(self, rung: Rung) -> None:
        progress = self.progress
        first = progress.step * rung.batch_size
        seeds = range(first, first + rung.batch_size)
        drawn = [rung.draw(seed, "train", self.tokenizer) for seed in seeds]
        parts = [part.to(self.plan.device) for part in make_parts(drawn)]
        num_targets = sum(len(part.targets) for part in parts)
        rate = rung.learning_rate * _share_of_rate(rung, progress.step)
        for optimizer, times in zip(self.optimizers, (1.0, MUON_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * rate
            optimizer.zero_grad()
        self.model.train()
        whole = 0.0
        for part in parts:
            logits = self.model(part.ids, part.positions, part.mask, part.wanted)
            loss = functional.cross_entropy(logits, part.targets, reduction="sum") / num_targets
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        progress.step += 1
        progress.num_tokens += sum(part.num_tokens for part in parts)
        if progress.step % 10 == 0:
            progress.losses.append((progress.num_tokens, round(whole, 4)))

    def _test(self, rung: Rung, report: Callable[[str], None]) -> bool:
        progress = self.progress
        scores = self.score(rung, NUM_HELD_OUT)
        progress.scores.append(
            {
                "rung": rung.name,
                "step": progress.step,
                "num_tokens": progress.num_tokens,
                "seconds": round(progress.seconds, 1),
                "loss": progress.losses[-1][1] if progress.losses else None,
                "exact": scores,
            }
        )
        shown = ", ".join(f"{kind} {share:.1%}" for kind, share in scores.items())
        line = (
            f"{rung.name} step {progress.step}, {progress.num_tokens / 1e6:.2f} M tokens, "
            f"{progress.seconds / 60:.1f} min, loss {progress.losses[-1][1]:.3f}: {shown}"
        )
        report(line)
        return not rung.decays and is_passed(scores, rung.marks)

    @torch.no_grad()
    def score(self, rung: Rung, num_sequences: int, *, apart: bool = False) -> dict[str, float]:
        """Exact match on held-out data by kind of question, `apart` as make_batch has it.

        Given the answer's tokens so far, each next one must be the likeliest: then greedy decoding
        writes the answer and ends.
        """
        self.model.eval()
        drawn = rung.tested or rung.draw
        batch = self._batch(drawn, range(num_sequences), held_out=True, apart=apart)
        logits = self.model(batch.ids, batch.positions, batch.mask, batch.wanted)
        is_wrong = logits.argmax(-1) != batch.targets
        wrong = set(batch.answer_of[is_wrong].tolist())
        asked = Counter(batch.kinds)
        right = Counter(kind for i, kind in enumerate(batch.kinds) if i not in wrong)
        return {kind: right[kind] / count for kind, count in sorted(asked.items())}

    def _batch(self, draw: Draw, seeds: range, *, held_out: bool, apart: bool = False) -> Batch:
        split = "eval" if held_out else "train"
        drawn = [draw(seed, split, self.tokenizer) for seed in seeds]
        return make_batch(drawn, apart=apart).to(self.plan.device)


def make_optimizers(model: Llama) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW for embeddings, head and norms, Muon for the matrices inside layers."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    muons = set(inner)
    rest = [p for p in model.parameters() if p not in muons]
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return adam, Muon(inner, weight_decay=0.01)


def is_passed(scores: Mapping[str, float], marks: Mapping[str, float]) -> bool:
    return all(scores.get(kind, 1.0) >= mark for kind, mark in marks.items())


def _share_of_rate(rung: Rung, step: int) -> float:
    """Up at the start of a rung, and down to nothing over a last one."""
    rising = min(1.0, (step + 1) / WARM_UP_STEPS)
    return rising * (1 - step / rung.max_steps) if rung.decays else rising
