"""From a token's hidden state to an embedding. Knows no models."""

import numpy as np

from duetto.backends.backend import FloatArray
from duetto.core.batch import RequestResult
from duetto.core.embeddings import PoolingParams


def pooled(params: PoolingParams, hidden: FloatArray) -> RequestResult:
    """The first numbers of a hidden state, at length 1. What cannot have that is an error.

    In double until the end, each sum in one order: the bits depend on nothing but the state's.
    """
    numbers = hidden[: params.dimensions].astype(np.float64)
    length = np.sqrt(np.square(numbers).sum())
    if not np.isfinite(length):
        return RequestResult(error="the model's hidden state for this text is not finite")
    if not length:
        return RequestResult(error="the model's hidden state for this text is zero")
    return RequestResult(embedding=(numbers / length).astype("<f4").tobytes())
