"""The internal form of a request that samples: what every API's body becomes. Knows no HTTP.

A parser of an API makes one of these, or refuses its body by the names of its own fields; the door
makes prompts and requests of it, and knows no API.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duetto.core.sampling_params import SamplingParams
from duetto.engine.infill import ExtraFile
from duetto.engine.tool_rules import ToolRules
from duetto.server.apis.prompts import GivenPrompt

USUAL_EFFORT = "medium"  # of reasoning, in OpenAI's APIs


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of sampling and of the reply, beside the prompt."""

    sampling: SamplingParams
    default_max_tokens: int | None = None  # where the caller says nothing; None: all the room
    stream: bool = False
    cache_salt: str | None = None
    priority: int = 0
    reuse: bool | str | dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None  # keep the last so many; -1: as many as fit
    scored_by: str | None = None  # the caller's field that asks for the prompt's log-probabilities
    is_scored_by_choice: bool = False  # each choice shows them, or they stand once in the reply
    names: Mapping[str, str] = field(default_factory=dict)  # our fields' to the caller's


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, as the chat template is given it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    usual_effort: str = USUAL_EFFORT  # what leaving it out means, so it asks for nothing
    wants_reasoning: bool = False  # it is turned on, as the template calls it
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedChat:
    asked: Asked
    prompt: ChatPrompt
    body: Any = None  # as it was read: what the translator repeats of it
    tools: ToolRules | None = None  # None: calls are neither made nor looked for
    reads_reasoning: bool = True  # it is told apart from content


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMiddle:
    """Each prompt is what stands before a hole, and the answer what fills it."""

    suffix: str  # what stands behind it
    files: Sequence[ExtraFile] = ()
    field: str = "suffix"  # what asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPrompts:
    """Texts, ids or segments, each to be answered."""

    asked: Asked
    prompts: Sequence[GivenPrompt]
    body: Any = None  # as it was read: what the translator repeats of it
    add_special_tokens: bool = True
    echo: bool = False  # each answer begins with its prompt ...
    middle: AskedMiddle | None = None
    echo_tokens: bool = False  # ... and shows where each of its tokens begins
