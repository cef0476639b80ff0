"""Where a checkpoint has its chat templates, and which of several is for what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duetto.checkpoints.chat_template import ChatTemplate
from duetto.checkpoints.checkpoint_file import is_there, read_text_part
from duetto.checkpoints.json_file import JsonSection

TEMPLATE_FILE = "chat_template.jinja"
TOOL_USE_FILE = "additional_chat_templates/tool_use.jinja"
_KEY, _DEFAULT, _TOOL_USE = "chat_template", "default", "tool_use"


def load_chat_template(
    model_dir: Path,
    tokenizer_config: JsonSection | None,
    special_tokens: Mapping[str, str],
    instead: Path | None = None,
) -> ChatTemplate | None:
    """The template of a file that is given `instead`; of chat_template.jinja; of
    tokenizer_config.json; None if there is none. Of named ones, tool_use is for chats with tools.

    Raises CheckpointError for a template that cannot be read; see ChatTemplate.
    """
    if instead is not None:
        return ChatTemplate(read_text_part(instead), instead, special_tokens)
    file = model_dir / TEMPLATE_FILE
    if is_there(file):
        beside = model_dir / TOOL_USE_FILE
        for_tools = None
        if is_there(beside):
            for_tools = ChatTemplate(read_text_part(beside), beside, special_tokens)
        return ChatTemplate(read_text_part(file), file, special_tokens, for_tools=for_tools)
    if tokenizer_config is None or tokenizer_config.get(_KEY) is None:
        return None
    named = _named(tokenizer_config)
    file, for_tools = tokenizer_config.file, None
    if _TOOL_USE in named:
        for_tools = ChatTemplate(named[_TOOL_USE], file, special_tokens)
    if list(named) == [_TOOL_USE]:
        return for_tools
    return ChatTemplate(named[_DEFAULT], file, special_tokens, for_tools=for_tools)


def _named(config: JsonSection) -> dict[str, str]:
    """The templates by their names; one alone is "default", whatever its name, or "tool_use"."""
    given = config.get(_KEY)
    if not isinstance(given, list):
        given = [{"name": _DEFAULT, "template": given}]
    try:
        named: dict[Any, Any] = {each["name"]: each["template"] for each in given}
    except (TypeError, KeyError):
        config.refuse(_KEY, "each of a list must have a name and a template")
    if len(named) == 1 and _TOOL_USE not in named:
        named = {_DEFAULT: next(iter(named.values()))}
    if len(named) != 1 and _DEFAULT not in named:
        config.refuse(_KEY, f'none of {", ".join(map(str, named))} is named "{_DEFAULT}"')
    for name in (_DEFAULT, _TOOL_USE):
        if name in named and not isinstance(named[name], str):
            config.refuse(_KEY, "must be a string or a list of named templates")
    return named
