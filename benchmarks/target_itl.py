"""A budget in milliseconds: eight streams, and a long prompt that arrives beside them.

    python benchmarks/target_itl.py
    python benchmarks/target_itl.py --models path/to/checkpoint llama-3.2-1b --seconds 150

First the prompt runs alone, and the streams without it. Then, for each budget (off, the default,
numbers of milliseconds, a fixed number of tokens), the streams run, the prompt arrives, and the
gaps between the streams' tokens are taken from its arrival to its first token. `cold` is the first
prompt that a new engine meets, for which it has no measured price of a chunk; before the others it
has met one. The prompt is repeated as often as `--seconds` allow. A model is a checkpoint or a name
that `duetto make-model` knows, whose weights are then random. All but the first get fewer budgets,
and a prompt of half the length. Writes a page of Markdown; the last line of stdout is one JSON
document.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from in_process import loaded_model, machine, markdown_table, new_engine, today

from duetto.build import Built
from duetto.core.engine_args import EngineArgs
from duetto.core.options import BATCHED_TOKENS, DEFAULT_ITL_TARGET
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
    about: str  # the model
    alone: float  # TTFT of the prompt, seconds
    decode_step: float
    prompt_len: int
    repetitions: int
    rows: Sequence[tuple[float | None, Row]]  # with their targets, seconds


class Bench:
    """One model, and requests of random tokens for it."""

    def __init__(
        self, built: Built, options: argparse.Namespace, prompt_len: int, lead_in: int
    ) -> None:
        self.built, self.options, self.prompt_len = built, options, prompt_len
        self.lead_in = lead_in  # steps before the prompt arrives
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
            for _ in range(self.lead_in if streams else 0):
                engine.step()
            found.append(self._arrive(engine, streams))
        return found

    def decode_step(self, args: EngineArgs, num_streams: int) -> float:
        """Seconds of a step of the streams alone, the median."""
        engine, num_steps = new_engine(self.built, args), 2 * self.lead_in
        for request in [self._request(32, 10**6) for _ in range(num_streams)]:
            engine.add(request)
        records = [engine.step().record for _ in range(num_steps)]
        return statistics.median(
            r.end_time - r.start_time for r in records[len(records) // 4 :] if r is not None
        )

    def _arrive(self, engine: Engine, streams: Sequence[Request]) -> Arrival:
        prompt = self._request(self.prompt_len, 1)
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


def measure(
    built: Built, args: EngineArgs, options: argparse.Namespace, *, is_short: bool
) -> Measured:
    prompt_len = options.prompt_len // (2 if is_short else 1)
    longest = built.scheduler_config.max_model_len
    if prompt_len >= longest:
        raise SystemExit(
            f"--prompt-len {prompt_len}: {built.name} takes {longest} tokens, prompt and answer; "
            f"accepted: at most {longest - 1}"
        )
    bench = Bench(built, options, prompt_len, options.lead_in // (3 if is_short else 1))
    bench.arrivals(args, 1, 0)  # warm-up: caches, page faults
    alone = statistics.median(a.ttft for a in bench.arrivals(args, 1 if is_short else 3, 0))
    decode_step = bench.decode_step(args, options.num_streams)
    budgets = _budgets(args, options, decode_step, is_short=is_short)
    seconds = options.seconds / 2 if is_short else options.seconds
    count = min(max(int(seconds / (1.6 * alone * len(budgets))) - 1, 1), 12)
    rows = []
    for name, target, budget in budgets:
        cold, *learned = bench.arrivals(budget, count + 1, options.num_streams)
        if target is not None:
            rows.append((target, row(f"{name}, cold", [cold], alone, decode_step)))
            name = f"{name}, learned"
        rows.append((target, row(name, learned, alone, decode_step)))
    about = (
        f"{built.name}, {built.model.program.num_parameters:,} parameters, {built.model.dtype}, "
        f"{built.model.backend} backend"
    )
    return Measured(about, alone, decode_step, prompt_len, count, rows)


def _budgets(
    args: EngineArgs, options: argparse.Namespace, decode_step: float, *, is_short: bool
) -> list[tuple[str, float | None, EngineArgs]]:
    """Name, target in seconds, and how the engine is run."""
    off = replace(args, target_itl="off")
    least_s, steps = DEFAULT_ITL_TARGET
    assert least_s is not None
    budgets: list[tuple[str, float | None, EngineArgs]] = [
        ("off", None, off),
        ("the default", max(least_s, steps * decode_step), replace(args, target_itl="auto")),
        (
            f"{options.target:g} ms",
            options.target / 1000,
            replace(args, target_itl=options.target),
        ),
    ]
    if is_short:
        return budgets
    for factor in options.factors:
        target = factor * decode_step
        timed = replace(args, target_itl=target * 1000)
        budgets.append((f"{target * 1000:.1f} ms, {factor:g} steps", target, timed))
    for tokens in options.fixed:
        budgets.append(
            (f"off, {tokens} tokens a step", None, replace(off, max_num_batched_tokens=tokens))
        )
    return budgets


def table(measured: Measured) -> str:
    header = ["--target-itl", "ITL p50", "ITL p99", "ITL max", "p99 ÷ target", "TTFT", "steps"]
    header.append("TTFT ÷ (alone + decodes)")
    lines = []
    for target, each in measured.rows:
        times = (each.itl_p50, each.itl_p99, each.itl_max)
        ratio = "–" if target is None else f"{each.itl_p99 / target:.2f}"
        cells = [*(f"{t * 1000:.1f}" for t in times), ratio, f"{each.ttft * 1000:.0f}"]
        lines.append([each.name, *cells, f"{each.steps:.0f}", f"{each.ttft_bound:.2f}"])
    return markdown_table(header, lines)


def section(measured: Measured, options: argparse.Namespace) -> str:
    return f"""## {measured.about}

