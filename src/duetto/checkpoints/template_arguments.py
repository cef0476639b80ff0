"""What a chat may give a template beside messages and tools, checked against what it reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from duetto.checkpoints.plain_data import PlainData
from duetto.core.errors import InvalidRequest

# What is passed to every template; a client's extra arguments can be none of these.
_OURS = frozenset(("messages", "add_generation_prompt", "tools", "chat_template", "tokenize"))


class TemplateArguments:
    """The names that a template reads and that are a chat's to set."""

    def __init__(self, reads: frozenset[str], special_tokens: Mapping[str, str]) -> None:
        self._reads = reads
        self.accepted = sorted(reads - _OURS - special_tokens.keys())

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest for an argument that the template does not read."""
        field = "chat_template_kwargs"
        if not isinstance(arguments, Mapping):
            raise InvalidRequest(field, f"must be an object, not {arguments!r:.80}")
        for name in arguments:
            if name not in self.accepted:
                raise InvalidRequest(
                    field,
                    f"{name!r:.80} is not read by this model's template; "
                    f"accepted: {', '.join(self.accepted) or 'none'}",
                )
        return PlainData(field).of(arguments)

    def documents(
        self, documents: Sequence[Mapping[str, Any]], others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As an argument; none where there are none. Raises InvalidRequest if none are read, or
        `others` has them too."""
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
        return PlainData(field).of({field: documents})
