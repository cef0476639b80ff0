"""Parts of speculation.py about what is said: by the demo reader, and in a text that is copied."""

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorded_answers import RecordedAnswers
from speculating import Bench, Ran, directory_of, load, new_request, pairs, run

from duetto.checkpoints.tokenizer import Tokenizer
from duetto.core.batch import SamplingInput
from duetto.core.draft_counts import NO_CHAINS
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.speculation import NgramOptions
from duetto.demo import demo_model_dir
from duetto.engine.engine import Engine
from duetto.evals.evaluate import EvalPlan, draw_items
from duetto.runner.proposers.ngram import NgramProposer
from duetto.runner.sampler import sample_token

READER, DRAFT = "duetto-demo", "duetto-demo-draft"
METHODS = ("ngram", "suffix", "draft_model", "recorded")
BATCHES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.0, 0.3, 0.8, 1.2)
MAX_ANSWER = 24
MOST_COPIED = 8  # drafts in a step
# Of weights and KV, and the draft model's weights where it is the same model.
FORMATS = {("none", "auto"): "int8", ("int8", "int8"): "none", ("int4", "bfloat16"): "int8"}
Json = dict[str, Any]


# --- a text that is copied ---------------------------------------------------------------------


def copy(bench: Bench, options: argparse.Namespace) -> Json:
    """A JSON document returned with one field changed: the model is made to say it."""
    prompt, answer = json_with_a_change(bench.tokenizer)
    text = [*prompt, *answer]
    runner = bench.saying(text, {"ngram": NgramProposer(NgramOptions(), 64)})
    found = pairs(
        bench.engine(runner=bench.saying(text, {})),
        bench.shipped("ngram", runner=runner),
        lambda: [new_request("0", prompt, len(answer))],
        least=options.pairs,
        most=20,
        until=perf_counter() + options.seconds / 2,
    )
    request = new_request("0", prompt, len(answer))
    ran = run(bench.always("ngram", MOST_COPIED, runner=runner), [request])
    if ran.token_ids["0"] != answer:
        raise RuntimeError("the model did not say what it was made to say")
    return {
        "num_prompt": len(prompt),
        "num_output": len(answer),
        "num_drafts": MOST_COPIED,
        "tokens_per_step": tokens_per_step([ran]),
        **found.as_json(),
    }


