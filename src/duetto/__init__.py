"""Duetto: an LLM inference engine and server. Public names only; each loads when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duetto.core.embeddings import PoolingParams as PoolingParams
    from duetto.core.errors import CheckpointError as CheckpointError
    from duetto.core.errors import ConfigError as ConfigError
    from duetto.core.errors import DuettoError as DuettoError
    from duetto.core.errors import EngineError as EngineError
    from duetto.core.errors import InvalidRequest as InvalidRequest
    from duetto.core.errors import RequestTooLong as RequestTooLong
    from duetto.core.outputs import CompletionOutput as CompletionOutput
    from duetto.core.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from duetto.core.outputs import RequestOutput as RequestOutput
    from duetto.core.sampling_params import SamplingParams as SamplingParams
    from duetto.core.structured import StructuredOutputsParams as StructuredOutputsParams
    from duetto.llm import LLM as LLM

__version__ = "0.1.0"

_HOME_OF = {
    "LLM": "duetto.llm",
    "SamplingParams": "duetto.core.sampling_params",
    "StructuredOutputsParams": "duetto.core.structured",
    "PoolingParams": "duetto.core.embeddings",
    "RequestOutput": "duetto.core.outputs",
    "EmbeddingRequestOutput": "duetto.core.outputs",
    "CompletionOutput": "duetto.core.outputs",
    "DuettoError": "duetto.core.errors",
    "ConfigError": "duetto.core.errors",
    "CheckpointError": "duetto.core.errors",
    "InvalidRequest": "duetto.core.errors",
    "RequestTooLong": "duetto.core.errors",
    "EngineError": "duetto.core.errors",
}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'duetto' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
