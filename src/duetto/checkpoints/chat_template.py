"""A checkpoint's chat template: messages to the text of a prompt.

Templates are programs that came with the weights, so each runs in a process of its own, within a
budget of time and memory (docs/design/chat-templates.md), in jinja2's immutable sandbox, and sees
plain data only. What it can do there is what transformers gives it. Clients bring data, never
templates. Knows no tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from duetto.checkpoints.checkpoint_file import is_there, read_text_part
from duetto.checkpoints.json_file import JsonSection
from duetto.checkpoints.template_answer import AnswerKind
from duetto.checkpoints.template_process import BudgetBroken, TemplateProcesses
from duetto.core.errors import CheckpointError, InvalidRequest

MAX_CHARACTERS = 16 * 2**20  # of a rendered prompt
_MAX_SOURCE_CHARACTERS = 2**20
_MAX_DEPTH = 16  # of the data that a client hands to a template
_MAX_VALUES = 200_000  # in it
_MAX_INTEGER = 2**63  # that the data may hold

# What is passed to every template; a client's extra arguments can be none of these.
_OURS = frozenset(("messages", "add_generation_prompt", "tools", "chat_template", "tokenize"))
# Names that clients leave out more often than not: None, as transformers has them.
_ABSENT = {"tools": None, "documents": None}
_TRIED_ROLES = ("user", "system", "developer", "assistant", "tool")


class ChatTemplate:
    """A template that compiles, and what it takes."""

    def __init__(
        self,
        source: str,
        file: Path,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are what the template knows as `bos_token` and the like.

        Raises CheckpointError, naming `file`, if the template is no Jinja.
        """
        if len(source) > _MAX_SOURCE_CHARACTERS:
            raise CheckpointError(
                file, f"the chat template is longer than {_MAX_SOURCE_CHARACTERS} characters"
            )
        self._now = now
        self._special_tokens = dict(special_tokens or {})
        try:
            self._processes = TemplateProcesses(source)
            msgspec.json.encode(self._special_tokens)
        except UnicodeEncodeError:
            raise CheckpointError(file, "the chat template holds half a surrogate pair") from None
        self._broken: str | None = None  # why it cannot even be loaded
        self._reads: frozenset[str] = frozenset()
        self._default_takes, self._takes = "string", dict[str, str | None]()
        self.note: str | None = None  # for people: what chats lack, or why there are none
        try:
            kind, data = self._processes.load()
        except (BudgetBroken, OSError) as error:
            self._broken = self.note = f"the chat template {error} when it is compiled"
            return
        if kind != AnswerKind.FACTS:
            why = f"the chat template does not compile: {data.decode()}"
            if kind == AnswerKind.NO_JINJA:
                raise CheckpointError(file, why)
            self._broken = self.note = why
            return
        facts = json.loads(data)
        self._reads, self._default_takes = frozenset(facts["reads"]), facts["takes"]
        self._try_out()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt. A message's content is a string or a list of text parts, and becomes what
        the template takes: parts are joined by lines where it takes strings.

        `template_kwargs` may set what the template itself reads (`enable_thinking`, ...).
        Waits for another process: never to be called on an event loop.

        Raises InvalidRequest: "messages" if they are malformed, the template refuses them or
        breaks its budget, "chat_template_kwargs" for an argument that the template does not read,
        "documents" if it reads none, or both name them.
        """
        arguments = {
            **self._arguments(add_generation_prompt),
            "messages": [self._as_taken(each) for each in _plain_messages(messages)],
            **self._checked(template_kwargs or {}),
            **self._given_documents(documents, template_kwargs or {}),
        }
        if self._broken is not None:
            raise InvalidRequest("messages", self._broken)
        try:
            kind, data = self._processes.ask(self._request("render", arguments))
        except BudgetBroken as error:
            raise InvalidRequest("messages", f"the chat template {error}") from error
        except UnicodeEncodeError as error:
            raise InvalidRequest("messages", "hold half a surrogate pair") from error
        if kind == AnswerKind.TEXT:
            return data.decode()
        raise InvalidRequest("messages", self._why(kind, data.decode(), template_kwargs or {}))

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
        return self._special_tokens | _ABSENT | ours

    def _try_out(self) -> None:
        """Find what each role's content is to be, and whether one plain message is rendered."""
        request = self._request("try", self._arguments(True), roles=_TRIED_ROLES)
        try:
            _, data = self._processes.ask(request)
            self._takes = json.loads(data)
            content = self._as_taken({"role": "user", "content": "Hello"})
            arguments = self._arguments(True) | {"messages": [content]}
            kind, data = self._processes.ask(self._request("render", arguments))
        except BudgetBroken as error:
            self.note = f"on one user message, the chat template {error}"
            return
        if kind not in (AnswerKind.TEXT, AnswerKind.REFUSED):
            why = self._why(kind, data.decode(), {})
            self.note = f"on one user message, {why}"

    def _as_taken(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content as the template takes that of its role."""
        content = message["content"]
        takes = self._takes.get(message["role"]) or self._default_takes
        if takes == "parts" and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif takes == "string" and not isinstance(content, str):
            content = "\n".join(part["text"] for part in content)  # as vLLM joins them
        return {**message, "content": content}

    def _checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        field = "chat_template_kwargs"
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(field, f"must be an object, not {arguments!r:.80}")
        accepted = self._accepted()
        for name in arguments:
            if name not in accepted:
                raise InvalidRequest(
                    field,
                    f"{name!r:.80} is not read by this model's template; "
                    f"accepted: {', '.join(accepted) or 'none'}",
                )
        return _Copy(field).of(arguments)

    def _given_documents(
        self, documents: Sequence[Mapping[str, Any]], others: Mapping[str, Any]
    ) -> dict[str, Any]:
        field = "documents"
        if not documents:
            return {}
        if field not in self._reads:
            raise InvalidRequest(
                field, "this model's chat template reads none; put them into messages, as parts"
            )
        if field in others:
            raise InvalidRequest(field, "are in chat_template_kwargs too; give them once")
        if isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
            raise InvalidRequest(field, f"must be a list of objects, not {documents!r:.60}")
        for index, document in enumerate(documents):
            if not isinstance(document, Mapping):
                raise InvalidRequest(
                    f"{field}[{index}]", f"must be an object, not {document!r:.60}"
                )
        return _Copy(field).of({field: documents})

    def _accepted(self) -> list[str]:
        """The arguments that a client may give, in order."""
        return sorted(self._reads - _OURS - self._special_tokens.keys())

    def _why(self, kind: AnswerKind, text: str, given: Mapping[str, Any]) -> str:
        """Why there is no prompt."""
        match kind:
            case AnswerKind.REFUSED:
                return text or "the chat template refuses them"
            case AnswerKind.TOO_LONG:
                return f"they become more than {MAX_CHARACTERS} characters"
            case AnswerKind.SURROGATE:
                return "hold half a surrogate pair"
        lacks = [name for name in self._accepted() if name not in given]
        if "tools" in self._reads:
            text += " (no tools are given to it)"
        hint = f"; chat_template_kwargs can give it {', '.join(lacks)}" if lacks else ""
        return f"the chat template fails: {text}{hint}"


def load_chat_template(
    model_dir: Path, tokenizer_config: JsonSection | None, special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None if there is none.

    Raises CheckpointError for a template that cannot be read; see ChatTemplate.
    """
    file = model_dir / "chat_template.jinja"
    if is_there(file):
        return ChatTemplate(read_text_part(file), file, special_tokens)
    if tokenizer_config is None or tokenizer_config.get("chat_template") is None:
        return None
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = _default(source, tokenizer_config)
    if not isinstance(source, str):
        tokenizer_config.refuse("chat_template", "must be a string or a list of named templates")
    return ChatTemplate(source, tokenizer_config.file, special_tokens)


def _default(templates: list[Any], config: JsonSection) -> Any:
    """Of several named templates the one called "default", or the only one."""
    try:
        named = {template["name"]: template["template"] for template in templates}
    except (TypeError, KeyError):
        config.refuse("chat_template", "each of a list must have a name and a template")
    if len(named) == 1:
        return next(iter(named.values()))
    if "default" not in named:
        config.refuse("chat_template", f'none of {", ".join(map(str, named))} is named "default"')
    return named["default"]


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages", "must be a list of messages")
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    plain = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                field, f"must be an object with role and content, not {message!r:.80}"
            )
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InvalidRequest(f"{field}.role", "must be a string")
        content = _text_of(f"{field}.content", message.get("content"))
        others = {key: value for key, value in message.items() if key != "content"}
        plain.append(_Copy(field).of(others) | {"content": content})
    return plain


