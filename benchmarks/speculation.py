"""What speculation gives, what it costs, and that it changes no answer.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --parts speed loss --shape llama-3.2-1b --quantization int8
    python benchmarks/speculation.py --smoke

Parts:

    equality   the demo reader's answers with drafts and without, bit for bit
    speed      by acceptance: an instrument proposes the true next token with probability alpha
    loss       drafts that are always wrong, and a useless draft model, by batch size
    copy       ngram: the reader's answers from its documents, and a JSON document with one change
    draft      the demo draft for the demo reader
    coupling   how often two close distributions give one token under one noise

All compare runs with drafts and without in this process, over one model in memory; where speed is
compared, step by step in turn.
`--seconds` is the time for each part, about: within it as many pairs are run as fit, five at least.
What each part found is kept in a JSON file beside the page, and the page is written from all that
is there, so parts may be run one by one. The last line of stdout is one JSON document.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from in_process import machine, today
from recorded_answers import RecordedAnswers
from speculating import (
    MOST_DRAFTS,
    NUM_PROMPT,
    Bench,
    Running,
    directory_of,
    load,
    pairs,
    run,
    run_both,
    useless_draft,
)
from speculation_page import write_page
from speculation_simulated import by_rows, predicted_speed
from speculation_texts import copy, coupling, draft, equality, reader

from duetto.core.engine_args import EngineArgs

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "speculation.md"
PARTS = ("equality", "speed", "loss", "copy", "reader", "draft", "coupling")
ALPHAS = (0.6, 0.8, 0.9)
NUM_DRAFTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 15)  # of which prices of steps are measured
BATCHES = (1, 2, 4, 8, 16, 32)
MAX_LEN = 640  # tokens
Json = dict[str, Any]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="llama-3.2-1b", help="a shape, or a checkpoint")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--speed-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="of loss")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each part, about")
    parser.add_argument("--pairs", type=int, default=5, help="at least")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and little of each")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.seconds, options.pairs, options.questions = "tiny", 1.0, 2, 4
        options.batches, options.speed_batches = [1, 2], [1, 2]
    if options.pairs < 2:
        parser.error("--pairs: must be 2 or more: the first is not counted")
    return options


def main() -> None:
    options, where = parse_options(), machine()
    kept = options.output.with_suffix(".json")
    found: Json = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    shape_parts = [part for part in options.parts if part in SHAPE_PARTS]
    results: Json = {}
    for part in options.parts:
        if part not in shape_parts:
            results[part] = OTHER_PARTS[part](options)
    if shape_parts:
        results |= of_a_shape(options, shape_parts)
    for key, result in results.items():
        found[key] = {"machine": where, "date": today(), "seconds": options.seconds, **result}
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found, options.output)
    print(f"wrote {options.output.name}")
    print(json.dumps({"benchmark": "speculation", "date": today(), "machine": where, **results}))


def of_a_shape(options: argparse.Namespace, parts: Sequence[str]) -> Json:
    """What is measured on a random model of some size."""
    found: Json = {}
    with directory_of(options.shape) as path, TemporaryDirectory() as folder:
        args = EngineArgs(
            quantization=options.quantization,
            max_num_seqs=max(*options.batches, *options.speed_batches),
            max_model_len=MAX_LEN,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=(1 << 20) if options.smoke else (1 << 30),
            speculative_model=str(useless_draft(path, Path(folder))) if "loss" in parts else None,
        )
        bench = load(path, args)
        loaded = bench.loaded
        about = {
            "model": path.name,
            "parameters": loaded.program.num_parameters,
            "quantization": loaded.quantization,
            "dtype": loaded.dtype,
            "backend": loaded.backend,
        }
        for part in parts:
            key = f"{part}, {path.name}, {options.quantization}"
            found[key] = about | SHAPE_PARTS[part](bench, options)
    return found


def speed(bench: Bench, options: argparse.Namespace) -> Json:
    """By acceptance and batch size, beside what the measured prices of steps allow."""
    share_s = options.seconds / len(options.speed_batches)
    rows: list[Json] = []
    prices: Json = {}
    for batch in options.speed_batches:
        start = perf_counter()
        recorded, num_output = record(bench, batch, 3 * share_s / (4 * len(ALPHAS)), options)
        times = step_times(bench, recorded, batch, num_output, start + share_s / 4)
        prices[str(batch)] = times
        for place, alpha in enumerate(ALPHAS):
            replace = partial(right_at_times, bench, recorded, alpha)
            until = start + share_s * (1 + 3 * (place + 1) / len(ALPHAS)) / 4
            found = pairs(
                bench.engine(),
                bench.shipped("recorded"),
                partial(bench.requests, batch, num_output),
                least=options.pairs + 1,
                most=50,
                until=until,
                before_each=replace,
            )
            allowed, best = allowed_speed(alpha, times)
            row = {
                "batch": batch,
                "alpha": alpha,
                "allowed": allowed,
                "best_num_drafts": best,
                "fraction": found.ratio / allowed,
                "simulated": predicted_speed(
                    bench.config,
                    by_rows([batch * (1 + count) for count in NUM_DRAFTS], times),
                    batch=batch,
                    num_prompt=NUM_PROMPT,
                    num_output=num_output,
                    accuracy=alpha,
                    max_drafts=MOST_DRAFTS,
                ),
            }
            rows.append(row | found.as_json())
    return {"num_drafts": list(NUM_DRAFTS), "step_s": prices, "rows": rows}


def right_at_times(
    bench: Bench, recorded: Mapping[str, Sequence[int]], alpha: float, number: int
) -> None:
    """Other drafts are right in each pair, so that the median is not one draw's luck."""
    bench.recorded.now = RecordedAnswers(recorded, alpha, bench.vocab_size, seed=number)


