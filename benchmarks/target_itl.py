"""A budget in milliseconds: eight streams, and a long prompt that arrives beside them.

    python benchmarks/target_itl.py --model path/to/checkpoint

First the prompt runs alone, and the streams without it. Then, for a fixed number of tokens a step
and for a target ITL, the streams run, the prompt arrives, and the gaps between the streams' tokens
are taken from its arrival to its first token. The target is a multiple of a step of the streams
alone. `cold` is the first prompt that a new engine meets, for which it has no measured price of a
chunk; before the others it has met one. The prompt is repeated as often as `--seconds` allow.
Writes a page of Markdown; the last line of stdout is one JSON document.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from in_process import loaded_model, machine, markdown_table, new_engine, today

from duetto.build import Built, EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import Engine

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "target-itl.md"
ITL_LIMIT = 1.25  # of the target, p99
TTFT_LIMIT = 1.3  # of alone plus the decodes' share


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one long prompt met, and did to the streams. Seconds."""

    ttft: float
    num_steps: int  # from its arrival to its first token
    gaps: tuple[float, ...]  # between tokens of the streams in that time


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    itl_p50: float
    itl_p99: float
    itl_max: float
    ttft: float  # median
    steps: float
    ttft_bound: float  # alone plus the decodes' share: 1.0 of it is what no scheduler beats


@dataclass(frozen=True, slots=True)
class Measured:
    alone: float  # TTFT of the prompt, seconds
    decode_step: float
    repetitions: int
    fixed: Sequence[Row]
    timed: Sequence[tuple[float, Row]]  # with their targets


class Bench:
    """One model, and requests of random tokens for it."""

    def __init__(self, built: Built, options: argparse.Namespace) -> None:
        self.built, self.options = built, options
        self._random = random.Random(options.seed)
        self._num_requests = 0

    def arrivals(self, args: EngineArgs, count: int, num_streams: int) -> list[Arrival]:
        """`count` long prompts, one after the other, in one engine."""
        engine = new_engine(self.built, args)
        streams: list[Request] = []
        found = []
        for _ in range(count):
            for request in streams:
                engine.abort(request.request_id)
            streams = [self._request(32, 10**6) for _ in range(num_streams)]
            for request in streams:
                engine.add(request)
            for _ in range(self.options.lead_in if streams else 0):
                engine.step()
            found.append(self._arrive(engine, streams))
        return found

    def decode_step(self, args: EngineArgs, num_streams: int) -> float:
        """Seconds of a step of the streams alone, the median."""
        engine, num_steps = new_engine(self.built, args), 2 * self.options.lead_in
        for request in [self._request(32, 10**6) for _ in range(num_streams)]:
            engine.add(request)
        records = [engine.step().record for _ in range(num_steps)]
        return statistics.median(r.end_time - r.start_time for r in records[8:] if r is not None)

    def _arrive(self, engine: Engine, streams: Sequence[Request]) -> Arrival:
        prompt = self._request(self.options.prompt_len, 1)
        engine.add(prompt)
        num_steps = 0
        while prompt.finish_reason is None:
            engine.step()
            num_steps += 1
        times = prompt.timings
        gaps = [
            after - before
            for request in streams
            for before, after in zip(
                request.timings.token_times, request.timings.token_times[1:], strict=False
            )
            if after > times.arrival_time
        ]
        assert times.ttft_s is not None
        return Arrival(times.ttft_s, num_steps, tuple(gaps))

    def _request(self, num_tokens: int, max_tokens: int) -> Request:
        self._num_requests += 1
        most = self.built.scheduler_config.max_model_len - num_tokens
        size = self.built.model.program.vocab_size
        return Request(
            request_id=str(self._num_requests),
            prompt_token_ids=tuple(self._random.randrange(size) for _ in range(num_tokens)),
            sampling=SamplingParams(
                temperature=0.0, max_tokens=min(max_tokens, most), ignore_eos=True
            ),
            max_tokens=min(max_tokens, most),
            seed=0,
            arrival_time=time.monotonic(),
        )