def json_with_a_change(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What is asked, with the document; and the document that is answered."""
    rng = random.Random(3)
    names = ("alder", "birch", "elm", "hazel", "maple")
    trees = [
        {"name": name, "height_m": rng.randrange(4, 40), "felled": rng.random() < 0.3}
        for name in names
    ]
    before = json.dumps({"forest": "north", "trees": trees}, indent=1)
    trees[3]["height_m"] = 41
    after = json.dumps({"forest": "north", "trees": trees}, indent=1)
    asked = f"Set the height of hazel to 41.\n{before}\n"
    return list(tokenizer.encode(asked)), list(tokenizer.encode(after))


def tokens_per_step(runs: Sequence[Ran]) -> float:
    """Of all steps that gave a request tokens, with drafts or without."""
    said = sum(len(tokens) for ran in runs for tokens in ran.answers.values())
    return said / (said - sum(ran.chains.total.num_accepted for ran in runs))


# --- the same bits -------------------------------------------------------------------------------


def equality(options: argparse.Namespace) -> Json:
    """Bit for bit, tokens and log-probabilities, in formats, batches, proposers, temperatures."""
    rows: list[Json] = []
    count, num_output = (5, 12) if options.smoke else (16, 32)
    with directory_of("tiny") as path:
        for formats, draft_quantization in FORMATS.items():
            bench = tiny_bench(path, *formats, draft_quantization)
            greedy: dict[str, list[int]] | None = None
            for temperature in TEMPERATURES:
                make = partial(varied, bench, count, num_output, temperature)
                alone = alone_answers(bench, make())
                said = {name: [t.token_id for t in tokens] for name, tokens in alone.items()}
                greedy = greedy or said
                texts = {r.request_id: [*r.prompt_token_ids, *said[r.request_id]] for r in make()}
                bench.recorded.now = RecordedAnswers(texts, 0.8, bench.vocab_size)
                about = {
                    "formats": " / ".join(formats),
                    "temperature": temperature,
                    "num_not_greedy": sum(said[name] != greedy[name] for name in said),
                }
                for method in METHODS:
                    found = compared(bench, method, make(), alone)
                    rows.append({"method": method} | about | found)
    return {
        "rows": rows,
        "num_answers": sum(row["num_answers"] for row in rows),
        "differing": sum(row["num_differing"] for row in rows),
    }


def tiny_bench(
    path: Path, quantization: Any, kv_cache_dtype: Any, draft_quantization: str
) -> Bench:
    """A random model, whose draft model is itself in another format."""
    args = EngineArgs(
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=1 << 22,
        speculative_config=[
            {"method": "ngram", "prompt_lookup_min": 1},
            {"method": "suffix"},
            {"method": "draft_model", "model": str(path), "quantization": draft_quantization},
        ],
    )
    return load(path, args)


def varied(bench: Bench, count: int, num_output: int, temperature: float) -> list[Request]:
    """Prompts of random tokens and all lengths."""
    rng = random.Random(1)
    top_p = 0.95 if temperature else 1.0
    return [
        new_request(
            str(i),
            [rng.randrange(bench.vocab_size) for _ in range(rng.choice((1, 7, 31, 32, 33, 90)))],
            num_output,
            seed=i,
            temperature=temperature,
            top_p=top_p,
            logprobs=2,
        )
        for i in range(count)
    ]


def alone_answers(bench: Bench, requests: Sequence[Request]) -> dict[str, list[Any]]:
    answers: dict[str, list[Any]] = {}
    for request in requests:
        answers |= run(bench.engine(), [request]).answers
    return answers


def compared(
    bench: Bench, method: str, requests: list[Request], alone: Mapping[str, list[Any]]
) -> Json:
    """The same requests with drafts in batches of every size, none kept from one to the next."""
    num_answers = num_differing = 0
    chains = NO_CHAINS
    for batch in BATCHES:
        engine = bench.always(method, 4)
        for start in range(0, len(requests), batch):
            group = [replace(r) for r in requests[start : start + batch]]
            ran = run(engine, group)
            chains = chains.plus(ran.chains)
            num_answers += len(group)
            num_differing += sum(ran.answers[r.request_id] != alone[r.request_id] for r in group)
    proposed, accepted = chains.total
    return {
        "num_answers": num_answers,
        "num_differing": num_differing,
        "num_proposed": proposed,
        "num_accepted": accepted,
    }


# --- the demo reader -----------------------------------------------------------------------------


def reader_bench() -> Bench:
    args = EngineArgs(
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=1 << 26,
        speculative_config=[
            {"method": "ngram"},
            {"method": "suffix"},
            {"method": "draft_model", "model": DRAFT},
        ],
    )
    return load(demo_model_dir(READER), args)


def questions(bench: Bench, count: int) -> list[list[int]]:
    """Prompts: documents of a small world, and a question that they answer."""
    prompts = []
    for item in draw_items(EvalPlan(num_questions=count)):
        text = bench.tokenizer.render_chat(item.messages(True))
        prompts.append(list(bench.tokenizer.encode(text, add_special_tokens=False)))
    return prompts


def asked(bench: Bench, prompts: Sequence[Sequence[int]], **sampling: object) -> list[Request]:
    """Requests that end as the model ends them."""
    ends = frozenset(bench.tokenizer.eos_token_ids)
    return [
        new_request(str(i), prompt, MAX_ANSWER, seed=i, ends=ends, **sampling)
        for i, prompt in enumerate(prompts)
    ]


def reader(options: argparse.Namespace) -> Json:
    """Answers from documents, one question at a time: always four drafts, and as shipped."""
    bench = reader_bench()
    prompts = questions(bench, options.questions)
    rows = [proposing(bench, method, prompts) for method in ("ngram", "suffix")]
    return {"rows": rows, "num_questions": len(prompts)}


def draft(options: argparse.Namespace) -> Json:
    """The demo draft for the demo reader."""
    bench = reader_bench()
    prompts = questions(bench, options.questions)
    rows = [proposing(bench, "draft_model", prompts, temperature) for temperature in TEMPERATURES]
    return {"rows": rows, "num_questions": len(prompts)}


def proposing(
    bench: Bench,
    method: str,
    prompts: Sequence[Sequence[int]],
    temperature: float = 0.0,
) -> Json:
    """One proposer, one question at a time."""
    sampling = {"temperature": temperature, "top_p": 0.95 if temperature else 1.0}
    requests = asked(bench, prompts, **sampling)
    drafted, before = in_turns(bench.always(method, 4), bench.engine(), requests)
    ours, theirs = in_turns(bench.shipped(method), bench.engine(), requests)
    chains = NO_CHAINS
    for ran in drafted:
        chains = chains.plus(ran.chains)
    shares = zip(chains.accepted, chains.proposed, strict=True)
    half = len(requests) // 2
    return {
        "method": method,
        "temperature": temperature,
        "mean_answer": sum(len(a) for r in theirs for a in r.answers.values()) / len(theirs),
        "acceptance": chains.total.acceptance or 0.0,
        "by_place": [accepted / proposed for accepted, proposed in shares],
        "tokens_per_step": tokens_per_step(drafted),
        "shipped_tokens_per_step": tokens_per_step(ours),
        "ratio_always": times_as_fast(before[half:], drafted[half:]),
        "ratio_shipped": times_as_fast(theirs[half:], ours[half:]),
    }


def in_turns(
    with_drafts: Engine, plain: Engine, requests: Sequence[Request]
) -> tuple[list[Ran], list[Ran]]:
    """Each question with drafts and without, and each of the two first every other time: what ran
    before is still in the processor's caches. Engines with drafts share KV, so only one is here."""
    turns: list[tuple[Engine, list[Ran]]] = [(with_drafts, []), (plain, [])]
    (_, drafted), (_, theirs) = turns
    for request in requests:
        for engine, ran in turns:
            ran.append(run(engine, [replace(request)]))
        if drafted[-1].answers != theirs[-1].answers:
            raise RuntimeError("answers with drafts and without differ")
        turns.reverse()
    return drafted, theirs


def times_as_fast(plain: Sequence[Ran], others: Sequence[Ran]) -> float:
    """Of the questions the median, as an answer takes milliseconds and a neighbour more."""
    pairs = zip(plain, others, strict=True)
    ratios = [p.seconds / o.seconds for p, o in pairs if o.seconds]
    return statistics.median(ratios) if ratios else math.nan


# --- one noise for two distributions -------------------------------------------------------------


def coupling(options: argparse.Namespace) -> Json:
    """How often draws from two close distributions agree under the same seed and place: with the
    sampler that ships, with the inverse of the cumulative distribution, and at best."""
    rows = []
    size, num_pairs, num_draws = (512, 4, 50) if options.smoke else (4096, 60, 400)
    rng = np.random.default_rng(0)
    for noise in (0.3, 0.7, 1.2):
        best, shipped, inverse = list[float](), list[float](), list[float]()
        for _ in range(num_pairs):
            p = (3 * rng.standard_normal(size)).astype(np.float32)
            q = (p + noise * rng.standard_normal(size)).astype(np.float32)
            best.append(float(np.minimum(softmax(p), softmax(q)).sum()))
            shipped.append(agreement(p, q, num_draws))
            u = rng.random(num_draws)
            places = [np.searchsorted(np.cumsum(softmax(each)), u) for each in (p, q)]
            inverse.append(float(np.mean(places[0] == places[1])))
        means = [sum(each) / num_pairs for each in (best, shipped, inverse)]
        rows.append(
            dict(zip(("noise", "best", "gumbel", "inverse_cdf"), (noise, *means), strict=True))
        )
    return {"rows": rows, "num_tokens": size, "num_pairs": num_pairs, "num_draws": num_draws}


def agreement(p: NDArray[np.float32], q: NDArray[np.float32], num_draws: int) -> float:
    params = SamplingParams(temperature=1.0)
    places = [SamplingInput(params, seed=7, num_output_tokens=i) for i in range(num_draws)]
    same = [sample_token(p, at).token_id == sample_token(q, at).token_id for at in places]
    return sum(same) / num_draws


def softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) - row.max())
    return np.asarray(weights / weights.sum())
