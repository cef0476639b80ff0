"""Random answers in a dialect, whole and damaged, and what must be true of their pieces.

    python tests/dialects/fuzz.py 1000000 --log fuzz.jsonl

parses that many answers (about 1500 in a second), and writes what was done after every hundred
seeds; `--first-seed` goes on where a run was interrupted. A fault prints its dialect and seed.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dialects.answers import TOOLS, cut, parsed

from duetto.dialects.answer import answer_parser, markers_of
from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.dialect import CallDialect, calls_text
from duetto.dialects.harmony import HARMONY
from duetto.dialects.pieces import (
    AnswerParser,
    AnswerPiece,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
)
from duetto.dialects.reasoning import HARMONY_REASONING, REASONING_DIALECTS, ReasoningDialect

CUTS_OF_A_TEXT = 8
NAMES = [tool.name for tool in TOOLS]
WORDS = [
    "a",
    "the ",
    "get",
    "Oslo\n",
    "\n\n",
    " ",
    "é🙂",
    "x<",
    "[",
    "{",
    '"',
    "'",
    "`",
    "\\",
    "}]",
    "|>",
]
NO_CALLS = ['{"name": "other", "arguments": {}}', "[other(a=1)]", "<function=other>", '{"a": [1]}']
# What stands around names and arguments, beside the markers.
FRAMING = [
    *" \t\r\n{}[](),:;",
    *('"name"', '"arguments"', '"parameters"', '"id"', '"type"', '"call_id"', '"function"', '"1"'),
    *(f'"{name}"' for name in NAMES),
    *NAMES,
    *(
        "function",
        "```json",
        "```tool_code",
        "```",
        "functools",
        "call:",
        "<function=",
        "</function>",
    ),
    *("<parameter=", "</parameter>", ">", "=", "assistant", "analysis", "commentary", "final"),
    *("to=functions.", "json"),
]

# Harmony: what ends a message or begins one that is no call, and a header that is cut off.
BETWEEN_MESSAGES = re.compile(
    r"\s*(<\|(end|return|call)\|>|(<\|start\|>assistant)?\s*"
    r"<\|channel\|>(analysis|commentary|final)\s*((<\|constrain\|>)?\s*\w+)?\s*<\|message\|>)\s*"
)
# In a header of harmony: what the arguments are said to be, in any word.
CONSTRAINED_TO = re.compile(r"\w+(?=\s*<\|message\|>)")
CUT_HEADER = re.compile(r"\s*<\|(start|channel)\|>(?:(?!<\|message\|>)[\s\S])*")


def reasoning_beside(calls: CallDialect, rng: random.Random) -> ReasoningDialect | None:
    if calls is HARMONY:
        return HARMONY_REASONING
    others = [dialect for dialect in REASONING_DIALECTS if dialect is not HARMONY_REASONING]
    return rng.choice([None, *others])


def random_value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(8 if depth < 2 else 6):
        case 0:
            return rng.choice([True, False])
        case 1:
            return rng.choice([0, -7, 12345, 1.5, -2e-05, 1e22])
        case 2:
            return None
        case 6:
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        case 7:
            return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(3))}
        case _:
            return random_string(rng)


def random_string(rng: random.Random) -> str:
    return "".join(rng.choice([*WORDS, "New York", "</tool", "1"]) for _ in range(rng.randrange(4)))


def random_call(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A tool, and arguments that are of the types in its schema."""
    if rng.random() < 0.5:
        return "get", {key: random_string(rng) for key in ("a", "b") if rng.random() < 0.5}
    values = {
        "city": random_string(rng),
        "days": rng.randrange(9),
        "note": rng.choice([None, random_string(rng)]),
        "where": {"k": random_value(rng, 1)},
        "hours": [rng.random(), 1],
        "is_metric": rng.choice([True, False]),
    }
    return "get_weather", {key: value for key, value in values.items() if rng.random() < 0.5}


def random_text(rng: random.Random, markers: Sequence[str]) -> str:
    """Words, and now and then what looks like a call."""
    parts = []
    for _ in range(rng.randrange(6)):
        part = rng.choice(WORDS)
        if rng.random() < 0.2 and markers:
            marker = rng.choice(markers)
            part = rng.choice([marker, marker[: rng.randrange(len(marker))]])
        if rng.random() < 0.1:
            part = rng.choice(NO_CALLS)
        parts.append(part)
    return "".join(parts)


def random_answer(
    rng: random.Random, calls: CallDialect, reasoning: ReasoningDialect | None
) -> str:
    markers = markers_of(calls, reasoning)
    parts = []
    if reasoning is not None and rng.random() < 0.5:
        closing = rng.choice([*reasoning.closings, ""])
        parts += [rng.choice([*reasoning.openings, ""]), random_text(rng, markers), closing]
    for _ in range(rng.randrange(4)):
        num_calls = 1 if calls.form.separator is None else rng.randrange(1, 4)
        made = calls_text(calls.form, [random_call(rng) for _ in range(num_calls)])
        parts += [random_text(rng, markers), rng.choice(["", "\n"]), made]
    return "".join([*parts, random_text(rng, markers)])


def damaged(rng: random.Random, text: str, markers: Sequence[str], num: int) -> str:
    """The text with some of it lost, doubled or put in, so many times."""
    for _ in range(num):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + 12)
        put_in = rng.choice([*WORDS, *markers, *FRAMING])
        text = rng.choice(
            [
                text[:a] + text[b:],
                text[:b] + text[a:],
                text[:a] + put_in + text[a:],
                text[:a] + put_in + text[b:],
                text[:a],
            ]
        )
    return text


