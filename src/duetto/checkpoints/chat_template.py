"""A checkpoint's chat template: messages and tools to the text of a prompt.

Templates are programs that came with the weights, so each runs in a process of its own, within a
budget of time and memory (docs/design/chat-templates.md), in jinja2's immutable sandbox, and sees
plain data only. What it can do there is what transformers gives it. Clients bring data, never
templates. Knows no tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import dropwhile, zip_longest
from pathlib import Path
from typing import Any

import msgspec

from duetto.checkpoints.chat_messages import plain_messages
from duetto.checkpoints.chat_tools import TOOLS, plain_tools
from duetto.checkpoints.continued_message import FIELD as CONTINUE
from duetto.checkpoints.continued_message import ContinuedMessage
from duetto.checkpoints.template_answer import NO_TOOLS, AnswerKind
from duetto.checkpoints.template_arguments import TemplateArguments
from duetto.checkpoints.template_forms import TemplateForms
from duetto.checkpoints.template_process import BudgetBroken, TemplateProcesses
from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.core.text import ChatTemplateFacts

MAX_CHARACTERS = 16 * 2**20  # of a rendered prompt
_MAX_SOURCE_CHARACTERS = 2**20
_TRIED_ROLES = ("user", "system", "developer", "assistant", "tool")
_PLAIN = ({"role": "user", "content": "Hello"},)


class ChatTemplate:
    """A template that compiles, and what it takes."""

    def __init__(
        self,
        source: str,
        file: Path,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
        for_tools: "ChatTemplate | None" = None,
    ) -> None:
        """`special_tokens` are what the template knows as `bos_token` and the like; `for_tools` is
        another template, which is taken for chats with tools.

        Raises CheckpointError, naming `file`, if the template is no Jinja.
        """
        if len(source) > _MAX_SOURCE_CHARACTERS:
            raise CheckpointError(
                file, f"the chat template is longer than {_MAX_SOURCE_CHARACTERS} characters"
            )
        self._now = now
        self._source, self._for_tools = source, for_tools
        self._special_tokens = dict(special_tokens or {})
        try:
            self._processes = TemplateProcesses(source)
            msgspec.json.encode(self._special_tokens)
        except UnicodeEncodeError:
            raise CheckpointError(file, "the chat template holds half a surrogate pair") from None
        self._broken: str | None = None  # why it cannot even be loaded
        self._no_tools = NO_TOOLS["none"]
        self._shows_tools = False
        self._forms = TemplateForms()
        self._generation_prompt: str | None = None
        self.note: str | None = None  # for people: what chats lack, or why there are none
        facts = self._load(file)
        self._reads = frozenset[str](facts["reads"] if facts else ())
        self._extra = TemplateArguments(self._reads, self._special_tokens)
        if facts is not None:
            self._try_out(facts)

    def _load(self, file: Path) -> dict[str, Any] | None:
        """What the template's source tells; None for one that is broken."""
        try:
            kind, data = self._processes.load()
        except (BudgetBroken, OSError) as error:
            self._broken = self.note = f"the chat template {error} when it is compiled"
            return None
        if kind == AnswerKind.FACTS:
            facts: dict[str, Any] = json.loads(data)
            return facts
        why = f"the chat template does not compile: {data.decode()}"
        if kind == AnswerKind.NO_JINJA:
            raise CheckpointError(file, why)
        self._broken = self.note = why
        return None

    def facts(self, *, with_tools: bool = False) -> ChatTemplateFacts:
        """Of the template that renders chats with tools, or without."""
        if with_tools and self._for_tools is not None:
            return self._for_tools.facts(with_tools=True)
        return ChatTemplateFacts(
            source=self._source,
            reads=frozenset({*self._extra.accepted, *({TOOLS} if self._shows_tools else ())}),
            shows_calls=self._forms.shows_calls,
            shows_reasoning=bool(self._forms.reasoning_keys),
            generation_prompt=self._generation_prompt,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. A message's content is a string or a list of text parts, and becomes what
        the template takes: parts are joined by lines where it takes strings. `tools` are in
        transformers' form, and calls in OpenAI's.

        `template_kwargs` may set what the template itself reads (`enable_thinking`, ...). With
        `continue_final_message` the prompt ends within the last message.
        Waits for another process: never to be called on an event loop.

        Raises InvalidRequest: "messages" or a place in them if they are malformed, the template
        refuses them or breaks its budget, "tools" likewise, or if it reads none,
        "chat_template_kwargs" for an argument that the template does not read, "documents" if it
        reads none, or both name them, "continue_final_message" for a message that cannot be.
        """
        if tools and self._for_tools is not None:
            return self._for_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=template_kwargs,
                documents=documents,
                tools=tools,
                continue_final_message=continue_final_message,
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                CONTINUE, "with add_generation_prompt: an answer either goes on or begins; give one"
            )
        plain = plain_messages(messages)
        continued = ContinuedMessage(plain) if continue_final_message else None
        arguments = {
            **self._arguments(add_generation_prompt),
            "messages": self._shown(plain if continued is None else continued.marked(plain)),
            **self._extra.checked(template_kwargs or {}),
            **self._extra.documents(documents, template_kwargs or {}),
        }
        if self._broken is not None:
            raise InvalidRequest("messages", self._broken)
        if tools:
            arguments[TOOLS] = self._given_tools(tools)
        prompt = self._prompt(arguments, template_kwargs or {}, has_tools=bool(tools))
        return prompt if continued is None else continued.cut(prompt)

    def _prompt(
        self, arguments: dict[str, Any], given: Mapping[str, Any], *, has_tools: bool
    ) -> str:
        try:
            kind, data = self._processes.ask(self._request("render", arguments))
        except BudgetBroken as error:
            raise InvalidRequest("messages", f"the chat template {error}") from error
        except UnicodeEncodeError as error:
            raise InvalidRequest("messages", "hold half a surrogate pair") from error
        if kind == AnswerKind.TEXT:
            return data.decode()
        field = TOOLS if has_tools and self._renders_without(arguments) else "messages"
        raise InvalidRequest(field, self._why(kind, data.decode(), given, has_tools=has_tools))

    def _renders_without(self, arguments: Mapping[str, Any]) -> bool:
        """Whether tools are all that the template fails on."""
        others = {name: value for name, value in arguments.items() if name != TOOLS}
        try:
            kind, _ = self._processes.ask(self._request("render", others | self._no_tools))
        except BudgetBroken:
            return False
        return kind == AnswerKind.TEXT

    def _request(self, op: str, arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "op": op,
            "arguments": arguments,
            "now": self._now().isoformat(),
            "max_characters": MAX_CHARACTERS,
            **more,
        }

    def _arguments(self, add_generation_prompt: bool) -> dict[str, Any]:
        ours = {"add_generation_prompt": add_generation_prompt}
        return self._special_tokens | {"documents": None} | self._no_tools | ours

    def _shown(self, plain: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._forms.shown(f"messages[{i}]", each) for i, each in enumerate(plain)]

    # --- what is found out at the start ------------------------------------------------------

    def _try_out(self, facts: Mapping[str, Any]) -> None:
        """Find what conversations and tools are to be, and whether one plain message is rendered.

        What trying does not tell, the source has to."""
        self._shows_tools = TOOLS in self._reads
        self._forms = TemplateForms.of(facts, {}, None)
        try:
            request = self._request("try", self._arguments(True), roles=_TRIED_ROLES)
            tried = json.loads(self._processes.ask(request)[1])
            self._no_tools = NO_TOOLS[tried["no_tools"]]
            self._forms = TemplateForms.of(facts, tried["takes"], None)
            kind, data = self._try_plain(add_generation_prompt=True)
            if kind == AnswerKind.TEXT:
                _, without = self._try_plain(add_generation_prompt=False)
                self._generation_prompt = _added(data.decode(), without.decode())
        except BudgetBroken as error:
            self.note = f"on one user message, the chat template {error}"
            return
        if kind not in (AnswerKind.TEXT, AnswerKind.REFUSED):
            why = self._why(kind, data.decode(), {}, has_tools=False)
            self.note = f"on one user message, {why}"
        self._try_tools(facts, tried)

    def _try_plain(self, *, add_generation_prompt: bool) -> tuple[AnswerKind, bytes]:
        arguments = self._arguments(add_generation_prompt)
        arguments["messages"] = self._shown(plain_messages(_PLAIN))
        return self._processes.ask(self._request("render", arguments))

    def _try_tools(self, facts: Mapping[str, Any], tried: Mapping[str, Any]) -> None:
        takes = tried["takes"]
        user, no_tools = takes["user"] or facts["takes"], tried["no_tools"]
        request = self._request("try_tools", self._arguments(True), user=user, no_tools=no_tools)
        try:
            found = json.loads(self._processes.ask(request)[1])
        except BudgetBroken:
            return  # a chat that does the same will hear of it
        self._forms = TemplateForms.of(facts, takes, found["calls"])
        if found["shows_tools"] is not None:
            self._shows_tools = found["shows_tools"]

    # --- what a chat gives ---------------------------------------------------------------------

    def _given_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        plain = plain_tools(tools)
        if not self._shows_tools:
            raise InvalidRequest(
                TOOLS,
                "this model's chat template shows none; leave them out, or serve the model with "
                "--chat-template and one that does",
            )
        return plain

    def _why(
        self, kind: AnswerKind, text: str, given: Mapping[str, Any], *, has_tools: bool
    ) -> str:
        """Why there is no prompt."""
        match kind:
            case AnswerKind.REFUSED:
                return text or "the chat template refuses them"
            case AnswerKind.TOO_LONG:
                return f"they become more than {MAX_CHARACTERS} characters"
            case AnswerKind.SURROGATE:
                return "hold half a surrogate pair"
        lacks = [name for name in self._extra.accepted if name not in given]
        if TOOLS in self._reads and not has_tools:
            text += " (no tools are given to it)"
        hint = f"; chat_template_kwargs can give it {', '.join(lacks)}" if lacks else ""
        return f"the chat template fails: {text}{hint}"


def _added(text: str, shorter: str) -> str:
    """What `text` has where it is no longer the other."""
    return "".join(
        [
            a
            for a, _ in dropwhile(
                lambda pair: pair[0] == pair[1], zip_longest(text, shorter, fillvalue="")
            )
        ]
    )