def _text_of(field: str, content: Any) -> str | list[dict[str, str]]:
    """A string, or text parts with nothing else in them."""
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence):
        raise InvalidRequest(
            field, f"must be a string or a list of text parts, not {content!r:.80}"
        )
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise InvalidRequest(field, 'only parts {"type": "text", "text": ...} are accepted')
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(field, "the text of a part must be a string")
        parts.append({"type": "text", "text": str(part["text"])})
    return parts


class _Copy:
    """Copies data in JSON's own types: the sandbox guards those, not the methods of others."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._num_values = 0

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest for what JSON cannot say, and for more than is reasonable."""
        return {str(key): self._value(value, 1) for key, value in values.items()}

    def _value(self, value: Any, depth: int) -> Any:
        self._num_values += 1
        if depth > _MAX_DEPTH:
            self._refuse(f"is nested more than {_MAX_DEPTH} deep")
        if self._num_values > _MAX_VALUES:
            self._refuse(f"holds more than {_MAX_VALUES} values")
        if value is None or type(value) in (str, bool):
            return value
        if type(value) in (int, float):
            if not (abs(value) < _MAX_INTEGER if type(value) is int else isfinite(value)):
                self._refuse("holds a number that is too large, or none")
            return value
        if isinstance(value, Mapping):
            return {str(key): self._value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item, depth + 1) for item in value]
        return self._refuse(f"must be what JSON can say, not {type(value).__name__}")

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidRequest(self._field, why)
