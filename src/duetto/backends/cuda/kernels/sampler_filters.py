"""Draws of rows with top_k, top_p or min_p, each of which keeps a beginning of the order (logit,
then lower id). So a draw that is not kept limits the next draw to what is ahead of it, as in
csrc/sampler.cpp. One program per row; a chunk of the row that cannot matter is not read.

Where top_k is small, the few tokens that reach a bound of it are gathered first, and all that
follows is done on them, in registers.
"""

import triton
import triton.language as tl

from duetto.backends.cuda.kernels.sampler_numbers import (
    BEYOND,
    LEAST_BOUNDED_T,
    MAX_NOISE,
    MOST_BOUNDED_T,
    SLACK,
    WEIGHED_GAP,
    exact_scores,
    exact_weights,
    inverse_of,
    logit_of_key,
    order_key,
    scores_about,
)


@triton.jit
def draw_filtered(
    logits,
    vocab_size,
    num_chunks,
    largest,
    parts,
    maxima,
    list_x,
    list_ids,
    first,
    temperature,
    key,
    top_k,
    top_p,
    min_gap,
    chunk_size: tl.constexpr,
    num_parts: tl.constexpr,
    list_size: tl.constexpr,
):
    """The token of one row, whose largest logit `first` is finite."""
    lowest, drawn = first + min_gap, top_k * 0 - 1
    if (top_k > 0) & (top_k < vocab_size):
        places = tl.arange(0, maxima.shape[0] * num_parts)
        part_size = chunk_size // num_parts
        part_maxima = tl.load(
            parts + places, mask=places * part_size < vocab_size, other=float("-inf")
        )
        least = logit_of_key(_key_that_reach(order_key(part_maxima), places >= 0, top_k))
        count = _gather(
            *(logits, vocab_size, num_chunks, largest, least),
            *(list_x, list_ids, chunk_size, list_size),
        )
        if count <= list_size:
            tl.debug_barrier()  # what other threads have stored is loaded
            entries = tl.arange(0, list_size)
            x = tl.load(list_x + entries, mask=entries < count, other=float("-inf"))
            ids = tl.load(list_ids + entries, mask=entries < count, other=BEYOND)
            drawn = _draw_of_list(x, ids, first, temperature, key, top_k, top_p, lowest)
    if drawn < 0:
        drawn = _draw_walking(
            *(logits, vocab_size, num_chunks, largest, order_key(maxima)),
            *(first, temperature, key, top_k, top_p, lowest, chunk_size),
        )
    return drawn


# --- few tokens, in registers --------------------------------------------------------------------


@triton.jit
def _key_that_reach(keys, is_one, count):
    """The largest key that `count` of them reach, if they are so many; else 0."""
    found, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        tried, bit = found | bit, bit >> 1
        found = tl.where(tl.sum((is_one & (keys >= tried)).to(tl.int32), 0) >= count, tried, found)
    return found


@triton.jit
def _gather(
    logits,
    vocab_size,
    num_chunks,
    largest,
    least,
    list_x,
    list_ids,
    chunk_size: tl.constexpr,
    list_size: tl.constexpr,
):
    """Store the tokens that reach `least`, by ascending id, as far as there is room. How many they
    are; NaN is reached by none, and stands for no bound: too many."""
    count = num_chunks * 0
    if least != least:
        count += list_size + 1
    for c in range(num_chunks):
        if (tl.load(largest + c) >= least) & (count <= list_size):
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            reaches = ((x >= least) & (ids < vocab_size)).to(tl.int32)
            place = count + tl.cumsum(reaches, 0) - 1
            is_stored = (reaches > 0) & (place < list_size)
            tl.store(list_x + place, x, mask=is_stored)
            tl.store(list_ids + place, ids, mask=is_stored)
            count += tl.sum(reaches, 0)
    return count


