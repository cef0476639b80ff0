"""Chat prompts of exactly the lengths asked for, by the tokenizer of the server that gets them.

A chat takes text, a template adds tokens to it, and random ids do not come back from their text as
the same ids. So the text is made longer or shorter until the server counts what was asked for.
Knows vLLM's /tokenize and /detokenize; without them, what the server counts in a reply helps to
come near.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from duetto.measure.client import Target, send, started_clock
from duetto.measure.workload import Workload, WorkloadRequest

MAX_ROUNDS = 8
MAX_STARTS = 4
AT_ONCE = 16  # prompts whose text is sought at the same time
TIMEOUT_S = 30.0
BUSY = (429, 503)  # asks to come again: after RETRY_S seconds, MAX_TRIES times in all
RETRY_S, MAX_TRIES = 0.5, 20
# What most tokenizers make one token of, whatever is before it; one of them will do.
FILLERS = (" a", " the", "a", " 1", "1", ".", "!", "\n")
# For servers that spell no ids: about a token each.
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
    *("place", "case", "week", "company", "system", "program", "question", "work", "government"),
    *("number", "night", "point", "home", "water", "room", "mother", "area", "money", "story"),
)

Spell = Callable[[Sequence[int]], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """The server's, over HTTP. Where it has none: httpx2.HTTPError, ValueError, KeyError."""

    http: httpx2.AsyncClient
    target: Target

    async def spell(self, ids: Sequence[int]) -> str:
        return str((await self._ask("/detokenize", tokens=list(ids)))["prompt"])

    async def ids(self, text: str) -> list[int]:
        asked = {"prompt": text, "add_special_tokens": False}
        return [int(each) for each in (await self._ask("/tokenize", **asked))["tokens"]]

    async def growth(self, ids: Sequence[int]) -> float:
        """How many tokens the text of an id has on average: 1 if all came back as they were."""
        return max(0.1, len(await self.ids(await self.spell(ids))) / max(1, len(ids)))

    async def prompt(self, text: str) -> "_Prompt":
        """The text, and the tokens of the prompt that a chat makes of it as a user's message."""
        extra = self.target.extra_body
        kept = ("chat_template_kwargs", "add_generation_prompt", "add_special_tokens")
        asked = {name: extra[name] for name in kept if name in extra}
        messages = [{"role": "user", "content": text}]
        reply = await self._ask("/tokenize", messages=messages, **asked)
        return _Prompt(text, int(reply["count"]))

    async def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        body |= {"model": self.target.model}
        for _ in range(MAX_TRIES):
            reply = await self.http.post(path, json=body, timeout=TIMEOUT_S)
            if reply.status_code not in BUSY:
                break
            await asyncio.sleep(RETRY_S)
        reply.raise_for_status()
        found = reply.json()
        if not isinstance(found, dict):
            raise ValueError("the reply is not an object")
        return found


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    num_tokens: int  # as the server counts


async def chat_workload(http: httpx2.AsyncClient, target: Target, workload: Workload) -> Workload:
    """The workload with text in place of token ids. Its notes say how exact the lengths are.

    Raises httpx2.ConnectError if nobody answers.
    """
    if all(request.prompt_text is not None for request in workload.requests):
        return workload
    tokenizer = _Tokenizer(http, target)
    try:
        return await _exact(tokenizer, workload)
    except httpx2.ConnectError:
        raise
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        why = f"{target.base_url} does not count or spell chats with /tokenize and /detokenize"
        why += f" ({_short(error)})"
    return await _near(tokenizer, workload, why)


async def _exact(tokenizer: _Tokenizer, workload: Workload) -> Workload:
    places = asyncio.Semaphore(AT_ONCE)
    first = next(r.prompt_token_ids for r in workload.requests if r.prompt_token_ids is not None)
    growth = await tokenizer.growth(first)

    async def fit(request: WorkloadRequest) -> tuple[WorkloadRequest, bool]:
        if request.prompt_token_ids is None:
            return request, True
        async with places:
            found = await fitted(request.prompt_token_ids, growth, tokenizer)
        is_exact = found.num_tokens == len(request.prompt_token_ids)
        return _as_text(request, found.text), is_exact

    done = await asyncio.gather(*(fit(request) for request in workload.requests))
    num_inexact = sum(not is_exact for _, is_exact in done)
    notes = workload.notes
    if num_inexact:
        notes += (
            f"{num_inexact} of {len(workload.requests)} chat prompts have not exactly the length "
            f"asked for: the template alone may be longer, or no text has it",
        )
    return replace(workload, requests=tuple(request for request, _ in done), notes=notes)


