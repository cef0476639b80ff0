"""A checkpoint's chat template: messages to the text of a prompt.

Templates are programs that came with the weights, so they run in jinja2's immutable sandbox, see
plain data only, and are compiled once, at start-up. What they can do there is what transformers
gives them. Clients bring data, never templates. Knows no tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.models.json_file import JsonSection

MAX_CHARACTERS = 16 * 2**20  # of a rendered prompt
_MAX_DEPTH = 16  # of the data that a client hands to a template

# What is passed to every template; a client's extra arguments can be none of these.
_OURS = frozenset(
    ("messages", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize")
)


class ChatTemplate:
    """A compiled template."""

    def __init__(
        self,
        source: str,
        file: Path,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are what the template knows as `bos_token` and the like.

        Raises CheckpointError, naming `file`, if the template does not compile, or fails on one
        user message other than by refusing it in its own words.
        """
        environment = _environment(now)
        self._special_tokens = dict(special_tokens or {})
        try:
            parsed = environment.parse(source)
            self._template = environment.from_string(parsed)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(
                file, f"the chat template does not compile: {_line(error)}"
            ) from error
        self._arguments = meta.find_undeclared_variables(parsed) - {
            *_OURS,
            *environment.globals,
            *self._special_tokens,
        }
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except InvalidRequest as error:
            if not isinstance(error.__cause__, _Refusal):
                raise CheckpointError(file, f"on one user message, {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. A message's content is a string, or text parts, which lines join.

        `template_kwargs` may set what the template itself reads (`enable_thinking`, ...).

        Raises InvalidRequest: "messages" if they are malformed or the template refuses them,
        "chat_template_kwargs" for an argument that the template does not read.
        """
        arguments = self._special_tokens | {
            "messages": _plain_messages(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        for name, value in self._checked(template_kwargs or {}).items():
            arguments[name] = value
        pieces, size = [], 0
        try:
            for piece in self._template.generate(arguments):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise _Refusal(f"they become more than {MAX_CHARACTERS} characters")
            text = "".join(pieces)
            text.encode()  # half a surrogate pair is not text
        except _Refusal as error:
            raise InvalidRequest("messages", str(error)) from error
        except UnicodeEncodeError as error:
            raise InvalidRequest("messages", "hold half a surrogate pair") from error
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise InvalidRequest("messages", f"the chat template fails: {_line(error)}") from error
        return text

    def _checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        field = "chat_template_kwargs"
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(field, f"must be an object, not {arguments!r:.80}")
        for name in arguments:
            if name not in self._arguments:
                accepted = ", ".join(sorted(self._arguments)) or "none"
                raise InvalidRequest(
                    field,
                    f"{name!r:.80} is not read by this model's template; accepted: {accepted}",
                )
        return {name: _plain(field, value) for name, value in arguments.items()}


def load_chat_template(
    model_dir: Path, tokenizer_config: JsonSection | None, special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None if there is none.

    Raises CheckpointError for a template that cannot serve; see ChatTemplate.
    """
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), file, special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(file, f"cannot be read: {error}") from error
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


class _Refusal(TemplateError):
    """The template refuses the messages in its own words."""


class _Generation(Extension):
    """`{% generation %}` marks what the model writes, for training; here it is a plain block."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment(now: Callable[[], datetime]) -> Environment:
    def raise_exception(message: str) -> NoReturn:
        raise _Refusal(message)

    def tojson(  # jinja2's own escapes for HTML
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


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
        plain.append({**_plain(field, message), "content": content})
    return plain


def _text_of(field: str, content: Any) -> str:
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence):
        raise InvalidRequest(
            field, f"must be a string or a list of text parts, not {content!r:.80}"
        )
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise InvalidRequest(field, 'only parts {"type": "text", "text": ...} are accepted')
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(field, "the text of a part must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain(field: str, value: Any, depth: int = 0) -> Any:
    """A copy in JSON's own types: the sandbox guards those, not the methods of other objects."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(field, f"is nested more than {_MAX_DEPTH} deep")
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(field, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(field, item, depth + 1) for item in value]
    raise InvalidRequest(field, f"must be what JSON can say, not {type(value).__name__}")


def _line(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"line {line}: {text:.300}" if line else f"{text:.300}"
