"""From token ids to the request of an embedding, complete and checked: the way of both doors."""

from collections.abc import Sequence

from duetto.core.config import ONLY_GENERATES, SchedulerConfig
from duetto.core.embeddings import EmbeddingModel, PoolingParams
from duetto.core.errors import InvalidRequest
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.engine.intake import check_prompt

_UNUSED = SamplingParams(max_tokens=1)  # nothing is sampled


def make_embedding_request(
    token_ids: Sequence[int],
    params: PoolingParams,
    *,
    model: EmbeddingModel | None,
    codec: TextCodec,
    config: SchedulerConfig,
    request_id: str,
    arrival_time: float,
    priority: int = 0,
    cache_salt: bytes = b"",
    tenant: bytes = b"",
) -> Request:
    """Raises InvalidRequest, naming the field ("prompt" for the ids): of a model that gives no
    embeddings (None), of a size that it does not have, and as `make_request` does."""
    if model is None:
        raise InvalidRequest("model", ONLY_GENERATES)
    model.check(params)
    check_prompt(token_ids, codec.vocab_size)
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(token_ids),
        sampling=_UNUSED,
        max_tokens=1,
        seed=0,
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        tenant=tenant,
        pooling=params,
    )
    config.check_fits(request)
    return request