def record(
    bench: Bench, batch: int, run_s: float, options: argparse.Namespace
) -> tuple[dict[str, list[int]], int]:
    """The texts of a plain run, and how many tokens an answer has, so that all pairs together take
    about `run_s`: a pair takes less than two plain runs."""
    engine = bench.engine()
    tried = run(engine, bench.requests(batch, 12))
    token_s = statistics.median(s for _, s in tried.steps)
    fitting = int(run_s / (options.pairs + 2) / 1.7 / token_s)
    num_output = min(max(fitting, 24), 256)
    ran = run(engine, bench.requests(batch, num_output))
    prompts = {r.request_id: r.prompt_token_ids for r in bench.requests(batch, num_output)}
    return {name: [*prompts[name], *said] for name, said in ran.token_ids.items()}, num_output


def step_times(
    bench: Bench, recorded: Mapping[str, Sequence[int]], batch: int, num_output: int, until: float
) -> list[float]:
    """Median seconds of a step in which each request verifies 0, 1, ... drafts, all of them right.
    Each beside steps without drafts, in turn, so that a slow moment of the machine meets both."""
    bench.recorded.now = RecordedAnswers(recorded, 1.0, bench.vocab_size)
    plain = bench.engine()
    engines = [bench.always("recorded", count) for count in NUM_DRAFTS[1:]]
    one: list[float] = []  # seconds
    ratios: list[list[float]] = [[] for _ in engines]
    rounds = 0
    while rounds < 2 or (rounds < 12 and perf_counter() < until):
        rounds += 1
        for count, engine, found in zip(NUM_DRAFTS[1:], engines, ratios, strict=True):
            length = min(num_output, 8 + 6 * (1 + count))
            runs = (
                Running(plain, bench.requests(batch, length)),
                Running(engine, bench.requests(batch, length)),
            )
            without, with_drafts = run_both(*runs)
            wide = [s for tokens, s in with_drafts.steps if tokens == batch * (1 + count)]
            alone = [s for _, s in without.steps]
            one += alone
            if wide and alone:
                found.append(statistics.mean(wide) / statistics.mean(alone))
    one_s = statistics.median(one)
    return [one_s] + [one_s * statistics.median(f) if f else math.nan for f in ratios]


def expected_tokens(alpha: float, num_drafts: int) -> float:
    """Of a step: the accepted drafts and the one after them (Leviathan et al., 2023)."""
    return (1 - alpha ** (num_drafts + 1)) / (1 - alpha)


def allowed_speed(alpha: float, times: Sequence[float]) -> tuple[float, int]:
    """Times plain decoding, at the best number of drafts, and that number."""
    return max(
        (expected_tokens(alpha, count) * times[0] / seconds, count)
        for count, seconds in zip(NUM_DRAFTS, times, strict=True)
        if seconds > 0
    )


def loss(bench: Bench, options: argparse.Namespace) -> Json:
    """Drafts that are of no use: how much is lost."""
    weights = [math.sqrt(batch) for batch in options.batches]
    rows: list[Json] = []
    until = perf_counter()
    for batch, weight in zip(options.batches, weights, strict=True):
        share_s = options.seconds * weight / sum(weights)
        recorded, num_output = record(bench, batch, share_s / 2, options)
        bench.recorded.now = RecordedAnswers(recorded, 0.0, bench.vocab_size)
        for method, name in (("recorded", "always wrong"), ("draft_model", "a useless model")):
            until += share_s / 2
            found = pairs(
                bench.engine(),
                bench.shipped(method),
                partial(bench.requests, batch, num_output),
                least=options.pairs + 1,
                most=50,
                until=until,
            )
            rows.append({"drafts": name, "batch": batch} | found.as_json())
    return {"rows": rows}


OTHER_PARTS = {"equality": equality, "draft": draft, "coupling": coupling, "reader": reader}
SHAPE_PARTS = {"speed": speed, "loss": loss, "copy": copy}

if __name__ == "__main__":
    main()
