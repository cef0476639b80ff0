"""Hostile constraints, written by a seed: each is refused in words or is a grammar that works, in
bounded time and memory.

    nice -n 19 python benchmarks/hostile_schemas.py --count 100000 --log hostile.jsonl

Schemas with keywords damaged, in circles, deep, wide, with catastrophic patterns, odd characters,
wrong types and numbers out of range; regexes, grammars, structural tags and choices likewise. What
compiles is followed for some tokens. Times are of `make`, which is what a request waits for. What
is neither refused nor works is a fault: it is printed with its number, which `--first` makes again.
The last line on stdout is one JSON document.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.structured import StructuredOutputsParams, Vocabulary
from duetto.grammars.compile import CompiledGrammars

Json = Any
NUM_FOLLOWED = 8  # tokens of an answer
END = 256
SLOW_MS = 1000  # is told one by one
PIECES = ('{"', '": "', '", "', '"}', "}}", "]}", "true", "null", "the", "name", "  ", "界", "ab")

NAMES = (
    *("a", "b", "name", "", " ", '"', "\\", "\n", "\x00", "\ud800", "\udfff\ud800", "é", "e\u0301"),
    *(
        "\u202e\u200b",
        "🙂" * 20,
        "\ufeff",
        "\uffff",
        "%json",
        "/",
        "~0~1",
        "x" * 3000,
        "$ref",
        "type",
    ),
)
KEYWORDS = (
    *("type", "const", "enum", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "prefixItems", "minItems"),
    *("maxItems", "uniqueItems", "contains", "properties", "required", "additionalProperties"),
    *("patternProperties", "minProperties", "maxProperties", "propertyNames", "anyOf", "oneOf"),
    *("allOf", "not", "if", "then", "else", "$ref", "$defs", "definitions", "$id", "$anchor"),
    *("$dynamicRef", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "$schema"),
    *("contentEncoding", "x-guidance", "additionalItems", "nullable", "default", "title"),
)
NUMBERS = (
    *(0, -1, 1, 2, 7, -0.0, 0.1, 1e-300, -1e300, 5e-324, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63)),
    *(10**40, -(10**400), 1.7976931348623157e308, 999_999_999, 65_536, 0.30000000000000004),
)
PATTERNS = (
    *(
        "(a+)+$",
        "((a*)*)*",
        "(a|aa)+b",
        "(a|a?)+",
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        "(.*)*x",
        "(?i)ß",
    ),
    *("(x+x+)+y", "[^\\W\\d]{1,5000}", "\\p{L}{900}", "(\\d{1,99}){1,99}", ".{100000}", "(?=a)b"),
    *(
        "(?<!a)b",
        "(a)\\1",
        "[",
        "(",
        "\\",
        "*",
        "a{2,1}",
        "a{,5}",
        "[z-a]",
        "\\u0000",
        "\\x{110000}",
    ),
    *(
        "(((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9}){9})",
        "(a|b)*a(a|b){18}",
        "\\b\\B",
        "$^",
    ),
    *("[\\s\\S]*[\\s\\S]*[\\s\\S]*x", "(?:" * 500 + "a" + ")" * 500, "a|" * 3000 + "b", "/", "\n"),
    *(
        "(?P<n>a)(?P=n)",
        "\\p{Han}+\\p{Greek}*",
        "(?s:.*)(?s:.*)(?s:.*)",
        "🙂{3,}",
        "\ud800",
        "(|a|)*",
    ),
)
REFERENCES = (
    *("#", "#/", "#/$defs/a", "#/$defs/b", "#/nowhere", "#/properties/a", "#/anyOf/0", "#/items"),
    *("#/$defs/~1~0", "https://x.y/z", "file:///etc/passwd", "#a", "", "#/$defs/a/$defs/a", "%"),
)
SEEDS: tuple[Json, ...] = (
    {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]+$"},
            "b": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 4},
            "c": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]},
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {
            "a": {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}},
            "b": {"enum": ["x", 1, None, [True]]},
        },
    },
    {
        "$defs": {"a": {"anyOf": [{"type": "null"}, {"items": {"$ref": "#/$defs/a"}}]}},
        "$ref": "#/$defs/a",
    },
    {"oneOf": [{"type": "string", "format": "date-time"}, {"type": "number", "multipleOf": 0.5}]},
    {"allOf": [{"properties": {"a": {"minimum": 3}}}, {"patternProperties": {"^b": {"const": 1}}}]},
    {"type": "array", "prefixItems": [{"const": {"a": 1}}, {"type": "boolean"}], "items": False},
    {"type": ["string", "integer"], "minLength": 2, "maximum": 5, "title": "t", "default": 1},
)


# --- schemas -------------------------------------------------------------------------------------


def odd_value(rng: Random, depth: int = 2) -> Json:
    """Anything that JSON can say, mostly where it does not belong."""
    match rng.randrange(9):
        case 0:
            return rng.choice([None, True, False])
        case 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return rng.choice(NAMES)
        case 4:
            return rng.choice(PATTERNS)
        case 5:
            return rng.choice(REFERENCES)
        case 6 if depth:
            return [odd_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        case 7 if depth:
            names = rng.sample([*KEYWORDS, *NAMES], rng.randrange(4))
            return {name: odd_value(rng, depth - 1) for name in names}
        case _:
            return copy.deepcopy(rng.choice(SEEDS))


def places(schema: Json) -> list[tuple[Json, Any]]:
    """What holds each value of a schema, and under which key."""
    found: list[tuple[Json, Any]] = []
    waiting = [schema]
    while waiting and len(found) < 2000:
        each = waiting.pop()
        keys = [*each] if isinstance(each, dict) else [*range(len(each))]
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys if isinstance(each[key], dict | list)]
    return found


def put_value(rng: Random, schema: Json) -> Json:
    if held := places(schema):
        holder, key = rng.choice(held)
        holder[key] = odd_value(rng)
    return schema


def put_keyword(rng: Random, schema: Json) -> Json:
    holders = [schema, *(h[k] for h, k in places(schema) if isinstance(h[k], dict))]
    rng.choice(holders)[rng.choice(KEYWORDS)] = odd_value(rng)
    return schema


def put_fitting(rng: Random, schema: Json) -> Json:
    """A keyword whose value is of its type, and too much."""
    many, text = rng.choice([50, 1000, 5000]), rng.choice(PATTERNS)
    fitting: tuple[dict[str, Json], ...] = (
        {"pattern": text, "type": "string"},
        {"minLength": rng.choice(NUMBERS[2:]), "type": "string"},
        {"enum": [f"{i}{rng.choice(NAMES)}" for i in range(many)]},
        {"enum": [[i, {"a": i}] for i in range(many)]},
        {"type": "object", "properties": {f"p{i}": {"pattern": text} for i in range(many // 10)}},
        {"required": [f"r{i}" for i in range(many)], "type": "object"},
        {
            "patternProperties": {p: {"$ref": "#"} for p in rng.sample(PATTERNS, 3)},
            "type": "object",
        },
        {"anyOf": [{"const": i} if i % 2 else {"$ref": "#"} for i in range(many // 10)]},
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": i}}} for i in range(many // 20)
            ]
        },
        {"allOf": [{"anyOf": [{"pattern": p} for p in rng.sample(PATTERNS, 3)]} for _ in range(6)]},
        {"multipleOf": rng.choice(NUMBERS), "type": rng.choice(["number", "integer"])},
        {"minimum": rng.choice(NUMBERS), "maximum": rng.choice(NUMBERS), "type": "number"},
        {"minItems": rng.choice(NUMBERS), "type": "array", "items": {"$ref": "#"}},
        {"prefixItems": [{"$ref": rng.choice(REFERENCES)} for _ in range(many // 10)]},
        {"format": rng.choice(["date-time", "uuid", "regex", "uri", "zzz", ""]), "type": "string"},
    )
    holders = [schema, *(h[k] for h, k in places(schema) if isinstance(h[k], dict))]
    rng.choice(holders).update(rng.choice(fitting))
    return schema


def put_chain(rng: Random, schema: Json) -> Json:
    """References that lead to each other, the last of them to what is there."""
    length = rng.choice([10, 300, 3000])
    wrapped: Callable[[Json], Json] = rng.choice(
        [
            lambda each: each,
            lambda each: {"items": each},
            lambda each: {"anyOf": [each, {"const": 1}]},
        ]
    )
    links = {f"c{i}": wrapped({"$ref": f"#/$defs/c{i + 1}"}) for i in range(length)}
    return {"$defs": {**links, f"c{length}": schema}, "$ref": "#/$defs/c0"}


def put_reference(rng: Random, schema: Json) -> Json:
    if held := places(schema):
        holder, key = rng.choice(held)
        holder[key] = {"$ref": rng.choice(REFERENCES)}
    return schema


def put_itself(rng: Random, schema: Json) -> Json:
    """A part of it within another one."""
    if held := places(schema):
        (holder, key), (other, at) = rng.choice(held), rng.choice(held)
        holder[key] = copy.deepcopy(other[at])
    return schema


def put_name(rng: Random, schema: Json) -> Json:
    if held := [(h, k) for h, k in places(schema) if isinstance(h, dict)]:
        holder, key = rng.choice(held)
        holder[rng.choice([*NAMES, *KEYWORDS])] = holder.pop(key)
    return schema


def nest(rng: Random, schema: Json) -> Json:
    depth, kind = rng.choice([3, 20, 60, 98, 150]), rng.randrange(4)
    for _ in range(depth):
        schema = (
            {"type": "object", "properties": {"a": schema}, "required": ["a"]},
            {"type": "array", "items": schema},
            {"anyOf": [schema, {"type": "null"}]},
            {"allOf": [schema]},
        )[kind]
    return schema


CHANGES: tuple[Callable[[Random, Json], Json], ...] = (
    *(put_value, put_value, put_keyword, put_fitting, put_fitting, put_reference, put_itself),
    *(put_name, nest, put_chain),
)


def hostile_schema(rng: Random) -> Json | str:
    """A schema, or its text, which may be no JSON any more."""
    schema = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.choice([1, 1, 2, 3, 5, 8])):
        schema = rng.choice(CHANGES)(rng, schema)
        if not isinstance(schema, dict):
            break
    if rng.random() < 0.1:
        return damaged(rng, json.dumps(schema, ensure_ascii=rng.random() < 0.5))
    return schema


def damaged(rng: Random, text: str) -> str:
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + 40)
        text = rng.choice(
            [
                text[:a] + text[b:],
                text[:b] + text[a:],
                text[:a] + rng.choice([*NAMES, *PATTERNS, "[" * 500, "NaN", "1e999"]) + text[a:],
            ]
        )
    return text


# --- constraints of other kinds ------------------------------------------------------------------


def hostile_regex(rng: Random) -> str:
    made = rng.choice(PATTERNS)
    for _ in range(rng.randrange(3)):
        other = rng.choice(PATTERNS)
        made = rng.choice(
            [
                f"({made})+",
                f"({made}){{1,{rng.choice([3, 90, 2000])}}}",
                f"{made}|{other}",
                made + other,
            ]
        )
    return damaged(rng, made) if rng.random() < 0.3 else made


GRAMMARS = (
    *(
        'start: "a" start | "b"',
        'start: start start | "a"',
        "start: a\na: b\nb: a",
        "start: /(a+)+/",
    ),
    *('root ::= "a" root | "b"', 'root ::= [a-z]{1,9} root? | ("x" | "y")*', "start: nowhere", "x"),
    *('start: "a"{1,9999}', 'start: %json {"$ref": "#"}', "start: <[0]> | <|x|>", "%llguidance {}"),
    *(
        "start: a*\na: b*\nb: a*",
        'start[lazy]: /.*/ "x"',
        "root ::= " + "(" * 900 + '"a"' + ")" * 900,
    ),
)


def hostile_grammar(rng: Random) -> str:
    made = rng.choice(GRAMMARS)
    if rng.random() < 0.3:
        made = (
            "start: "
            + " | ".join(f'r{i} "x"' for i in range(300))
            + "\n"
            + "\n".join(f"r{i}: r{(i * 7 + 1) % 300} | /{rng.choice('abc')}+/" for i in range(300))
        )
    if rng.random() < 0.1:
        names, length = rng.choice(["r", "T"]), rng.choice([100, 2000, 15_000])
        links = (f"{names}{i}: {names}{i + 1}" for i in range(length))
        made = "\n".join([f"start: {names}0", *links, f'{names}{length}: "a"'])
    return damaged(rng, made) if rng.random() < 0.6 else made


def hostile_tag(rng: Random) -> Json:
    contents: tuple[Json, ...] = (
        {"type": "json_schema", "json_schema": hostile_schema(rng)},
        {"type": "regex", "pattern": hostile_regex(rng)},
        {"type": "any_text"},
        odd_value(rng),
    )
    tag: Json = {
        "begin": rng.choice(NAMES),
        "content": rng.choice(contents),
        "end": rng.choice(NAMES),
    }
    formats: tuple[Json, ...] = (
        {"type": "tag", **tag},
        {"type": "sequence", "elements": [{"type": "tag", **tag}] * rng.randint(0, 40)},
        {"type": "triggered_tags", "triggers": [rng.choice(NAMES)], "tags": [tag]},
        odd_value(rng),
    )
    made: Json = {"format": rng.choice(formats)}
    if rng.random() < 0.3:
        structure = {"begin": "<a>", "schema": hostile_schema(rng), "end": rng.choice(NAMES)}
        made = {"structures": [structure] * rng.randint(0, 3), "triggers": ["<a>"]}
    return put_value(rng, made) if rng.random() < 0.3 else made


def hostile_choice(rng: Random) -> list[Json]:
    many = rng.choice([0, 1, 4096, 4097])
    return [rng.choice(NAMES) + str(i) for i in range(many)] or [odd_value(rng)]


KINDS: dict[str, tuple[int, Callable[[Random], Json]]] = {
    "json": (70, hostile_schema),
    "regex": (15, hostile_regex),
    "grammar": (8, hostile_grammar),
    "structural_tag": (5, hostile_tag),
    "choice": (2, hostile_choice),
}


def hostile_constraint(number: int) -> dict[str, Json]:
    rng = Random(f"hostile {number}")
    (kind,) = rng.choices([*KINDS], [weight for weight, _ in KINDS.values()])
    constraint = {kind: KINDS[kind][1](rng)}
    if kind == "json" and rng.random() < 0.1:
        constraint["whitespace_pattern"] = hostile_regex(rng)
    return constraint


# --- what becomes of them ------------------------------------------------------------------------


def byte_grammars() -> CompiledGrammars:
    tokens = [*(bytes([i]) for i in range(256)), b"<end>", *(text.encode() for text in PIECES)]
    return CompiledGrammars(lambda: Vocabulary(tokens, {"<end>": END}, frozenset({END})))


def outcome(grammars: CompiledGrammars, number: int) -> tuple[str, float]:
    """What became of one, and the milliseconds until that was known. Raises what is a fault."""
    constraint = hostile_constraint(number)
    begun = time.perf_counter()
    try:
        grammar = grammars.make(StructuredOutputsParams(**constraint))
    except InvalidRequest as error:
        took = 1e3 * (time.perf_counter() - begun)
        assert error.field.startswith("structured_outputs") and len(error.message) < 500, error
        assert "panic" not in error.message, error
        error.message.encode()  # a reply can say it
        return "too long" if "to compile" in error.message else "refused", took
    took = 1e3 * (time.perf_counter() - begun)
    rng, matcher, tokens = Random(number), grammars.matcher(grammar), list[int]()
    try:
        while len(tokens) < NUM_FOLLOWED and matcher.seek(tokens):
            may = np.flatnonzero(matcher.allowed())
            assert len(may), "nothing may follow"
            tokens.append(int(rng.choice(may)))
    except EngineError:
        return "works up to a limit", took
    return "works", took


def max_rss_mib() -> float:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return round(int(peak) / 1024, 1)


def work(first: int, count: int) -> None:
    """In a process of its own, which a fault of a native library may end: a line for each."""
    grammars = byte_grammars()
    for number in range(first, first + count):
        begun = time.perf_counter()
        try:
            what, took = outcome(grammars, number)
        except Exception as error:
            what, took = "fault", 1e3 * (time.perf_counter() - begun)
            print(f"{number}: {type(error).__name__}: {error!s:.300}", file=sys.stderr, flush=True)
        print(json.dumps([number, what, took, max_rss_mib()]), flush=True)


class Tally:
    def __init__(self) -> None:
        self.outcomes = Counter[str]()
        self.times = list[float]()
        self.faults = list[int]()
        self.max_rss_mib = 0.0

    def add(self, number: int, what: str, took: float, rss_mib: float) -> None:
        self.outcomes[what] += 1
        self.times.append(took)
        self.max_rss_mib = max(self.max_rss_mib, rss_mib)
        if what == "fault":
            self.faults.append(number)
        if took > SLOW_MS:
            print(f"{number}: {what} after {took:.0f} ms", flush=True)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.times)
        shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}
        places = {name: min(len(ordered) - 1, int(s * len(ordered))) for name, s in shares.items()}
        return {
            "count": len(ordered),
            "outcomes": dict(self.outcomes),
            **{name: round(ordered[place], 2) for name, place in places.items()},
            "max_rss_mib": self.max_rss_mib,
            "faults": self.faults,
        }


def ask_workers(first: int, count: int, tally: Tally, log: Path | None) -> None:
    """One process at a time; where one dies, the next goes on behind what ended it."""
    number, end = first, first + count
    while number < end:
        command = [
            sys.executable,
            __file__,
            "--work",
            f"--first={number}",
            f"--count={end - number}",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                tally.add(*json.loads(line))
                number += 1
                if log is not None and number % 500 == 0:
                    with log.open("a") as file:
                        file.write(json.dumps({"next": number, **tally.summary()}) + "\n")
        if worker.returncode:
            print(f"{number}: the process ended with {worker.returncode}", flush=True)
            tally.add(number, "fault", 0.0, 0.0)
            number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--log", type=Path, help="what was done so far is added, every 500")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.first, asked.count)
        return
    tally = Tally()
    ask_workers(asked.first, asked.count, tally, asked.log)
    print(json.dumps(tally.summary()))


if __name__ == "__main__":
    main()
