"""How a model speaks: what the text of its answers means, and the grammar of its calls.

Both doors, the server and LLM, ask here. Knows no HTTP, no tokens and no library of grammars.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from duetto.core.errors import InvalidRequest
from duetto.core.sampling_params import SamplingParams
from duetto.core.structured import (
    FIELD,
    Grammar,
    ReasoningBudget,
    StructuredOutputsParams,
)
from duetto.dialects.answer import answer_parser, markers_of
from duetto.dialects.choose import Dialects
from duetto.dialects.dialect import CallDialect
from duetto.dialects.pieces import AnswerParser
from duetto.dialects.reasoning import HARMONY_REASONING
from duetto.engine.tool_rules import ToolRules
from duetto.grammars.calls import CallableTool, calls_alone, calls_among_text
from duetto.grammars.compile import CompiledGrammars
from duetto.grammars.constraints import json_options
from duetto.grammars.json_schema import ImpossibleSchema, prepared_schema
from duetto.grammars.lark import LarkWriter
from duetto.grammars.tags import ReasoningMarks, json_content, reasoning_first

logger = logging.getLogger(__name__)

NO_DIALECTS = Dialects(None, None)
JSON_FIELD = "structured_outputs.json"


class AnswerReading(NamedTuple):
    """How one prompt's answers are read."""

    make_parser: Callable[[], AnswerParser]  # one for each answer
    needs_special: bool  # markers may be special tokens: text must show them


class ChatPlan(NamedTuple):
    """How one chat is answered, and its answers read."""

    sampling: SamplingParams
    grammar: Grammar | None = None  # None: what `sampling` asks for, if anything
    make_parser: Callable[[], AnswerParser] | None = None  # of each answer; None: it is content


