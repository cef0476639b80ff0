"""500 written schemas, as answers and as arguments of calls, in random models at a high
temperature, batched, preempted and with drafts: all that ends is valid, by another's validator.

`make oracle` runs all of them; `make test` has some by hand in test_schemas.py, and a few here.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
from fakes import make_request
from grammar_world import asked
from grammars.written_schemas import (
    KEYWORDS,
    as_parameters,
    is_valid,
    keywords_in,
    written_schemas,
)
from guessers import Eager
from small_models import KINDS, LLAMA, MAX_LEN, Model, make_model

from duetto.core.request import FinishReason
from duetto.core.speculation import NgramOptions
from duetto.core.structured import Grammar, Vocabulary
from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.dialect import CallDialect
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart, ToolSchema
from duetto.grammars.calls import CallableTool, calls_alone
from duetto.grammars.compile import CompiledGrammars
from duetto.grammars.matcher import WATCHED
from duetto.runner.masks import Masks
from duetto.runner.proposers.ngram import NgramProposer

COUNT, FEW = 500, 12
MAX_TOKENS = MAX_LEN - 8
END, PAD = 256, b""
# Bytes are 0 to 255; what follows is how JSON is often written, and what begins and ends a call.
PIECES = [
    *('{"', '":', '",', '"}', '"]', '": "', '", "', "}}", "]}", "null", "true", "false", "[]"),
    *(
        "{}",
        '""',
        "  ",
        "name",
        "age",
        "ab",
        "20",
        "00",
        "-0",
        '"a',
        "</",
        "\\u",
        "\\n",
        "🙂",
        "界",
    ),
]
MARKERS = sorted({marker for dialect in CALL_DIALECTS for marker in dialect.markers})
TOKENS = [*(bytes([i]) for i in range(256)), b"<end>", *(each.encode() for each in PIECES)]
SPECIAL = {"<end>": END} | {
    marker: len(TOKENS) + i for i, marker in enumerate(m for m in MARKERS if len(m) > 5)
}
TOKENS += [name.encode() for name in SPECIAL if name != "<end>"]
GRAMMARS = CompiledGrammars(lambda: Vocabulary(TOKENS, SPECIAL, frozenset({END})))
# What ends something, so that random answers have many parts and not one long text.
CLOSERS = {i for i, token in enumerate(TOKENS) if token in (b'"', b'",', b'"}', b'"]', b"}", b"]")}


class Wanted(NamedTuple):
    schema: Any
    grammar: Grammar
    dialect: CallDialect | None = None  # of the call that the answer is


class Said(NamedTuple):
    token_ids: list[int]
    finish_reason: FinishReason | None

    @property
    def text(self) -> str:
        return b"".join(TOKENS[i] for i in self.token_ids if i != END).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    kind = replace(KINDS[3], config=LLAMA | {"vocab_size": len(TOKENS)})
    return make_model(kind, tmp_path_factory.mktemp("model"))


def said(model: Model, wanted: Sequence[Wanted]) -> list[Said]:
    """The answers; in a small arena, so that there are preemptions, and with drafts."""
    proposers = {"ngram": NgramProposer(NgramOptions(), 64)}
    engine = model.engine(
        masks=Masks(GRAMMARS),
        decode=lambda ids, _skip: b"".join(TOKENS[i] for i in ids).decode(errors="replace"),
        proposers=proposers,
        drafts=Eager([*proposers]),
        num_blocks=2 * MAX_LEN // 8,
        max_num_seqs=16,
    )
    rng, tokens = np.random.default_rng(1), [list[int]() for _ in wanted]
    ended: list[FinishReason | None] = [None] * len(wanted)
    for index, each in enumerate(wanted):
        request = make_request(
            *(str(index), rng.integers(0, len(TOKENS), 5).tolist(), MAX_TOKENS),
            grammar=each.grammar,
            temperature=1.5,
            seed=index,
            logit_bias=dict.fromkeys(CLOSERS, float(index % 4)),
        )
        engine.add(replace(request, stop_token_ids=frozenset({END})))
    while engine.has_work:
        for update in engine.step().updates:
            index = int(update.request_id)
            assert update.error is None, (wanted[index].schema, update.error)
            tokens[index] += [token.token_id for token in update.tokens]
            ended[index] = update.finish_reason or ended[index]
    assert engine.scheduler.counts.num_preemptions >= len(wanted) // 50
    assert engine.scheduler._drafts.of_proposers.num_accepted > len(wanted) // 20
    return [Said(*each) for each in zip(tokens, ended, strict=True)]


def could_have_ended(grammar: Grammar, token_ids: Sequence[int]) -> bool:
    """Whether an end was found where the last tokens of an answer began to be watched. It would
    have been led to it. None is found in some texts with a pattern that is not anchored."""
    matcher, place = GRAMMARS.matcher(grammar), len(token_ids) - WATCHED
    assert matcher.seek(token_ids[:place])
    return matcher.shortest_end(WATCHED - 1) is not None


def check(wanted: Sequence[Wanted], answers: Sequence[Said]) -> None:
    num_ended = 0
    for each, answer in zip(wanted, answers, strict=True):
        if answer.finish_reason is not FinishReason.STOP:
            assert len(answer.token_ids) == MAX_TOKENS
            assert not could_have_ended(each.grammar, answer.token_ids), (each.schema, answer)
            continue
        num_ended += 1
        texts = [answer.text]
        if each.dialect is not None:
            texts = arguments_of(each.dialect, each.schema, answer.text)
        for text in texts:
            assert is_valid(each.schema, text), (each.schema, text)
    assert num_ended > 0.95 * len(wanted)


def arguments_of(dialect: CallDialect, schema: Any, text: str) -> list[str]:
    """Of the calls that an answer is."""
    parser = dialect.parser([ToolSchema("tool", schema)])
    arguments: dict[int, str] = {}
    for piece in (*parser.push(text), *parser.finish()):
        if isinstance(piece, CallStart):
            arguments[piece.index] = ""
        elif isinstance(piece, CallArguments):
            arguments[piece.index] += piece.text
        else:
            assert isinstance(piece, CallEnd) and piece.is_complete, (text, piece)
    assert arguments, text
    return [*arguments.values()]


def answers_by(schemas: Sequence[Any]) -> list[Wanted]:
    return [Wanted(schema, GRAMMARS.make(asked(json=schema))) for schema in schemas]


def calls_by(schemas: Sequence[Any], dialects: Sequence[CallDialect]) -> list[Wanted]:
    """Each dialect in its turn."""
    wanted = []
    for index, schema in enumerate(schemas):
        dialect, parameters = dialects[index % len(dialects)], as_parameters(schema)
        tools = [CallableTool("tool", parameters)]

        def start(lark, form=dialect.form, tools=tools):
            return calls_alone(lark, form, tools, parallel=False)

        wanted.append(Wanted(parameters, GRAMMARS.write(start, "tools"), dialect))
    return wanted


JSON_DIALECTS = [dialect for dialect in CALL_DIALECTS if dialect.form.arguments is None]


def test_a_few_as_answers_and_as_arguments(model):
    schemas = written_schemas(FEW)
    wanted = answers_by(schemas[::2]) + calls_by(schemas[1::2], JSON_DIALECTS)
    check(wanted, said(model, wanted))


@pytest.mark.oracle
def test_as_answers(model):
    wanted = answers_by(written_schemas(COUNT))
    check(wanted, said(model, wanted))


@pytest.mark.oracle
def test_as_arguments_of_calls(model):
    wanted = calls_by(written_schemas(COUNT), JSON_DIALECTS)
    check(wanted, said(model, wanted))


def test_each_keyword_is_there_often():
    schemas = written_schemas(COUNT)
    found = Counter(word for schema in schemas for word in set(keywords_in(schema)))
    assert all(found[word] >= 5 for word in KEYWORDS), found
    for schema in schemas[:FEW]:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_validator_sees_what_is_wrong():
    for format_, text in (
        *(("date-time", "2020-01-01"), ("time", "12:00"), ("duration", "P"), ("date", "2020-13-1")),
        *(("hostname", "-a"), ("uri", "a b"), ("uuid", "1"), ("ipv4", "1.2"), ("ipv6", "::g")),
    ):
        assert not is_valid({"type": "string", "format": format_}, json.dumps(text))
    assert is_valid({"format": "date-time"}, '"2020-01-01T23:59:60Z"')
