"""What a reply weighs, said before any of it is computed. Knows no tokens and no HTTP.

A reply that is not streamed is kept until its last token has come, and of one that is the scores of
its prompt may be. The figures are those of
CPython 3.11 and of tokens of four characters: `benchmarks/hostile.py` measures them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from duetto.server.apis.asked import Asked
from duetto.server.http.errors import ApiError, invalid

TOKEN_BYTES = 128  # a token of an answer: as it is kept, and its text
KEPT_BYTES = 112  # a candidate with its log-probability, as it is kept ...
JSON_BYTES = 100  # ... and as it is written


@dataclass(frozen=True, slots=True)
class ReplySize:
    """Bytes for each token of the prompts and of the answers."""

    num_answers: int  # to each prompt
    prompt_token_bytes: int  # with all answers to the prompt
    answer_token_bytes: int
    max_bytes: int

    @staticmethod
    def of(asked: Asked, max_bytes: int) -> "ReplySize":
        sampling = asked.sampling
        scored, shown, n = sampling.prompt_logprobs, sampling.logprobs, sampling.n
        if asked.stream:  # it goes out as it comes, but the scores of a prompt may have to wait
            kept = 0 if scored is None else (1 + scored) * KEPT_BYTES
            return ReplySize(n, kept, 0, max_bytes)
        times = n if asked.is_scored_by_choice else 1
        at_prompt = 0 if scored is None else (1 + scored) * (KEPT_BYTES + times * JSON_BYTES)
        at_answer = 0 if shown is None else (1 + shown) * (KEPT_BYTES + JSON_BYTES)
        return ReplySize(n, at_prompt, TOKEN_BYTES + at_answer, max_bytes)

    def room(self, prompt_lengths: Iterable[int]) -> int | None:
        """Tokens that each answer may have at most; at least 1. None: any number."""
        lengths = list(prompt_lengths)
        if not self.answer_token_bytes or not lengths:
            return None
        left = self.max_bytes - self.prompt_token_bytes * sum(lengths)
        each = self.answer_token_bytes * self.num_answers * len(lengths)
        return max(1, left // each)

    def num_bytes(self, lengths: Iterable[tuple[int, int]]) -> int:
        """`lengths` are those of each prompt and its longest answer, in tokens."""
        return sum(
            prompt * self.prompt_token_bytes + self.num_answers * answer * self.answer_token_bytes
            for prompt, answer in lengths
        )


def too_large(asked: Asked, size: ReplySize, num_bytes: int, scored: int) -> ApiError:
    """400 that names what makes the most of it; `scored` prompt tokens have log-probabilities."""
    sampling, names = asked.sampling, asked.names
    if size.prompt_token_bytes * scored > num_bytes // 2:
        field = "prompt_logprobs" if asked.scored_by == "prompt_logprobs" else "logprobs"
    elif sampling.logprobs is not None:
        field = names.get("logprobs", "logprobs")
    else:
        field = "n" if sampling.n > 1 else names.get("max_tokens", "max_tokens")
    return invalid(
        field,
        f"the reply could take {num_bytes} bytes, for n={sampling.n}, "
        f"logprobs={sampling.logprobs}, prompt_logprobs={sampling.prompt_logprobs} and the tokens "
        f"asked for; at most {size.max_bytes} are accepted. Ask for less of one of them"
        f"{'' if asked.stream else ', or stream'}",
    )
