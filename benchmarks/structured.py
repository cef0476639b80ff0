"""What a grammar costs: a token with one and without, in turns; how long schemas take to compile.

    python benchmarks/structured.py --model DIR     (--smoke: a random model, and little of all)

Both answers have the same number of tokens and the same company; only the grammar differs. And what
it gives that text which must follow is drafted: steps and time of an answer of long names, with and
without, whose tokens are the same. Turns alternate, as a machine is not equally fast all day. The
last line on stdout is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from in_process import new_engine

from duetto.build import Built, build
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import Grammar, StructuredOutputsParams
from duetto.engine.engine import Engine
from duetto.engine.intake import make_request
from duetto.grammars.compile import CompiledGrammars
from duetto.scheduler.drafts import NoDrafts

# Free text within JSON: an answer of any length, which no turn ends early.
RECORDS = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "count": {"type": "integer"},
            "kind": {"enum": ["a", "b", "c"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}
# Long names, and little beside them.
NAMES = ("customer_identifier", "shipping_address_line", "preferred_language_code")
NAMES += ("marketing_consent_given", "account_creation_timestamp")
LONG_NAMES = {
    "type": "object",
    "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in NAMES},
    "required": list(NAMES),
    "additionalProperties": False,
}
KINDS: tuple[dict[str, Any], ...] = (
    {"type": "string", "maxLength": 200},
    {"type": "integer", "minimum": 0, "maximum": 10_000},
    {"type": "number"},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue", None, 7]},
    {"type": "array", "items": {"type": "string"}, "maxItems": 20},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
    {"type": "string", "format": "date-time"},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
)


def schema_of(num_bytes: int, rng: Random, depth: int = 3) -> dict[str, Any]:
    """An object about as long as that, as people nest them."""
    properties: dict[str, Any] = {}
    while len(json.dumps(properties)) < num_bytes:
        name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz_", k=rng.randint(3, 14)))
        if depth and num_bytes > 400 and rng.random() < 0.3:
            properties[name] = schema_of(rng.randint(100, num_bytes // 3), rng, depth - 1)
        else:
            properties[name] = {**rng.choice(KINDS), "description": "x" * rng.randint(0, 60)}
    required = rng.sample([*properties], rng.randint(0, len(properties)))
    return {"type": "object", "properties": properties, "required": required}


def compile_times(grammars: CompiledGrammars, count: int) -> dict[str, Any]:
    """Milliseconds for schemas of 200 bytes to 50 KB, evenly over the logarithm of their size."""
    rng, times = Random(0), list[float]()
    num_refused = 0
    for index in range(count):
        size = int(200 * 250 ** (index / max(1, count - 1)))
        asked = StructuredOutputsParams(json=schema_of(size, rng))
        begun = time.perf_counter()
        try:
            grammars.make(asked)
        except InvalidRequest:
            num_refused += 1
        times.append(1e3 * (time.perf_counter() - begun))
    times.sort()
    return {
        "num_schemas": count,
        "num_refused": num_refused,
        "p50_ms": round(median(times), 2),
        "p99_ms": round(times[min(count - 1, int(0.99 * count))], 2),
        "max_ms": round(times[-1], 2),
    }


def turn(
    built: Built,
    args: EngineArgs,
    batch: int,
    num_tokens: int,
    grammar: Grammar | None,
    *,
    drafts: bool = True,
) -> float:
    """Seconds for a token of each of the requests, after their prompts."""
    engine = _engine(built, args, drafts=drafts)
    for index in range(batch):
        engine.add(_request(built, index, num_tokens, grammar))
    begun, num_got = 0.0, 0
    while engine.has_work:
        for update in engine.step().updates:
            assert update.error is None
            num_got += len(update.tokens)
        begun = begun or time.perf_counter()  # behind the prompts, and a token of each
    assert num_got == batch * num_tokens, "an answer ended early"
    return (time.perf_counter() - begun) / (num_tokens - 1)


def _engine(built: Built, args: EngineArgs, *, drafts: bool) -> Engine:
    engine = new_engine(built, args)
    if not drafts:
        policies = engine.scheduler._drafts
        engine.scheduler._drafts = policies._replace(of_grammars=NoDrafts())
    return engine


def _request(built: Built, index: int, num_tokens: int, grammar: Grammar | None) -> Request:
    request = make_request(
        built.codec.encode("Write some records:"),
        SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=index),
        codec=built.codec,
        config=built.scheduler_config,
        request_id=str(index),
        arrival_time=time.monotonic(),
        grammar=grammar,
    )
    return replace(request, stop_token_ids=frozenset()) if grammar is None else request


def costs(built: Built, args: EngineArgs, num_tokens: int, turns: int) -> dict[str, Any]:
    grammar = built.grammars.make(StructuredOutputsParams(json=RECORDS))
    found: dict[str, Any] = {}
    for batch in (1, 8):
        kinds = {"free": None, "one_by_one": grammar, "constrained": grammar}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(turns):
            for name, chosen in kinds.items():
                drafts = name == "constrained"
                seconds = turn(built, args, batch, num_tokens, chosen, drafts=drafts)
                times[name].append(1e3 * seconds)
        least = {name: min(each) for name, each in times.items()}
        found[str(batch)] = {
            **{f"{name}_ms": round(each, 3) for name, each in least.items()},
            "ratio_one_by_one": round(least["one_by_one"] / least["free"], 3),
            "ratio": round(least["constrained"] / least["free"], 3),
        }
    return found


def drafted(built: Built, args: EngineArgs, turns: int) -> dict[str, Any]:
    """Steps and milliseconds of an answer, with drafts of what must follow and without."""
    asked = StructuredOutputsParams(json=LONG_NAMES, whitespace_pattern=" ?")
    grammar = built.grammars.make(asked)
    found: dict[str, Any] = {}
    for batch in (1, 8):
        kept: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
        answers: dict[bool, Any] = {}
        for _ in range(turns):
            for drafts in (False, True):
                steps, seconds, answers[drafts] = _answered(built, args, batch, grammar, drafts)
                kept[drafts].append((steps, seconds))
            assert answers[False] == answers[True], "drafts changed an answer"
        without, with_ = (min(each[1] for each in kept[which]) for which in (False, True))
        found[str(batch)] = {
            "tokens": len(answers[True]["0"]),
            "steps_without": kept[False][0][0],
            "steps_with": kept[True][-1][0],
            "without_ms": round(1e3 * without, 1),
            "with_ms": round(1e3 * with_, 1),
            "ratio": round(with_ / without, 3),
        }
    return found


def _answered(
    built: Built, args: EngineArgs, batch: int, grammar: Grammar, drafts: bool
) -> tuple[int, float, dict[str, list[int]]]:
    """Steps after the prompts, their seconds, and the answers."""
    engine = _engine(built, args, drafts=drafts)
    for index in range(batch):
        engine.add(_request(built, index, 256, grammar))
    answers: dict[str, list[int]] = {str(index): [] for index in range(batch)}
    begun, num_steps = time.perf_counter(), 0
    while engine.has_work:
        for update in engine.step().updates:
            assert update.error is None
            answers[update.request_id] += [token.token_id for token in update.tokens]
        num_steps += 1
    return num_steps, time.perf_counter() - begun, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a directory; by default a random model is made")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--num-schemas", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="little of all: does it run?")
    asked = parser.parse_args()
    if asked.smoke:
        asked.num_tokens, asked.turns, asked.num_schemas = 24, 1, 4
    with TemporaryDirectory() as directory:
        model = asked.model or _random_model(Path(directory) / "tiny")
        args = EngineArgs(max_num_seqs=8, max_model_len=512, quantization=asked.quantization)
        built = build(model, args)
        found = {
            "model": built.name,
            "quantization": asked.quantization,
            "num_tokens": asked.num_tokens,
            "turns": asked.turns,
            "per_token": costs(built, args, asked.num_tokens, asked.turns),
            "must_follow": drafted(built, args, asked.turns),
            "compile": compile_times(built.grammars, asked.num_schemas),
        }
    for batch, each in found["per_token"].items():
        print(f"B = {batch}, a token: {each}")
    for batch, each in found["must_follow"].items():
        print(f"B = {batch}, what must follow is drafted: {each}")
    print(f"compile: {found['compile']}")
    print(json.dumps({"results": found}))


def _random_model(path: Path) -> Path:
    command = [sys.executable, "-m", "duetto", "make-model", "tiny", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


if __name__ == "__main__":
    main()
