"""Answers fed to parsers: whole, and cut in many ways."""

import random
from collections.abc import Callable, Iterable
from itertools import pairwise

from duetto.dialects.pieces import AnswerParser, AnswerPiece, ToolSchema
from duetto.dialects.reader import joined

TOOLS = (
    ToolSchema("get"),
    ToolSchema(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "where": {"type": "object"},
                "hours": {"type": "array", "items": {"type": "number"}},
                "is_metric": {"type": "boolean"},
            },
        },
    ),
)

Make = Callable[[], AnswerParser]


def parsed(make: Make, parts: Iterable[str]) -> list[AnswerPiece]:
    parser = make()
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined([*pieces, *parser.finish()])


def cut(text: str, points: Iterable[int]) -> list[str]:
    edges = [0, *sorted(points), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def parsed_alike(make: Make, text: str, num_cuts: int = 20) -> list[AnswerPiece]:
    """The pieces of a text, after it has been cut in some ways and gave the same."""
    whole = parsed(make, [text])
    assert parsed(make, text) == whole  # character by character
    rng = random.Random(text)
    for _ in range(num_cuts):
        points = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 9))]
        assert parsed(make, cut(text, points)) == whole, points
    return whole