def check(
    text: str, pieces: Sequence[AnswerPiece], calls: CallDialect, reasoning: ReasoningDialect | None
) -> None:
    """What is true of any answer's pieces."""
    open_call: int | None = None
    num_calls = 0
    arguments = ""
    for piece in pieces:
        match piece:
            case CallStart(index, name):
                assert open_call is None and index == num_calls and name in NAMES
                open_call, arguments = index, ""
                num_calls += 1
            case CallArguments(index, part):
                assert index == open_call and part
                arguments += part
            case CallEnd(index, is_complete):
                assert index == open_call
                open_call = None
                if is_complete and calls.form.arguments is not None:
                    assert isinstance(json.loads(arguments), dict)
            case Content(part) | Reasoning(part):
                assert open_call is None and part
    assert open_call is None
    assert is_all_there(text, pieces, calls, reasoning), "a character is lost or doubled"


def is_all_there(
    text: str, pieces: Sequence[AnswerPiece], calls: CallDialect, reasoning: ReasoningDialect | None
) -> bool:
    """Whether the text is the pieces in their order, with nothing but framing between them.

    Looked for without knowing how a parser works: all places up to which some of the pieces may
    account for the text. Arguments that were converted may stand for any text.
    """
    markers = markers_of(calls, reasoning)
    framing = Framing({*FRAMING, *markers}, CONSTRAINED_TO if calls is HARMONY else None)
    places = behind_framing(text, {0}, framing)
    for piece in pieces:
        if isinstance(piece, CallStart | CallEnd):
            continue
        if isinstance(piece, CallArguments) and calls.form.arguments is not None:
            places = set(range(min(places), len(text) + 1))
        elif isinstance(piece, CallArguments) and piece.text == "{}":  # may have been left out
            places |= places_behind(text, places, piece.text)
        elif calls is HARMONY and not isinstance(piece, CallArguments):
            places = places_behind_messages(text, places, piece.text)
        else:
            places = places_behind(text, places, piece.text)
        places = behind_framing(text, places, framing)
        if not places:
            return False
    cut_off = {marker[:end] for marker in framing.parts for end in range(len(marker))}
    return any(
        text[place:] in cut_off or (calls is HARMONY and CUT_HEADER.fullmatch(text, place))
        for place in places
    )


class Framing:
    """What may stand around names and arguments; where it ends in one text, found once."""

    def __init__(self, parts: set[str], word: re.Pattern[str] | None) -> None:
        self.parts = parts
        self._word = word
        self._ends: dict[int, list[int]] = {}

    def ends(self, text: str, place: int) -> list[int]:
        if place not in self._ends:
            found = [place + len(part) for part in self.parts if text.startswith(part, place)]
            if self._word is not None and (word := self._word.match(text, place)):
                found.append(word.end())
            self._ends[place] = found
        return self._ends[place]


def places_behind(text: str, places: Iterable[int], part: str) -> set[int]:
    return {place + len(part) for place in places if text.startswith(part, place)}


def places_behind_messages(text: str, places: set[int], part: str) -> set[int]:
    """As `places_behind`, where the part may be the text of several messages in a row."""
    for char in part:
        for place in [*places]:
            while found := BETWEEN_MESSAGES.match(text, place):
                place = found.end()
                places.add(place)
        places = places_behind(text, places, char)
    return places


def behind_framing(text: str, places: set[int], framing: Framing) -> set[int]:
    found, waiting = set(places), list(places)
    while waiting:
        for end in framing.ends(text, waiting.pop()):
            if end not in found:
                found.add(end)
                waiting.append(end)
    return found


def fuzz(rng: random.Random, calls: CallDialect) -> Counter[str]:
    """One text, cut in many ways; what was done, in numbers."""
    reasoning = reasoning_beside(calls, rng)
    markers = markers_of(calls, reasoning)
    done = Counter(texts=1, parses=CUTS_OF_A_TEXT + 2, mutations=rng.randrange(4))
    text = damaged(rng, random_answer(rng, calls, reasoning), markers, done["mutations"])
    is_open = rng.random() < 0.2

    def make() -> AnswerParser:
        return answer_parser(calls, reasoning, TOOLS, is_open=is_open)

    whole = parsed(make, [text])
    check(text, whole, calls, reasoning)
    assert parsed(make, text) == whole, text
    done["splits"] = len(text)
    for _ in range(CUTS_OF_A_TEXT):
        points = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 12))]
        assert parsed(make, cut(text, points)) == whole, (text, points)
        done["splits"] += len(points)
    done["calls"] = sum(isinstance(piece, CallStart) for piece in whole)
    done[f"texts with reasoning of {'no kind' if reasoning is None else reasoning.name}"] = 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("num_parses", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="what was done is added, one JSON object a line")
    asked = parser.parse_args()
    done: Counter[str] = Counter()
    seed = asked.first_seed
    while done["parses"] < asked.num_parses:
        for calls in CALL_DIALECTS:
            try:
                done += fuzz(random.Random(f"{calls.name} {seed}"), calls)
            except BaseException:
                print(f"{calls.name}, seed {seed}, after {dict(done)}", file=sys.stderr)
                raise
        seed += 1
        if seed % 100 == 0 and asked.log is not None:
            with asked.log.open("a") as log:
                log.write(json.dumps({"next_seed": seed, **done}) + "\n")
    print(json.dumps({"dialects": len(CALL_DIALECTS), "next_seed": seed, **done}))


if __name__ == "__main__":
    main()