@triton.jit
def _draw_of_list(x, ids, first, temperature, key, top_k, top_p, lowest):
    """Among tokens by ascending id, the first `top_k` of all in their order among them."""
    is_token, keys = ids < BEYOND, order_key(x)
    last = _key_that_reach(keys, is_token, top_k)
    num_above = tl.sum((is_token & (keys > last)).to(tl.int32), 0)
    equal = is_token & (keys == last)
    is_first = tl.cumsum(equal.to(tl.int32), 0) <= top_k - num_above
    kept = (is_token & (keys > last)) | (equal & is_first)
    kept = kept & (x.to(tl.float64) >= lowest)
    scores = exact_scores(x, ids, first, temperature, key)
    drawn = _likeliest(scores, ids, kept)
    if top_p < 1.0:
        weights = tl.where(kept, exact_weights(x, first, inverse_of(temperature)), 0)
        wanted = top_p * tl.sum(weights, 0).to(tl.float64)
        is_ahead = kept & _are_ahead(x, ids, drawn)
        while tl.sum(tl.where(is_ahead, weights, 0), 0).to(tl.float64) >= wanted:
            drawn = _likeliest(scores, ids, is_ahead)
            is_ahead = is_ahead & _are_ahead(x, ids, drawn)
    return drawn


@triton.jit
def _likeliest(scores, ids, kept):
    scores = tl.where(kept, scores, float("-inf"))
    return tl.min(tl.where(kept & (scores == tl.max(scores, 0)), ids, BEYOND), 0)


@triton.jit
def _are_ahead(x, ids, token):
    own = tl.max(tl.where(ids == token, x, float("-inf")), 0)
    return (x > own) | ((x == own) & (ids < token))


# --- any number of tokens, chunk by chunk --------------------------------------------------------


@triton.jit
def _chunk(logits, c, vocab_size, chunk_size: tl.constexpr):
    ids = c * chunk_size + tl.arange(0, chunk_size)
    return tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")), ids


@triton.jit
def _is_within(x, ids, lowest, last, last_id):
    """Kept by min_p, and not behind the token (last, last_id)."""
    return (x.to(tl.float64) >= lowest) & ((x > last) | ((x == last) & (ids <= last_id)))


@triton.jit
def _draw(
    logits,
    vocab_size,
    num_chunks,
    largest,
    first,
    temperature,
    key,
    lowest,
    last,
    last_id,
    chunk_size: tl.constexpr,
):
    """The id of the largest exact score of all that are within."""
    is_bounded = (temperature >= LEAST_BOUNDED_T) & (temperature <= MOST_BOUNDED_T)
    factor = tl.where(is_bounded, 1.0 / temperature, 1.0).to(tl.float32)
    best, best_id = first * 0.0 + float("-inf"), last_id * 0 + BEYOND
    for c in range(num_chunks):
        most = tl.load(largest + c)
        upper = (most.to(tl.float64) - first) / temperature + MAX_NOISE
        if (most >= last) & (upper >= best):
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            within = _is_within(x, ids, lowest, last, last_id)
            about = scores_about(x, ids, first.to(tl.float32), factor, key)
            bound = tl.max(tl.where(within, about, float("-inf")), 0).to(tl.float64) + SLACK
            if (bound >= best) | (is_bounded == 0):
                scores = tl.where(
                    within, exact_scores(x, ids, first, temperature, key), float("-inf")
                )
                score = tl.max(scores, 0)
                if score > best:
                    best = score
                    best_id = tl.min(tl.where(scores == score, ids, BEYOND), 0)
    return best_id


@triton.jit
def _num_reaching(
    logits, vocab_size, num_chunks, chunk_keys, low, middle, high, chunk_size: tl.constexpr
):
    """How many tokens have these keys, low <= middle <= high, or more."""
    counts = tl.zeros((chunk_size,), tl.int32)
    counts_middle, counts_high = counts, counts
    places = tl.arange(0, chunk_keys.shape[0])
    for c in range(num_chunks):
        if tl.sum(((chunk_keys >= low) & (places == c)).to(tl.int32), 0) > 0:
            ids = c * chunk_size + tl.arange(0, chunk_size)
            is_token = ids < vocab_size
            keys = order_key(tl.load(logits + ids, mask=is_token, other=0.0))
            counts += (is_token & (keys >= low)).to(tl.int32)
            counts_middle += (is_token & (keys >= middle)).to(tl.int32)
            counts_high += (is_token & (keys >= high)).to(tl.int32)
    return tl.sum(counts, 0), tl.sum(counts_middle, 0), tl.sum(counts_high, 0)


