"""OpenAI's embeddings: the body that clients send, what it asks, and the reply. Knows no engine.

What is not OpenAI's is vLLM's, and `prompt_name` is that of Text Embeddings Inference.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Raw, Struct

from duetto.core.embeddings import PoolingParams
from duetto.core.errors import InvalidRequest
from duetto.engine.offline_embedding import numbers_of
from duetto.server.apis.accepted import ABSENT, Only
from duetto.server.apis.protocol import Label
from duetto.server.http.errors import invalid, refused
from duetto.server.http.json_parts import Json, JsonRows

MAX_INPUTS = 2048  # OpenAI's
MAX_NUMBER_CHARS = 16  # with its comma
NAMES = {"prompt": "input"}  # our fields' to the caller's

Encoding = Literal["float", "base64"]
EmbeddingInput = str | list[int]


class EmbeddingRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Encoding | None = None
    dimensions: int | None = None
    prompt_name: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: Label = None
    request_id: Label = None
    metadata: Raw = ABSENT
    # What others have, at rest.
    normalize: Annotated[Raw, Only(True)] = ABSENT
    use_activation: Annotated[Raw, Only(True)] = ABSENT
    embed_dtype: Annotated[Raw, Only("float32")] = ABSENT
    endianness: Annotated[Raw, Only("native", "little")] = ABSENT
    truncation_side: Annotated[Raw, Only("left")] = ABSENT
    input_type: Annotated[Raw, Only()] = ABSENT
    prompt: Annotated[Raw, Only("")] = ABSENT
    messages: Annotated[Raw, Only([])] = ABSENT
    stream: Annotated[Raw, Only(False)] = ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEmbeddings:
    inputs: Sequence[EmbeddingInput]
    is_single: bool  # it was not given as a list
    params: PoolingParams
    encoding: Encoding = "float"
    prompt_name: str | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep the last so many; -1: as many as fit
    priority: int = 0
    cache_salt: str | None = None

    def names(self, index: int) -> dict[str, str]:
        """Our fields' names to the caller's, of one of the inputs."""
        return NAMES if self.is_single else {"prompt": f"input[{index}]"}


def read_embeddings(wire: EmbeddingRequest) -> AskedEmbeddings:
    """Raises ApiError 400, naming the field."""
    if (kept := wire.truncate_prompt_tokens) is not None and kept < 1 and kept != -1:
        raise invalid("truncate_prompt_tokens", "must be 1 or more, or -1 for what fits")
    inputs = split_inputs(wire.input)
    try:
        params = PoolingParams(dimensions=wire.dimensions)
    except InvalidRequest as error:
        raise refused(error, {}) from None
    return AskedEmbeddings(
        inputs=inputs,
        is_single=isinstance(wire.input, str) or isinstance(wire.input[0], int),
        params=params,
        encoding=wire.encoding_format or "float",
        prompt_name=wire.prompt_name,
        add_special_tokens=wire.add_special_tokens is not False,
        truncate_prompt_tokens=kept,
        priority=wire.priority or 0,
        cache_salt=wire.cache_salt,
    )


def split_inputs(given: str | list[str | int | list[int]]) -> list[EmbeddingInput]:
    """The field's shapes as a list of texts and ids. Raises ApiError 400 for none, for a mixture,
    and for more than there may be."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("input", "must hold at least one text or token id")
    token_ids = [item for item in given if isinstance(item, int)]
    if len(token_ids) == len(given):
        return [token_ids]
    if len(given) > MAX_INPUTS:
        raise invalid("input", f"{len(given)} inputs; at most {MAX_INPUTS} in a request")
    texts = [item for item in given if isinstance(item, str)]
    id_lists = [item for item in given if isinstance(item, list)]
    if len(texts) == len(given):
        return [*texts]
    if len(id_lists) == len(given):
        return [*id_lists]
    raise invalid("input", "must be a text, texts, token ids or lists of token ids, not a mixture")


def reply_bytes(num_inputs: int, size: int, encoding: Encoding) -> int:
    """What a reply could take."""
    each = MAX_NUMBER_CHARS * size if encoding == "float" else 4 * size * 4 // 3
    return num_inputs * (each + 64)


def embeddings_body(
    name: str,
    created: int,
    model: str,
    embeddings: Sequence[bytes],
    encoding: Encoding,
    *,
    num_prompt: int,
    num_cached: int,
) -> Json:
    """The rows are made as they are written."""

    def rows(start: int, end: int) -> list[Json]:
        shown = [_shown(embedding, encoding) for embedding in embeddings[start:end]]
        return [
            {"object": "embedding", "index": start + index, "embedding": each}
            for index, each in enumerate(shown)
        ]

    return {
        "id": f"embd-{name}",
        "object": "list",
        "created": created,
        "model": model,
        "data": JsonRows(len(embeddings), rows),
        "usage": {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        },
    }


def _shown(embedding: bytes, encoding: Encoding) -> Raw | str:
    """Nine digits say which fp32 number it is; as doubles they would be twice as long."""
    if encoding == "base64":
        return b64encode(embedding).decode()
    return Raw(b"[" + b",".join([b"%.9g" % number for number in numbers_of(embedding)]) + b"]")
