"""One embedding of `LLM`: its request, and what comes of it. Result shapes are vLLM's."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from sys import byteorder
from time import monotonic

from duetto.core.batch import RequestUpdate
from duetto.core.config import SchedulerConfig
from duetto.core.embeddings import EmbeddingModel, PoolingParams
from duetto.core.errors import InvalidRequest
from duetto.core.outputs import EmbeddingOutput, EmbeddingRequestOutput
from duetto.core.request import Request
from duetto.core.text import TextCodec
from duetto.engine.embedding_intake import make_embedding_request
from duetto.engine.prompts import Prompt, read_prompt


@dataclass(slots=True)
class OfflineEmbedding:
    output: EmbeddingRequestOutput
    requests: list[Request]  # one
    has_grown: bool = False

    @staticmethod
    def of(request: Request) -> "OfflineEmbedding":
        output = EmbeddingRequestOutput(
            request_id=request.request_id,
            outputs=EmbeddingOutput([]),
            prompt_token_ids=list(request.prompt_token_ids),
        )
        return OfflineEmbedding(output, [request])

    def arrive(self, now: float) -> None:
        """Latency counts from here."""
        self.requests = [replace(request, arrival_time=now) for request in self.requests]

    def take(self, update: RequestUpdate) -> None:
        self.has_grown = True
        if update.finish_reason is None:
            return
        self.output.finished = True
        self.output.num_cached_tokens = update.num_cached_tokens
        self.output.timings = update.timings
        if update.embedding:
            self.output.outputs.embedding = numbers_of(update.embedding).tolist()
        else:
            self.output.error = update.error or update.finish_reason.value


def offline_embedding(
    number: int,
    prompt: Prompt,
    params: PoolingParams,
    model: EmbeddingModel | None,
    prompt_name: str | None,
    codec: TextCodec,
    config: SchedulerConfig,
) -> OfflineEmbedding:
    """Raises InvalidRequest for what is refused."""
    if isinstance(prompt, Mapping) and prompt.get("suffix"):
        raise InvalidRequest("suffix", "is for answers: an embedding is of a text without a hole")
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, Mapping) and prompt.keys() <= {"prompt", "cache_salt"}:
        text = prompt.get("prompt")
    if model is not None and isinstance(text, str):
        named = model.prompt(prompt_name) + text
        prompt = named if isinstance(prompt, str) else {**prompt, "prompt": named}
    read = read_prompt(prompt, codec)
    request = make_embedding_request(
        read.token_ids,
        params,
        model=model,
        codec=codec,
        config=config,
        request_id=f"embedding-{number}",
        arrival_time=monotonic(),
        cache_salt=read.cache_salt,
    )
    return OfflineEmbedding.of(request)


def numbers_of(embedding: bytes) -> "array[float]":
    """Those of a result, which are little-endian."""
    numbers = array("f", embedding)
    if byteorder == "big":
        numbers.byteswap()
    return numbers
