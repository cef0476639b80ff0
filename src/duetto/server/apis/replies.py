"""The bodies that clients receive: OpenAI's shapes, with vLLM's and llama.cpp's additions.

Plain functions from tokens and text to dicts; they know no engine, no queue and no HTTP.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duetto.core.batch import TokenLogprob
from duetto.core.text import TextCodec
from duetto.core.timings import RequestTimings
from duetto.server.apis.translator import Usage
from duetto.server.http.json_parts import Json
from duetto.server.observe.explain import parts_ms, reuse, speculation
from duetto.server.observe.miss import cache_miss


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk of one reply repeats."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    def around(self, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **more,
        }


def usage_body(usage: Usage, num_reasoning: int = 0) -> Json:
    """`completion_tokens_details` is there if drafts ran or it reasoned, under OpenAI's names."""
    shown = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
    }
    drafts, details = usage.drafts, Json()
    if num_reasoning:
        details["reasoning_tokens"] = num_reasoning
    if drafts.num_proposed:
        details["accepted_prediction_tokens"] = drafts.num_accepted
        details["rejected_prediction_tokens"] = drafts.num_proposed - drafts.num_accepted
    return {**shown, "completion_tokens_details": details} if details else shown


def timings(
    times: RequestTimings | None,
    num_prompt: int,
    num_cached: int,
    *,
    reader_s: float = 0.0,
    tells_other_salts: bool = False,
) -> Json | None:
    """llama.cpp's keys, and the parts that add up to `total_ms`. None if nothing was computed.

    `predicted_per_second` is 1 / TPOT: the first token belongs to the prompt's time. What the steps
    were expected to take (`steps_expected_ms`) stands beside what they took. `reader_s` is how long
    the end of a stream has waited for its client to take what was before it. Where drafts ran,
    `draft_n` and `draft_n_accepted` are llama.cpp's; `speculation` is ours, where they were asked
    for, as is `reuse`.
    """
    if times is None or not times.token_times or times.first_scheduled_time is None:
        return None
    num_reused = 0 if times.reuse is None else times.reuse.num_reused
    num_computed, num_output = num_prompt - num_cached - num_reused, len(times.token_times)
    prompt_s = times.token_times[0] - times.first_scheduled_time
    predicted_s = times.token_times[-1] - times.token_times[0]
    return {
        "cache_n": num_cached,
        "prompt_n": num_computed,
        "prompt_ms": _ms(prompt_s),
        "prompt_per_second": num_computed / prompt_s if prompt_s > 0 else None,
        "predicted_n": num_output,
        "predicted_ms": _ms(predicted_s),
        "predicted_per_second": (num_output - 1) / predicted_s if predicted_s > 0 else None,
        "ttft_ms": _ms(times.ttft_s),
        "total_ms": _ms((times.e2e_s or 0.0) + reader_s),
        "parts_ms": parts_ms(times.parts, reader_s),
        "num_preemptions": times.num_preemptions,
        "steps_ms": _ms(times.computed_s),
        "steps_expected_ms": _ms(times.predicted_s),
        "cache_miss": cache_miss(times.cache_miss, tells_other_salts=tells_other_salts),
        **_drafts(times),
        **({} if times.reuse is None else {"reuse": reuse(times.reuse)}),
    }


def _drafts(times: RequestTimings) -> Json:
    told = times.speculation
    if told is None:
        return {}
    shown: Json = {"speculation": speculation(told, len(times.token_times))}
    count = told.total
    if count.num_proposed:
        shown |= {"draft_n": count.num_proposed, "draft_n_accepted": count.num_accepted}
    return shown


def id_name(token_id: int) -> str:
    """What a token is called where names are asked for that tell all tokens apart, as in vLLM."""
    return f"token_id:{token_id}"


def chat_logprobs(
    tokens: Iterable[TokenLogprob], codec: TextCodec, *, as_ids: bool = False
) -> Json:
    def entry(token_id: int, logprob: float) -> Json:
        return {
            "token": id_name(token_id) if as_ids else codec.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(codec.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **entry(token.token_id, token.logprob),
                "top_logprobs": [entry(*candidate) for candidate in token.top],
            }
            for token in tokens
        ]
    }


def completion_logprobs(
    tokens: Sequence[TokenLogprob],
    codec: TextCodec,
    offsets: Sequence[int],
    token_bytes: Sequence[bytes],
    *,
    as_ids: bool = False,
) -> Json:
    """Parallel lists, as long as `offsets` and `token_bytes`, which are of the tokens shown.

    With one of these more than tokens, the first is of an echoed prompt's first, which nothing
    precedes and nothing scores. `as_ids`: candidates are called by their ids, as the caller has
    called the tokens.
    """

    def candidate(token_id: int) -> str:
        return id_name(token_id) if as_ids else _name(codec.token_bytes(token_id))

    unscored = len(offsets) - len(tokens)
    names = [_name(data) for data in token_bytes]
    logprobs: list[float | None] = [None] * unscored
    tops: list[dict[str, float] | None] = [None] * unscored
    for token, name in zip(tokens, names[unscored:], strict=True):
        logprobs.append(finite(token.logprob))
        # Likeliest last, so that of two tokens with the same text the likelier one is shown.
        top = {
            name if i == token.token_id else candidate(i): finite(value)
            for i, value in reversed(token.top)
        }
        tops.append({name: finite(token.logprob), **top})
    return {
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:  # half a character: as OpenAI writes it, or all would be U+FFFD
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs(tokens: Iterable[TokenLogprob], codec: TextCodec) -> list[Json | None]:
    """vLLM's shape: a dict of candidates per prompt token, None for the first."""
    entries: list[Json | None] = [None]
    for token in tokens:
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(token.top, start=1)]
        candidates = {i: (value, rank) for i, value, rank in ranked}
        candidates[token.token_id] = (token.logprob, token.rank)
        entries.append(
            {
                str(i): {
                    "logprob": finite(value),
                    "rank": rank,
                    "decoded_token": codec.token_text(i),
                }
                for i, (value, rank) in candidates.items()
            }
        )
    return entries


def finite(logprob: float) -> float:
    """JSON has no infinity; this stands for "impossible", as it does in vLLM."""
    return logprob if math.isfinite(logprob) else -9999.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