@triton.jit
def _last_of_top_k(logits, vocab_size, num_chunks, chunk_keys, top_k, chunk_size: tl.constexpr):
    """The last of the `top_k` first tokens: its logit and its id. Its key is the largest that
    `top_k` tokens reach, found two bits at a time."""
    found, one = tl.full((), 0, tl.uint32), tl.full((), 0x40000000, tl.uint32)
    for _ in range(16):
        low, middle, high = found | one, found | (one << 1), found | one | (one << 1)
        # So many reach it at least. Where that is enough, it need not be counted.
        n_low = tl.sum((chunk_keys >= low).to(tl.int32), 0)
        n_middle = tl.sum((chunk_keys >= middle).to(tl.int32), 0)
        n_high = tl.sum((chunk_keys >= high).to(tl.int32), 0)
        if (n_low > 0) & (n_high < top_k):
            low_left = tl.where(n_middle >= top_k, high, tl.where(n_low >= top_k, middle, low))
            m_low, m_middle, m_high = _num_reaching(
                *(logits, vocab_size, num_chunks, chunk_keys, low_left),
                *(tl.maximum(low_left, middle), high, chunk_size),
            )
            n_low, n_middle = tl.maximum(n_low, m_low), tl.maximum(n_middle, m_middle)
            n_high = m_high
        digit = (n_low >= top_k).to(tl.uint32) + (n_middle >= top_k).to(tl.uint32)
        digit += (n_high >= top_k).to(tl.uint32)
        found, one = found | digit * one, one >> 2
    above = found + 1
    num_above, _, _ = _num_reaching(
        logits, vocab_size, num_chunks, chunk_keys, above, above, above, chunk_size
    )
    num_left, last_id = top_k - num_above, top_k * 0 + BEYOND
    for c in range(num_chunks):
        if num_left > 0:
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            equal = ((order_key(x) == found) & (ids < vocab_size)).to(tl.int32)
            place = tl.cumsum(equal, 0)
            is_last = (equal > 0) & (place == num_left)
            last_id = tl.minimum(last_id, tl.min(tl.where(is_last, ids, BEYOND), 0))
            num_left -= tl.sum(equal, 0)
    return logit_of_key(found), last_id


@triton.jit
def _sum_of_weights(
    logits,
    vocab_size,
    num_chunks,
    largest,
    first,
    temperature,
    lowest,
    last,
    last_id,
    chunk_size: tl.constexpr,
):
    """What all that are within weigh."""
    inverse = inverse_of(temperature)
    floor = first - WEIGHED_GAP * temperature
    sums = tl.zeros((chunk_size,), tl.int64)
    for c in range(num_chunks):
        most = tl.load(largest + c)
        if (most >= last) & (most.to(tl.float64) >= floor):
            x, ids = _chunk(logits, c, vocab_size, chunk_size)
            within = _is_within(x, ids, lowest, last, last_id) & (ids < vocab_size)
            sums += tl.where(within, exact_weights(x, first, inverse), 0)
    return tl.sum(sums, 0)


@triton.jit
def _draw_walking(
    logits,
    vocab_size,
    num_chunks,
    largest,
    chunk_keys,
    first,
    temperature,
    key,
    top_k,
    top_p,
    lowest,
    chunk_size: tl.constexpr,
):
    """Over the whole row, chunk by chunk."""
    last, last_id = first.to(tl.float32) * 0.0 + float("-inf"), top_k * 0 + BEYOND
    if (top_k > 0) & (top_k < vocab_size):
        last, last_id = _last_of_top_k(
            logits, vocab_size, num_chunks, chunk_keys, top_k, chunk_size
        )
    drawn = _draw(
        *(logits, vocab_size, num_chunks, largest, first, temperature, key),
        *(lowest, last, last_id, chunk_size),
    )
    if top_p < 1.0:
        total = _sum_of_weights(
            *(logits, vocab_size, num_chunks, largest, first, temperature),
            *(lowest, last, last_id, chunk_size),
        )
        wanted = top_p * total.to(tl.float64)
        last, last_id = tl.load(logits + drawn), drawn - 1  # what is ahead of it
        ahead = _sum_of_weights(
            *(logits, vocab_size, num_chunks, largest, first, temperature),
            *(lowest, last, last_id, chunk_size),
        )
        while ahead.to(tl.float64) >= wanted:  # the nucleus holds what is wanted without it
            drawn = _draw(
                *(logits, vocab_size, num_chunks, largest, first, temperature, key),
                *(lowest, last, last_id, chunk_size),
            )
            last, last_id = tl.load(logits + drawn), drawn - 1
            ahead = _sum_of_weights(
                *(logits, vocab_size, num_chunks, largest, first, temperature),
                *(lowest, last, last_id, chunk_size),
            )
    return drawn