async def fitted(ids: Sequence[int], growth: float, tokenizer: _Tokenizer) -> _Prompt:
    """A text that makes a chat's prompt of as many tokens as there are ids: exactly, or as nearly
    as a few rounds come. Ids that begin alike make texts that do."""
    asked = len(ids)
    some = [*thinned(ids, growth), *reversed(ids)]  # the second part is for texts that shrink
    length = len(some) - asked
    tried: dict[int, _Prompt] = {}
    for _ in range(MAX_ROUNDS):
        found = tried[length] = await tokenizer.prompt(await tokenizer.spell(some[:length]))
        missing = asked - found.num_tokens
        if not missing:
            return found
        step = round(missing / growth) or (1 if missing > 0 else -1)
        length = min(max(1, length + step), len(some))
        if length in tried:
            break
    below = sorted((f for f in tried.values() if f.num_tokens < asked), key=_length, reverse=True)
    if not below:
        return min(tried.values(), key=_length)
    # Also without what stands at the end, which a template may trim until something is after it.
    cut = [await tokenizer.prompt(below[0].text[:-num]) for num in range(1, MAX_STARTS)]
    starts = [*below[:MAX_STARTS], *(found for found in cut if found.num_tokens < asked)]
    return await _filled(starts, asked, tokenizer)


def thinned(ids: Sequence[int], growth: float) -> list[int]:
    """Every so many of the ids that their text has about as many tokens as there were ids.

    Which ones hangs on their place alone, so a prefix that prompts share stays shared, and the
    rest stays as long beside it as it was: cutting the end would leave nothing but the prefix.
    """
    rate = 1.0 / max(1.0, growth)
    kept = [each for place, each in enumerate(ids) if int((place + 1) * rate) > int(place * rate)]
    return kept or list(ids[:1])


async def _filled(starts: Sequence[_Prompt], asked: int, tokenizer: _Tokenizer) -> _Prompt:
    """The first of texts that are a little too short that some filler makes as long as asked."""
    best = starts[0]
    for start in starts:
        for filler in FILLERS:
            now, num = start, asked - start.num_tokens
            while num:
                more = await tokenizer.prompt(now.text + filler * num)
                if more.num_tokens > asked and num > 1:
                    num //= 2  # it has more tokens than it seemed
                    continue
                if not now.num_tokens < more.num_tokens <= asked:
                    break
                now, num = more, asked - more.num_tokens
            if now.num_tokens == asked:
                return now
            best = max(best, now, key=_length)
    return best


def _length(prompt: _Prompt) -> int:
    return prompt.num_tokens


async def _near(tokenizer: _Tokenizer, workload: Workload, why: str) -> Workload:
    """Texts that are shorter by what the server adds to the first one, as its usage tells."""
    first = next(r for r in workload.requests if r.prompt_token_ids is not None)
    ids = first.prompt_token_ids or ()
    spell, how = await _speller(tokenizer, ids)
    probe = replace(_as_text(first, await spell(ids[::-1])), num_output_tokens=1)
    record = await send(tokenizer.http, tokenizer.target, probe, 0.0, started_clock())
    counted = record.num_prompt_tokens if record.error is None else 0
    growth = counted / len(ids) if counted else 1.0

    async def shortened(request: WorkloadRequest) -> WorkloadRequest:
        if request.prompt_token_ids is None:
            return request
        return _as_text(request, await spell(thinned(request.prompt_token_ids, growth)))

    requests = [await shortened(request) for request in workload.requests]
    note = f"{why}, so prompts are {how}, and their lengths only near the ones asked for"
    return replace(workload, requests=tuple(requests), notes=(*workload.notes, note))


async def _speller(tokenizer: _Tokenizer, some: Sequence[int]) -> tuple[Spell, str]:
    """What makes a text of about as many tokens as there are ids."""

    async def words(ids: Sequence[int]) -> str:
        return " ".join(WORDS[each % len(WORDS)] for each in ids)

    try:
        await tokenizer.spell(some)
    except httpx2.ConnectError:
        raise
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return words, "common words"
    return tokenizer.spell, "random token ids as text"


def _as_text(request: WorkloadRequest, text: str) -> WorkloadRequest:
    """The same request by its text; the length asked for stays known."""
    asked = request.num_prompt_tokens
    return replace(request, prompt_token_ids=None, prompt_text=text, num_prompt_tokens=asked)


def _short(error: Exception) -> str:
    if isinstance(error, httpx2.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error)[:100] or type(error).__name__
