"""Grammars of one vocabulary: compiled within bounds, and kept.

A grammar takes milliseconds to compile, and hostile ones as long as they are let: fuel and sizes
bound what llguidance does, and a clock what the caller waits for. Any thread may ask.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from importlib import import_module
from threading import BoundedSemaphore, Lock, Thread, stack_size
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from duetto.core.errors import EngineError, InvalidRequest
from duetto.core.structured import (
    FIELD,
    Grammar,
    ReasoningBudget,
    StructuredOutputsParams,
    Vocabulary,
)
from duetto.core.tenant_lru import TenantLru
from duetto.grammars.budget import BudgetedEngine
from duetto.grammars.constraints import check_size, grammar_text, json_options
from duetto.grammars.contradiction import contradiction
from duetto.grammars.json_schema import (
    OPTIONS,
    ImpossibleSchema,
    blamed_keyword,
    prepared_schema,
)
from duetto.grammars.lark import LarkWriter
from duetto.grammars.matcher import MAX_SAID, MAX_WALK, Matcher, Ways, first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

T = TypeVar("T")

DEADLINE_S = 5.0  # of a compilation, on a busy machine
NUM_AT_A_TIME = 2
# llguidance recurses along rules and references, of which a constraint has thousands; where a
# stack ends, so does the process. Only what is used takes memory.
STACK_BYTES = 2**29
_STACK_SIZE = Lock()  # it is the process's, until a thread has started
LOCATING_S = 1.0  # of a search for what contradicts itself in a schema
MAX_LOCATED = 2**15  # characters of a schema that is searched
MAX_TRIED = 8  # tokens of an answer, when it is compiled
MAX_KEPT = 256  # grammars
MAX_REFUSED = 1024  # of which it is known that they are
MAX_KEPT_BYTES = 8 * 2**20  # of their texts; compiled they are many times as large
LIMITS = {
    "max_items_in_row": 20_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}

_IMPOSSIBLE = "Unsatisfiable schema: "  # as llguidance says it


class _Compiled:
    """A grammar at the beginning of an answer."""

    def __init__(self, grammar: Grammar, engine: "LLMatcher", ways: Ways) -> None:
        self.grammar = grammar
        self._engine = engine
        self._ways = ways
        self._lock = Lock()
        self._least: int | None = None
        self._was_asked = False

    def matcher(self, budget: ReasoningBudget | None = None) -> Matcher:
        engine = self._engine.deep_copy()
        if budget is None:
            return Matcher(engine, self._ways, self._ask_least)
        return Matcher(
            BudgetedEngine(engine, budget, self._ways.spelling), self._ways, self._ask_least
        )

    def _ask_least(self) -> int | None:
        """How many tokens the shortest answer has that is found, its end among them; asked seldom,
        as it takes some milliseconds."""
        with self._lock:
            if not self._was_asked:
                path = Matcher(self._engine.deep_copy(), self._ways).shortest_end(MAX_WALK)
                self._least = None if path is None else len(path) + 1
                self._was_asked = True
            return self._least


def said_of(message: str) -> str:
    """What llguidance says of a grammar, without what only its own authors can use."""
    if message.startswith("panic"):
        return "it cannot be compiled"
    detail = re.search(r"^error: (.+)$", message, re.MULTILINE)  # of a regex, below a drawing of it
    if detail is not None:
        return f"a regex: {detail.group(1)[:MAX_SAID]}"
    return re.sub(r"^(at \d+\(\d+\): |failed to compile JSON schema: )+", "", first_line(message))


class CompiledGrammars:
    """Makes grammars, and matchers that follow answers through them."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], *, deadline_s: float = DEADLINE_S
    ) -> None:
        """`vocabulary` is asked once, when the first constraint comes; it may take a second."""
        self._ask_vocabulary = vocabulary
        self._deadline_s = deadline_s
        self._loading, self._lock = Lock(), Lock()
        self._working = BoundedSemaphore(NUM_AT_A_TIME)
        self._loaded: tuple[Vocabulary, LLTokenizer, Ways] | None = None
        self._kept: dict[str, _Compiled] = {}
        self._sizes: TenantLru[str] = TenantLru()
        self._refused: dict[str, tuple[type[InvalidRequest], str]] = {}  # and in which words

    def make(self, asked: StructuredOutputsParams, tenant: bytes = b"") -> Grammar:
        """Raises InvalidRequest for what no answer can be, or what is not supported, with its
        place."""
        vocabulary, _, _ = self._load()
        text = grammar_text(asked, vocabulary.special)
        try:
            return self._checked(text, f"{FIELD}.{asked.kind}", tenant)
        except ImpossibleSchema as error:
            raise self._located(error, asked) from None
        except InvalidRequest as error:
            if asked.json is None:
                raise
            place = blamed_keyword(error.message, json.loads(str(asked.json)))
            message = error.message if place is None else f"{place}: {error.message}"
            raise InvalidRequest(error.field, message) from None

    def write(self, start: Callable[[LarkWriter], str], field: str, tenant: bytes = b"") -> Grammar:
        """The grammar whose start `start` writes. Raises InvalidRequest, naming `field`."""
        vocabulary, _, _ = self._load()
        lark = LarkWriter(vocabulary.special)
        text = lark.text(start(lark))
        check_size(field, text)
        return self._checked(text, field, tenant)

    def adopt(self, grammar: Grammar, tenant: bytes = b"") -> Grammar:
        """One that another process has made, compiled and kept as this one's own. Raises
        InvalidRequest for what is none."""
        return self._checked(grammar.text, FIELD, tenant)._replace(budget=grammar.budget)

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of an answer. Raises EngineError."""
        with self._lock:
            compiled = self._kept.get(grammar.key)
            if compiled is not None:
                self._sizes.touch(grammar.key)
        if compiled is None:  # it has fallen out
            try:
                compiled = self._in_time(lambda: self._compile(grammar, FIELD), FIELD)
            except InvalidRequest as error:
                raise EngineError(error.message) from None
        return compiled.matcher(grammar.budget)

    # --- how -------------------------------------------------------------------------------

    def _load(self) -> "tuple[Vocabulary, LLTokenizer, Ways]":
        with self._loading:
            if self._loaded is None:
                vocabulary = self._ask_vocabulary()
                if not vocabulary.eos_token_ids:
                    raise InvalidRequest(
                        FIELD, "this model has no token that ends a text, so no answer could end"
                    )
                self._loaded = vocabulary, _tokenizer(vocabulary), Ways(vocabulary)
            return self._loaded

    def _checked(self, text: str, field: str, tenant: bytes) -> Grammar:
        """The grammar, compiled and kept."""
        key = sha256(b"%d:%b%b" % (len(tenant), tenant, text.encode())).hexdigest()[:32]
        with self._lock:
            if key in self._kept:
                self._sizes.touch(key)
                return self._kept[key].grammar
            refused = self._refused.get(key)
        if refused is not None:
            kind, message = refused
            raise kind(field, message)
        grammar = Grammar(text, key)
        compiled = self._in_time(lambda: self._compile_or_note(grammar, field), field)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = compiled
                self._sizes.add(key, tenant, len(text))
            while len(self._kept) > MAX_KEPT or self._sizes.total > MAX_KEPT_BYTES:
                victim = self._sizes.victim()
                assert victim is not None
                self._sizes.remove(victim)
                del self._kept[victim]
        return grammar

    def _compile_or_note(self, grammar: Grammar, field: str) -> _Compiled:
        """Clients send what is refused with every request of a conversation."""
        try:
            return self._compile(grammar, field)
        except InvalidRequest as error:
            with self._lock:
                self._refused[grammar.key] = type(error), error.message
                if len(self._refused) > MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]
            raise

    def _compile(self, grammar: Grammar, field: str) -> _Compiled:
        _, tokenizer, ways = self._load()
        engine = _library().LLMatcher(tokenizer, grammar.text, log_level=0, limits=_limits())
        problems = [engine.get_error()] if engine.is_error() else engine.get_grammar_warnings()
        if problems and _IMPOSSIBLE in problems[0]:
            _, _, why = said_of(problems[0]).partition(_IMPOSSIBLE)
            raise ImpossibleSchema(field, f"a schema in it allows nothing: {why}")
        if problems:
            raise InvalidRequest(field, f"is not supported: {said_of(problems[0])}")
        compiled = _Compiled(grammar, engine, ways)
        try:  # what fails at once should not fail in the middle of an answer
            compiled.matcher().shortest_end(MAX_TRIED)
        except EngineError as error:
            raise InvalidRequest(field, f"cannot be followed: {error}") from None
        return compiled

    def _located(self, error: ImpossibleSchema, asked: StructuredOutputsParams) -> ImpossibleSchema:
        """With the place and the keywords, as far as they are found in time."""
        given = str(asked.json)
        if asked.json is None or len(given) > MAX_LOCATED:
            return error
        _, tokenizer, _ = self._load()
        until = monotonic() + LOCATING_S
        schema = json.loads(prepared_schema(given, error.field, json_options(asked)))
        schema.pop(OPTIONS)

        def allows_nothing(each: Any) -> bool:
            if each is False:
                return True
            if not isinstance(each, dict) or monotonic() > until:
                return False
            lark = LarkWriter({})
            text = lark.text(lark.schema(json.dumps(each)))
            engine = _library().LLMatcher(tokenizer, text, log_level=0, limits=_limits())
            return _IMPOSSIBLE in engine.get_error()

        work = partial(contradiction, schema, allows_nothing)
        try:
            return ImpossibleSchema(error.field, self._in_time(work, error.field).message)
        except InvalidRequest:  # too busy for it
            return error

    def _in_time(self, work: Callable[[], T], field: str) -> T:
        """What a thread of its own makes of it. One that takes too long is left to end by its
        bounds, and keeps its place until then."""
        too_long = InvalidRequest(field, f"takes more than {self._deadline_s:g} s to compile")
        if not self._working.acquire(timeout=self._deadline_s):
            raise too_long
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # a panic of a native library is not an Exception
                future.set_exception(error)
            finally:
                self._working.release()

        thread = Thread(target=run, name="duetto-grammar", daemon=True)
        with _STACK_SIZE:
            usual = stack_size(STACK_BYTES)
            try:
                thread.start()
            except RuntimeError:  # there is no room for another one
                self._working.release()
                raise
            finally:
                stack_size(usual)
        try:
            return future.result(self._deadline_s)
        except TimeoutError:
            raise too_long from None


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = min(vocabulary.eos_token_ids)
        self.bos_token_id = None
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special.values())

    def __call__(self, text: str | bytes) -> list[int]:
        """Asked where tokens are forced, which nothing here does."""
        raise TypeError(f"texts are not tokenized here: {text!r:.40}")


def _tokenizer(vocabulary: Vocabulary) -> "LLTokenizer":
    wrapper = _library().TokenizerWrapper(_Tokens(vocabulary))
    made: LLTokenizer = _library().LLTokenizer(
        wrapper, n_vocab=len(vocabulary.tokens), eos_token=sorted(vocabulary.eos_token_ids)
    )
    return made


def _limits() -> "LLParserLimits":
    made: LLParserLimits = _library().LLParserLimits(**LIMITS, verbose_errors=False)
    return made


def _library() -> Any:
    """Loaded when the first constraint comes."""
    return import_module("llguidance")
