"""Why a request took as long as it did, in JSON and in one sentence for people.

Knows what is remembered of a request; knows no engine and no HTTP.
"""

from collections.abc import Collection

from duetto.core.draft_counts import Speculation, tokens_per_step
from duetto.core.reuse_count import ReuseCount
from duetto.core.timings import Part
from duetto.server.http.json_parts import Json
from duetto.server.observe.history import Ended, Running
from duetto.server.observe.miss import cache_miss
from duetto.server.observe.reused import segment_lines, segments_found
from duetto.server.observe.timeline import Steps, ms, segments, segments_until

PART_NAMES = {
    Part.WAITING: "queued",
    Part.BLOCKS: "blocks",
    Part.PROMPT: "prompt",
    Part.DECODE: "decode",
    Part.SHARED: "shared",
    Part.STALLED: "stalled",
    Part.PREEMPTED: "preempted",
}
READER = "reader"  # the part that is the client's, beside those of the engine
MIN_DRAFTED = 3  # output tokens: the first has no drafts, and the last needs none
NOT_WORTH_A_WORD = 0.001  # of the whole time
SLOW_RATIO = 1.5  # steps that take so much longer than expected are worth a word

_CAUSES = {
    "queued": "waiting for its turn: all places or all of the steps' tokens were taken "
    "(--max-num-seqs, --max-num-batched-tokens, or another machine)",
    "blocks": "waiting for KV blocks (more --kv-cache-memory-bytes, or fewer requests at a time)",
    "prompt": "computing its own prompt",
    "decode": "generating",
    "shared": "generating in steps that also computed others' prompts (--target-itl, or a smaller "
    "--max-num-batched-tokens, makes these shorter)",
    "stalled": "admitted, while no step computed anything for it",
    "preempted": "having lost its KV blocks to older requests, and computing them again (more "
    "--kv-cache-memory-bytes, or fewer requests at a time)",
    READER: "ready, while its client had not read what was sent before",
}


def parts_ms(parts: dict[Part, float], reader_s: float) -> Json:
    """The parts that add up to the E2E latency, a stream's reader included."""
    return {PART_NAMES[part]: ms(spent) for part, spent in parts.items()} | {READER: ms(reader_s)}


def speculation(told: Speculation, num_tokens: int) -> Json:
    """What drafts gave a request that ended with `num_tokens`, as replies show it."""
    per_step = tokens_per_step(num_tokens, told.total.num_accepted)
    return {
        "steps": told.chains.num_chains,
        "tokens_per_step": None if per_step is None else round(per_step, 3),
        "proposed_per_position": told.chains.proposed,
        "accepted_per_position": told.chains.accepted,
        "by_method": {
            method: {"proposed": count.num_proposed, "accepted": count.num_accepted}
            for method, count in told.by_method.items()
        },
        "asked": told.num_asked,
        "made": told.num_made,
        "drafting_ms": ms(told.drafting_s),
        "verifying_ms": ms(told.verifying_s),
        "saved_ms": ms(told.saved_s),
    }


def reuse(count: ReuseCount) -> Json:
    """Where the KV of a prompt with segments came from, as replies show it."""
    return {
        "choice": count.choice,
        "exact": count.num_exact,
        "reused": count.num_reused,
        "recomputed": count.num_recomputed,
        "computed": count.num_computed,
        "missing": count.num_missing,
        "why_not": count.why_not,
    }


def listed(ended: Ended) -> Json:
    """One line of the list of recent requests."""
    ttft = None if ended.first_token_time is None else ended.first_token_time - ended.arrival_time
    return {
        "id": ended.request_id,
        "request_id": ended.name,  # as the client knows it: X-Request-Id, and in the reply's id
        "finish_reason": ended.finish_reason,
        "prompt_tokens": ended.num_prompt_tokens,
        "completion_tokens": ended.num_output_tokens,
        "ttft_ms": ms(ttft),
        "total_ms": ms(ended.total_s),
    }


def timeline(
    ended: Ended,
    steps: Steps,
    *,
    tells_other_salts: bool,
    methods: Collection[str] = (),
) -> Json:
    """All that is known of where one request's time went. `methods` may propose drafts here."""
    found, is_whole = segments(ended, steps)
    miss = cache_miss(ended.cache_miss, tells_other_salts=tells_other_salts)
    gap_end, origin, told = ended.longest_gap_end, ended.arrival_time, ended.speculation
    return {
        **listed(ended),
        "error": ended.error,
        "cached_tokens": ended.num_cached_tokens,
        "cache_miss": miss,
        "cache": cache_words(miss, ended),
        "segment_hits": segments_found(ended.segment_hits, tells_other_salts=tells_other_salts),
        "segment_lines": segment_lines(ended.segment_hits, tells_other_salts=tells_other_salts),
        "speculation": None if told is None else speculation(told, ended.num_output_tokens),
        "drafts": draft_words(ended, methods),
        "reuse": None if ended.reuse is None else reuse(ended.reuse),
        "parts_ms": parts_ms(ended.parts, ended.reader_s),
        "steps_ms": ms(ended.computed_s),
        "steps_expected_ms": ms(ended.predicted_s),
        "longest_gap_ms": ms(ended.longest_gap_s),
        "longest_gap_end_ms": None if gap_end is None else ms(gap_end - origin),
        "num_preemptions": ended.num_preemptions,
        "segments": [segment.shown(origin) for segment in found],
        "segments_are_whole": is_whole,  # or the first steps are no longer remembered
        "why": why(ended, miss),
    }


