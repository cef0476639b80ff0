"""Embeddings: what a request asks of one, and what a model gives. Knows no arrays and no text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from duetto.core.errors import InvalidRequest

Runner = Literal["auto", "generate", "pooling"]  # what a model is run for; the names are vLLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a request asks for instead of an answer: the last token's hidden state behind the final
    norm, its first `dimensions` numbers, at length 1."""

    dimensions: int | None = None  # None: all

    def __post_init__(self) -> None:
        asked = self.dimensions
        if asked is not None and (type(asked) is not int or asked < 1):
            raise InvalidRequest("dimensions", f"must be 1 or more, not {asked!r:.80}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel:
    """What a model gives that is run for embeddings."""

    size: int  # numbers of an embedding
    # The sizes that it may be cut to (Matryoshka); () for none, None for any.
    sizes: tuple[int, ...] | None = ()
    prompts: Mapping[str, str] = field(default_factory=dict)  # what is put before a text, by name
    default_prompt: str | None = None  # the name of the one before a text that asks for none

    def check(self, params: PoolingParams) -> None:
        """Raise InvalidRequest for a size that an embedding of this model cannot have."""
        asked = params.dimensions
        if asked is None or asked == self.size:
            return
        if self.sizes == ():
            raise InvalidRequest(
                "dimensions",
                f"{asked}: this model's embeddings have {self.size} numbers, and nothing says that "
                f"they may be cut: neither its config.json (is_matryoshka) nor --matryoshka",
            )
        if self.sizes is None:
            if asked > self.size:
                raise InvalidRequest(
                    "dimensions", f"{asked}: this model's embeddings have {self.size} numbers"
                )
        elif asked not in self.sizes:
            accepted = ", ".join(map(str, sorted({*self.sizes, self.size})))
            raise InvalidRequest("dimensions", f"{asked} is not one of {accepted}")

    def prompt(self, name: str | None) -> str:
        """What is put before a text. Raises InvalidRequest for a name that is not there."""
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidRequest(
                "prompt_name", f"{name!r:.80} is no prompt of this model; it has: {known}"
            )
        return self.prompts[name]