def row(name: str, arrivals: Sequence[Arrival], alone: float, decode_step: float) -> Row:
    gaps = sorted(gap for arrival in arrivals for gap in arrival.gaps)
    bounds = [a.ttft / (alone + a.num_steps * decode_step) for a in arrivals]
    return Row(
        name=name,
        itl_p50=_percentile(gaps, 50),
        itl_p99=_percentile(gaps, 99),
        itl_max=gaps[-1],
        ttft=statistics.median(a.ttft for a in arrivals),
        steps=statistics.median(a.num_steps for a in arrivals),
        ttft_bound=statistics.median(bounds),
    )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(built: Built, args: EngineArgs, options: argparse.Namespace) -> Measured:
    bench = Bench(built, options)
    bench.arrivals(args, 1, 0)  # warm-up: caches, page faults
    alone = statistics.median(a.ttft for a in bench.arrivals(args, 3, 0))
    decode_step = bench.decode_step(args, options.num_streams)
    count = repetitions(alone, options)
    rows = []
    for tokens in options.fixed:
        fixed = replace(args, max_num_batched_tokens=tokens)
        found = bench.arrivals(fixed, 2, options.num_streams)
        rows.append(row(f"{tokens} tokens a step", found, alone, decode_step))
    targets = []
    for factor in options.factors:
        target = factor * decode_step
        timed = replace(args, target_itl=target * 1000)
        cold, *learned = bench.arrivals(timed, count + 1, options.num_streams)
        for name, found in (("cold", [cold]), ("learned", learned)):
            title = f"target {target * 1000:.1f} ms, {name}"
            targets.append((target, row(title, found, alone, decode_step)))
    return Measured(alone, decode_step, count, rows, targets)


def repetitions(alone: float, options: argparse.Namespace) -> int:
    """How often the prompt may arrive at each target, beside the first time."""
    # With a target of f steps, the prompt has 1 - 1/f of the time.
    once = alone * sum(factor / (factor - 1) for factor in options.factors)
    others = alone * (4 + 3 * len(options.fixed))
    return min(max(int((options.seconds - others) / once) - 1, 2), 12)


def table(measured: Measured) -> str:
    header = ["budget", "ITL p50", "ITL p99", "ITL max", "p99 ÷ target", "TTFT", "steps"]
    header.append("TTFT ÷ (alone + decodes)")
    lines = []
    for target, each in [*((None, row) for row in measured.fixed), *measured.timed]:
        times = (each.itl_p50, each.itl_p99, each.itl_max)
        ratio = "–" if target is None else f"{each.itl_p99 / target:.2f}"
        cells = [*(f"{t * 1000:.1f}" for t in times), ratio, f"{each.ttft * 1000:.0f}"]
        lines.append([each.name, *cells, f"{each.steps:.0f}", f"{each.ttft_bound:.2f}"])
    return markdown_table(header, lines)


def page(measured: Measured, built: Built, options: argparse.Namespace, where: str) -> str:
    alone, step = measured.alone, measured.decode_step
    return f"""# A budget in milliseconds, measured

Written by `benchmarks/target_itl.py` on {today()}; do not edit.
Machine: {where}.
Model: {built.name}, {built.model.program.num_parameters:,} parameters, {built.model.dtype},
{built.model.backend} backend.

{options.num_streams} streams decode; a prompt of {options.prompt_len} tokens arrives
({measured.repetitions} times). Alone its TTFT is {alone * 1000:.0f} ms; a step of the streams alone
takes {step * 1000:.1f} ms (medians). Gaps between the streams' tokens are those that end between
the prompt's arrival and its first token; times are in milliseconds.

{table(measured)}

The last column divides the prompt's TTFT by what it takes alone and the streams' own steps in the
same time: 1 is a prompt that loses nothing else by being cut. `cold` is the first prompt that a new
engine meets, whose price it has only guessed; it learns from every step.

## Again

```sh
python benchmarks/target_itl.py --model path/to/checkpoint
```
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny random one")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--num-streams", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=2048)
    parser.add_argument("--lead-in", type=int, default=24, help="steps before the prompt arrives")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all, about")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    parser.add_argument("--fixed", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    if min(options.factors) <= 1:
        parser.error("--factors: must be above 1; at 1 there is no time for a prompt")
    return options


def main() -> None:
    options, where = parse_options(), machine()
    args = EngineArgs(
        max_num_seqs=options.num_streams + 1,
        enable_prefix_caching=False,
        backend=options.backend,
    )
    with loaded_model(options.model, args) as built:
        longest = built.scheduler_config.max_model_len
        if options.prompt_len >= longest:
            raise SystemExit(
                f"--prompt-len {options.prompt_len}: {built.name} takes {longest} tokens, prompt "
                f"and answer; accepted: at most {longest - 1}"
            )
        measured = measure(built, args, options)
        options.output.write_text(page(measured, built, options, where), encoding="utf-8")
    learned = [(target, each) for target, each in measured.timed if each.name.endswith("learned")]
    document = {
        "benchmark": "target_itl",
        "date": today(),
        "machine": where,
        "alone_ttft_s": measured.alone,
        "decode_step_s": measured.decode_step,
        "repetitions": measured.repetitions,
        "targets": [{"target_s": target, **asdict(each)} for target, each in measured.timed],
        "worst_p99_over_target": max(each.itl_p99 / target for target, each in learned),
        "worst_ttft_over_bound": max(each.ttft_bound for _, each in learned),
        "limits": [ITL_LIMIT, TTFT_LIMIT],
    }
    print(f"wrote {options.output.name}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