def so_far(
    running: Running,
    steps: Steps,
    now: float,
    *,
    is_whole: bool,
) -> Json:
    """What is known of a request that has not ended. How its time divides into parts, what the
    cache had, and why, is told when it has."""
    found, num_tokens = segments_until(running, steps, now)
    total_s, origin = now - running.arrival_time, running.arrival_time
    state = (
        f"{running.num_output_tokens} tokens are generated so far"
        if running.num_output_tokens
        else "its prompt is being computed"
        if num_tokens
        else "it waits in the queue"
    )
    return {
        "id": running.request_id,
        "request_id": running.name,
        "finish_reason": None,
        "prompt_tokens": running.num_prompt_tokens,
        "completion_tokens": running.num_output_tokens,
        "total_ms": ms(total_s),
        "parts_ms": {},
        "segments": [segment.shown(origin) for segment in found],
        "segments_are_whole": is_whole,
        "why": f"it is still running, for {_seconds(total_s)}: {state}.",
    }


def why(ended: Ended, miss: Json | None) -> str:
    """One sentence: what most of the time went to, and what was unusual about it."""
    parts = {PART_NAMES[part]: spent for part, spent in ended.parts.items()}
    parts[READER] = ended.reader_s
    name = max(parts, key=lambda each: parts[each])
    whole = ended.total_s
    share = parts[name] / whole if whole > 0 else 0.0
    text = f"{_seconds(parts[name])} of its {_seconds(whole)} ({share:.0%}) went to {_CAUSES[name]}"
    if name == "prompt":
        num = ended.num_computed_tokens
        text += f" of {num} tokens that the prefix cache did not have"
        text += f" ({cache_words(miss, ended)})" if miss is not None else ""
    elif name == "decode" and ended.num_output_tokens > 1:
        per_token = parts[name] / (ended.num_output_tokens - 1)
        text += f" {ended.num_output_tokens} tokens, {_seconds(per_token)} each"
    expected = ended.predicted_s
    if expected and ended.computed_s > SLOW_RATIO * expected:
        text += (
            f"; its steps took {ended.computed_s / expected:.1f} times what is expected of them, "
            f"so the machine was busy with something else, or the server had just started"
        )
    return text + "."


def cache_words(miss: Json | None, ended: Ended) -> str:
    """What the prefix cache had of the prompt, and why no more."""
    if not ended.was_admitted:
        return "it was never looked up: the request ended in the queue"
    if miss is None:
        return f"{ended.num_cached_tokens} tokens came from the cache, all that could"
    token, reason = miss["token"], miss["reason"]
    words = {
        "off": "prefix caching is off",
        "scored": "a prompt that is to be scored is computed whole",
        "too_short": "the prompt is shorter than a block, and only whole blocks are kept",
        "never_seen": f"nothing remembered has the same tokens from token {token} on",
        "differs": f"token {miss['differs_at']} differs from the prompt that began alike",
        "evicted": f"the block at token {token} was there, and was taken for other requests",
        "dropped": f"the block at token {token} was there, and was dropped by a user of the cache",
        "other_salt": "the same tokens are cached for another tenant or cache_salt",
    }
    return f"{token} tokens came from the cache; {words[reason]}"


def draft_words(ended: Ended, methods: Collection[str]) -> str:
    """What speculation gave a request, or why there was none."""
    told, num_tokens = ended.speculation, ended.num_output_tokens
    if told is None:
        if not methods:
            return "off: the server was started without --speculative-config"
        if num_tokens < MIN_DRAFTED:
            return "none was asked for: the answer was too short"
        return "none was asked for: at that load drafts would have cost more than they gave"
    names = ", ".join(told.by_method) or told.asked or "no method"
    count, per_step = told.total, tokens_per_step(num_tokens, told.total.num_accepted)
    if not count.num_proposed:
        text = f"{names}: asked {told.num_asked} times, it proposed nothing that was tried"
    else:
        text = f"{names}: {count.num_accepted} of {count.num_proposed} drafts accepted"
        text += "" if per_step is None else f", {per_step:.2f} tokens a step"
    saved = told.saved_s
    if saved is None or abs(saved) < NOT_WORTH_A_WORD * ended.total_s:
        return text
    if saved < 0:
        return f"{text}; cost about {_seconds(-saved)} more than it saved"
    whole = ended.total_s + saved
    return f"{text}; saved about {_seconds(saved)} of {_seconds(whole)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