{options.num_streams} streams decode; a prompt of {measured.prompt_len} tokens arrives
({measured.repetitions} times). Alone its TTFT is {measured.alone * 1000:.0f} ms; a step of the
streams alone takes {measured.decode_step * 1000:.1f} ms (medians).

{table(measured)}
"""


def page(found: Sequence[Measured], options: argparse.Namespace, where: str) -> str:
    sections = "\n".join(section(each, options) for each in found)
    return f"""# A budget in milliseconds, measured

Written by `benchmarks/target_itl.py` on {today()}; do not edit.
Machine: {where}.

Gaps between the streams' tokens (ITL) are those that end between the prompt's arrival and its first
token; times are in milliseconds. `off` is what a server did before there was a default: a step
takes as long as its {BATCHED_TOKENS} tokens take. The default is 250 ms, or four steps of
the streams alone if that is more. `cold` is the first prompt that a new engine meets, whose price
it has only guessed; it learns from every step. The last column divides the prompt's TTFT by what it
takes alone and the streams' own steps in the same time: 1 is a prompt that loses nothing else by
being cut.

{sections}
## Again

```sh
python benchmarks/target_itl.py
```
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--target", type=float, default=400.0, help="milliseconds, for each model")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--num-streams", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=2048)
    parser.add_argument("--lead-in", type=int, default=24, help="steps before the prompt arrives")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the first model, about")
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--fixed", type=int, nargs="+", default=[64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    if min(options.factors) <= 1:
        parser.error("--factors: must be above 1; at 1 there is no time for a prompt")
    return options


@contextmanager
def model_at(name: str, args: EngineArgs) -> Iterator[Built]:
    """A checkpoint, or one of random weights that is made for the occasion."""
    with TemporaryDirectory() as folder:
        path = Path(name)
        if not path.is_dir():
            path = Path(folder) / name
            command = [sys.executable, "-m", "duetto", "make-model", name, str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with loaded_model(path, args) as built:
            yield built


def main() -> None:
    options, where = parse_options(), machine()
    args = EngineArgs(
        max_num_seqs=options.num_streams + 1,
        enable_prefix_caching=False,
        backend=options.backend,
    )
    found = []
    for number, name in enumerate(options.models):
        with model_at(name, args) as built:
            found.append(measure(built, args, options, is_short=number > 0))
        options.output.write_text(page(found, options, where), encoding="utf-8")
    timed = [
        (target, each)
        for measured in found
        for target, each in measured.rows
        if target is not None and each.name.endswith("learned")
    ]
    document = {
        "benchmark": "target_itl",
        "date": today(),
        "machine": where,
        "models": [
            {
                "model": measured.about,
                "alone_ttft_s": measured.alone,
                "decode_step_s": measured.decode_step,
                "repetitions": measured.repetitions,
                "rows": [{"target_s": target, **asdict(each)} for target, each in measured.rows],
            }
            for measured in found
        ],
        "worst_p99_over_target": max(each.itl_p99 / target for target, each in timed),
        "worst_ttft_over_bound": max(each.ttft_bound for _, each in timed),
        "limits": [ITL_LIMIT, TTFT_LIMIT],
    }
    print(f"wrote {options.output.name}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