@dataclass(frozen=True, slots=True)
class Speech:
    dialects: Dialects = NO_DIALECTS
    special_tokens: frozenset[str] = frozenset()  # as text
    grammars: CompiledGrammars | None = None

    def plan(
        self,
        rules: ToolRules | None,
        prompt: str,
        sampling: SamplingParams,
        *,
        reads_reasoning: bool = True,
        tenant: bytes = b"",
    ) -> ChatPlan:
        """`prompt` is the text that the template made. Raises InvalidRequest, naming the field."""
        output, budget = sampling.structured_outputs, sampling.thinking_budget
        if rules is None and output is not None:
            reads_reasoning = reads_reasoning and self._has_room_to_reason(output, prompt)
        if budget is not None:
            self._check_budget(reads_reasoning=reads_reasoning)
            sampling = replace(sampling, thinking_budget=None)
        keeps_special = not sampling.skip_special_tokens
        reading = self._reading(
            rules, prompt, reads_reasoning=reads_reasoning, keeps_special=keeps_special
        )
        if reading is None:
            return ChatPlan(sampling)
        grammar = None
        if rules is None:
            if output is not None and reads_reasoning:
                grammar = self._grammar_of_output(output, prompt, tenant)
        elif rules.is_required or not sampling.ignore_eos:
            # Who measures speed with ignore_eos wants the tokens, whatever they say.
            grammar = self._grammar(rules, prompt, tenant, output)
        if budget is not None:
            grammar = self._within_budget(budget, grammar or output, prompt, tenant)
        if reading.needs_special:
            sampling = replace(sampling, skip_special_tokens=False)
        return ChatPlan(sampling, grammar, reading.make_parser)

    def _reading(
        self,
        rules: ToolRules | None,
        prompt: str,
        *,
        reads_reasoning: bool,
        keeps_special: bool,
    ) -> AnswerReading | None:
        """None: an answer is its text. By default special tokens that mean nothing to the dialect
        are dropped.

        Raises InvalidRequest("tools", ...) where nobody could tell calls from text.
        """
        calls, reasoning = self.dialects
        if rules is not None and calls is None:
            raise InvalidRequest(
                "tools", "how this model writes calls is not known: --tool-call-parser can name it"
            )
        if rules is None:
            calls = None
        if not reads_reasoning:
            reasoning = None
        if calls is None and reasoning is None:
            return None
        tools = [] if rules is None else rules.schemas
        is_open = reasoning is not None and reasoning.is_open(prompt)
        needs_special = self._are_special(calls, reasoning)
        is_dropping = needs_special and not keeps_special
        dropped = self.special_tokens if is_dropping else frozenset[str]()

        def make() -> AnswerParser:
            return answer_parser(calls, reasoning, tools, is_open=is_open, special_tokens=dropped)

        return AnswerReading(make, needs_special)

    def _check_budget(self, *, reads_reasoning: bool) -> None:
        """Raise InvalidRequest where nobody can close the reasoning."""
        calls, reasoning = self.dialects
        why = None
        if reasoning is None:
            why = "this model is not known to reason: --reasoning-parser can name its markers"
        elif reasoning is HARMONY_REASONING or (calls is not None and calls.reads_reasoning):
            why = "this model reasons in messages of its own, between others: none can be closed"
        elif not reads_reasoning:
            why = "the whole answer has a form here, so none of it is reasoning"
        elif self.grammars is None:
            why = "this engine has no grammars"
        if why is not None:
            raise InvalidRequest("thinking_budget", why)

    def _within_budget(
        self,
        num_tokens: int,
        form: Grammar | StructuredOutputsParams | None,
        prompt: str,
        tenant: bytes,
    ) -> Grammar | None:
        """The grammar of an answer of that form, if any, whose reasoning has so many tokens."""
        reasoning = self.dialects.reasoning
        assert reasoning is not None and self.grammars is not None
        if isinstance(form, StructuredOutputsParams):
            return None  # of all of the answer: there is no reasoning
        is_open = reasoning.is_open(prompt)
        marks = ReasoningMarks(reasoning.openings[0], reasoning.closings[0], is_open)
        if form is None:
            form = self.grammars.write(
                lambda lark: reasoning_first(lark, marks, lark.anything()),
                "thinking_budget",
                tenant,
            )
        return form._replace(budget=ReasoningBudget(num_tokens, *marks))

    def _has_room_to_reason(self, output: StructuredOutputsParams, prompt: str) -> bool:
        """False where the prompt has begun reasoning and yet the constraint is of all that comes:
        then that is no reasoning."""
        reasoning = self.dialects.reasoning
        return reasoning is None or not reasoning.is_open(prompt) or _is_json(output)

    def _grammar_of_output(
        self, output: StructuredOutputsParams, prompt: str, tenant: bytes
    ) -> Grammar | None:
        """JSON behind the reasoning that the prompt has begun. None where it begins none, and
        where the constraint is of the whole answer, its reasoning too.

        Raises InvalidRequest for a schema that is not supported.
        """
        reasoning = self.dialects.reasoning
        if self.grammars is None or reasoning is None or not reasoning.is_open(prompt):
            return None
        if not _is_json(output):
            return None
        self.grammars.make(output, tenant)
        field = f"{FIELD}.{output.kind}"
        schema = prepared_schema(_schema_of(output), field, json_options(output))
        marks = ReasoningMarks(reasoning.openings[0], reasoning.closings[0], has_begun=True)

        def start(lark: LarkWriter) -> str:
            return reasoning_first(lark, marks, lark.schema(schema))

        return self.grammars.write(start, field, tenant)

    def _grammar(
        self,
        rules: ToolRules,
        prompt: str,
        tenant: bytes,
        output: StructuredOutputsParams | None,
    ) -> Grammar | None:
        """What holds an answer to calls that can be made, or else to `output`. None where it may
        be any text.

        Raises InvalidRequest, naming the tool, for a schema that is not supported, if calls must
        follow it: of others any arguments are accepted.
        """
        calls, reasoning = self.dialects
        if calls is None or self.grammars is None:
            if rules.is_required:
                raise InvalidRequest("tool_choice", "calls cannot be required of this engine")
            return None
        if output is None and calls.begins_line and not rules.is_required:
            return None  # only where a line begins is it a call
        if output is not None and _is_json(output):
            self.grammars.make(output, tenant)  # what is wrong with it alone is told in its name
        schema = None if output is None else _schema_of(output)
        marks = None
        if reasoning is not None and not calls.reads_reasoning:
            is_open = reasoning.is_open(prompt)
            marks = ReasoningMarks(reasoning.openings[0], reasoning.closings[0], is_open)

        def start(tools: Sequence[CallableTool], lark: LarkWriter) -> str:
            expression = self._expression(lark, calls, rules, tools, schema)
            return expression if marks is None else reasoning_first(lark, marks, expression)

        if calls.form.arguments is None:  # then the whole has all that each schema says
            every = [CallableTool(tool.name, tool.parameters) for tool in rules.schemas]
            with suppress(InvalidRequest):  # which of them it is, and what is wrong with it:
                return self.grammars.write(partial(start, every), "tools", tenant)
        tools = self._supported(rules, tenant)
        try:
            return self.grammars.write(partial(start, tools), "tools", tenant)
        except InvalidRequest as error:
            if rules.is_required or rules.strict or schema is not None:
                raise
            logger.info("calls are not held to their tools' schemas: %s", error.message)
            return None

    def _expression(
        self,
        lark: LarkWriter,
        calls: CallDialect,
        rules: ToolRules,
        tools: Sequence[CallableTool],
        schema: str | None,
    ) -> str:
        """Calls alone; or either calls or JSON by a schema; or calls among any text."""
        form, parallel = calls.form, rules.parallel
        if rules.is_required:
            return calls_alone(lark, form, tools, parallel=parallel)
        if schema is not None:
            alone = lark.rule(calls_alone(lark, form, tools, parallel=parallel))
            return lark.one_of([alone, json_content(lark, json.loads(schema), JSON_FIELD)])
        # From its marker on a call is held to the form: what models put behind it varies.
        triggers = [m for m in calls.markers if form.trigger.startswith(m)][:1]
        return calls_among_text(lark, form, tools, triggers, parallel=parallel)

    def _supported(self, rules: ToolRules, tenant: bytes) -> list[CallableTool]:
        assert self.grammars is not None
        tools = []
        names = [tool["function"]["name"] for tool in rules.tools]
        for tool in rules.schemas:
            text = json.dumps({"type": "object", **tool.parameters}, ensure_ascii=False)
            parameters = tool.parameters
            try:
                self.grammars.make(StructuredOutputsParams(json=text), tenant)
            except InvalidRequest as error:
                is_held = rules.is_required or tool.name in rules.strict
                if is_held or isinstance(error, ImpossibleSchema):
                    place = f"tools[{names.index(tool.name)}].function.parameters"
                    raise InvalidRequest(place, error.message) from None
                logger.info("a tool's schema is not enforced: %s", error.message)
                parameters = {}
            tools.append(CallableTool(tool.name, parameters))
        return tools

    def _are_special(self, calls: object, reasoning: object) -> bool:
        markers: Iterable[str] = markers_of(calls, reasoning)  # type: ignore[arg-type]
        return any(token in marker for marker in markers for token in self.special_tokens)


def _is_json(output: StructuredOutputsParams) -> bool:
    return output.json is not None or bool(output.json_object)


def _schema_of(output: StructuredOutputsParams) -> str:
    """The text of a schema. Raises InvalidRequest for what is none."""
    if output.json_object:
        return '{"type": "object"}'
    if output.json is None:
        words = "with tools: only a JSON schema, or any JSON object, can stand beside calls"
        raise InvalidRequest("structured_outputs", words)
    return str(output.json)
