"""What an answer must look like: as a caller asks for it, and as it travels to the sampler.

Knows no grammar and no library: grammars/ makes a Grammar of a constraint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from duetto.core.errors import InvalidRequest

MAX_CHOICES = 4096
FIELD = "structured_outputs"
KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class ReasoningBudget(NamedTuple):
    """How many tokens of an answer may be reasoning, which stands at its beginning."""

    num_tokens: int
    opening: str  # its markers
    closing: str  # what follows once the tokens are used up
    has_begun: bool  # the prompt ends with `opening`


class Grammar(NamedTuple):
    """Which texts an answer may be, as llguidance reads it."""

    text: str
    key: str  # of the text and of whose it is: what is compiled is kept under it
    budget: ReasoningBudget | None = None  # beside the text, which has the same markers


class Vocabulary(NamedTuple):
    """The bytes that each token adds to a text. An id without bytes stands in no text."""

    tokens: Sequence[bytes]  # one for each row of the model
    special: Mapping[str, int]  # tokens that are no text, as the vocabulary spells them
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must be: exactly one of the first six. Names are vLLM's.

    Raises InvalidRequest, naming the field, for a value of the wrong type. Schemas and tags are
    kept as JSON text, in the order of their keys, which is the order of the answer's keys.
    """

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema, or its text
    json_object: bool | None = None  # any JSON object
    regex: str | None = None  # of the whole answer
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # in Lark's or in llama.cpp's notation
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False  # between the parts of JSON
    disable_additional_properties: bool = False  # unless the schema speaks of them
    whitespace_pattern: str | None = None  # a regex: what may stand between the parts of JSON
    disable_fallback: bool = False  # there is no other backend to fall back to

    def __post_init__(self) -> None:
        flags = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, f"must be true or false, not {getattr(self, name)!r:.80}")
        if self.json_object not in (None, True, False):
            raise _invalid("json_object", f"must be true or false, not {self.json_object!r:.80}")
        if self.json_object is False:  # as if it were not there
            object.__setattr__(self, "json_object", None)
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _invalid(name, f"must be a text that is not empty, not {value!r:.80}")
        self._freeze_choice()
        for name in ("json", "structural_tag"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _as_json(name, value))
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"there are {' and '.join(given)}" if given else "there is none"
            raise InvalidRequest(FIELD, f"needs one of {', '.join(KINDS)}; {found}")

    @property
    def kind(self) -> str:
        """Which of the six it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def _freeze_choice(self) -> None:
        choice = self.choice
        if choice is None:
            return
        if isinstance(choice, str) or not isinstance(choice, Sequence):
            raise _invalid("choice", f"must be a list of texts, not {choice!r:.80}")
        if not 1 <= len(choice) <= MAX_CHOICES:
            raise _invalid("choice", f"must hold 1 to {MAX_CHOICES} texts, not {len(choice)}")
        for each in choice:
            if not isinstance(each, str) or not each:
                raise _invalid("choice", f"must be texts that are not empty, not {each!r:.80}")
        object.__setattr__(self, "choice", tuple(choice))


class GrammarMaker(Protocol):
    """Constraints to grammars. Any thread may ask; it may take a second."""

    def make(self, asked: StructuredOutputsParams, tenant: bytes = b"") -> Grammar:
        """Raises InvalidRequest for what no answer can be, or what is not supported, with its
        place."""
        ...


def _as_json(name: str, value: object) -> str:
    """The text of a JSON value; a text is taken for JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping | bool):
        raise _invalid(name, f"must be an object or its JSON text, not {value!r:.80}")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(name, f"cannot be written as JSON: {error!s:.100}") from None


def _invalid(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{FIELD}.{name}", message)
