"""Whether a tokenizer belongs to a model: its tokens and the rows of the model's embedding.

They need not be as many. Rows are padded to a round number: an id without a token decodes to
nothing. And some published checkpoints (Gemma 3, CodeLlama 34B) have a few added tokens without a
row, which no prompt may hold and nothing samples.
"""

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from duetto.checkpoints.tokenizer_library import LibraryError, call
from duetto.core.errors import CheckpointError

MAX_TOKENS_WITHOUT_ROW = 64  # the most seen in a published checkpoint is 4


def tokens_beyond(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> Mapping[int, str]:
    """Token id -> token, of those that a model with `vocab_size` rows does not have."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {i: token for token, i in vocabulary.items() if i >= vocab_size}


def check_vocabulary(
    tokenizer: tokenizers.Tokenizer, beyond: Mapping[int, str], vocab_size: int, file: Path
) -> None:
    """Raise CheckpointError if the tokenizer plainly belongs to a model with more rows.

    What it learned from text must have a row each, and what it puts around every prompt; of the
    tokens that were added to it, a few right behind the last row may lack one: those in `beyond`,
    as tokens_beyond gives it.
    """
    learned = beyond.keys() - tokenizer.get_added_tokens_decoder().keys()
    if learned or max(beyond, default=0) >= vocab_size + MAX_TOKENS_WITHOUT_ROW:
        why = f"{len(beyond)} tokens lie beyond it, up to {max(beyond)}"
    elif around := [i for i in _around_prompts(tokenizer) if i >= vocab_size]:
        named = repr(beyond[min(around)]) if min(around) in beyond else "a token"
        why = f"it puts {named} ({min(around)}) around each prompt"
    else:
        return
    raise CheckpointError(
        file,
        f"the model's vocabulary is {vocab_size}, and {why}: the tokenizer belongs to another "
        "model",
    )


def _around_prompts(tokenizer: tokenizers.Tokenizer) -> list[int]:
    try:
        (encoding,) = call(tokenizer.encode_batch_fast, [""])
    except LibraryError:
        return []  # whether it can encode anything is not asked here
    ids: list[int] = encoding.ids
    return ids
