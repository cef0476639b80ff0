"""Faults to plant: what a hand may slip on in a scheduler, each as a change of its text."""

from scheduler.mutants import Fault
from scheduler.reuse_faults import REUSE

BLOCK_POOL = [
    Fault(
        "salt left out of the root hash",
        "block_pool",
        "namespace, salt)\n    ret",
        "namespace)\n    ret",
    ),
    Fault("hash without its parent", "block_pool", "sha256(parent + struct", "sha256(struct"),
    Fault(
        "stale hash kept on allocation",
        "block_pool",
        "            self._forget(block, EvictionReason.TTL if",
        "            0 * (EvictionReason.TTL if",
    ),
    Fault(
        "reused block stays free",
        "block_pool",
        "            self._free.discard(block)\n            self._kept.pop(block, None)\n"
        "            self._ref_counts[block] += 1\n",
        "            self._ref_counts[block] += 1\n",
    ),
    Fault(
        "reuse is not counted",
        "block_pool",
        "self._ref_counts[block] += 1",
        "self._ref_counts[block] = 1",
    ),
    Fault(
        "first owner's release frees", "block_pool", "if self._ref_counts[block] == 0:", "if True:"
    ),
    Fault(
        "release frees nothing",
        "block_pool",
        "if self._ref_counts[block] == 0:\n                self._let_go(block)\n",
        "if self._ref_counts[block] == 0:\n                return\n",
    ),
    Fault(
        "second block to hold a prefix replaces the first",
        "block_pool",
        "if block_hash not in self._block_of and block not in self._hash_of:",
        "if True:",
    ),
    Fault(
        "a gap in a prefix is skipped",
        "block_pool",
        "                break\n",
        "                continue\n",
    ),
    Fault("forgets half", "block_pool", "        self._hash_of.clear()\n", ""),
    Fault(
        "free blocks counted without those to be reused",
        "block_pool",
        " - sum(block in self._free for block in blocks)",
        "",
    ),
]

PREFIX = [
    Fault(
        "last token reused",
        "prefix",
        "(request.num_tokens - 1) // config",
        "request.num_tokens // config",
    ),
    Fault(
        "uncomputed block published",
        "prefix",
        "num_full = min(request.num_written_tokens, num_exact) //",
        "num_full = num_exact //",
    ),
    Fault(
        "scored prompt reused",
        "prefix",
        "if not config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:",
        "if not config.enable_prefix_caching:",
    ),
    Fault(
        "cache cannot be turned off",
        "scheduler",
        "num_published_blocks and self.config.enable_prefix_caching:",
        "num_published_blocks:",
    ),
    Fault(
        "blocks hashed from wrong places",
        "prefix",
        "request.token_ids[start : start + size]",
        "request.token_ids[start + 1 : start + size]",
    ),
    Fault(
        "wrong blocks published",
        "prefix",
        "request.block_table[index]",
        "request.block_table[-1 - index]",
    ),
]

PLAN = [
    Fault(
        "one end too many forbidden",
        "plan",
        "if num_outputs(request, drafts) < request.sampling",
        "if num_outputs(request, drafts) <= request.sampling",
    ),
    Fault("bad words read from the prompt", "plan", "size <= num_output and ", ""),
    Fault("token scored that was given", "plan", "[start + 1 : end + 1]", "[start:end]"),
    Fault(
        "samples before the last token",
        "plan",
        "    samples = end == len(known) + request.num_pending_tokens\n    num_prompt",
        "    samples = end >= len(known) + request.num_pending_tokens - 1\n    num_prompt",
    ),
    Fault(
        "stream not advanced",
        "plan",
        "return SamplingInput(params, request.seed, num_output)",
        "return SamplingInput(params, request.seed, 0)",
    ),
]

ROOM = [
    Fault(
        "block table one block short",
        "room",
        "return self._config.num_blocks_for(min(num_tokens, request.most_tokens - 1))",
        "return self._config.num_blocks_for(min(num_tokens - 1, request.most_tokens - 1))",
    ),
    Fault(
        "allocates before it retains",
        "room",
        "        self._pool.retain(cached)  # first, or allocation could take what is about to be "
        "reused\n"
        "        for source in sources:\n"
        "            self._pool.retain(source.blocks)\n"
        "        request.block_table = cached + self._pool.allocate(needed)\n",
        "        request.block_table = cached + self._pool.allocate(needed)\n"
        "        self._pool.retain(cached)\n"
        "        for source in sources:\n"
        "            self._pool.retain(source.blocks)\n",
    ),
    Fault(
        "victim is the oldest",
        "room",
        "return max(candidates, key=self._queues.place",
        "return min(candidates, key=self._queues.place",
    ),
    Fault(
        "protected ones are victims",
        "room",
        "for r in self._queues.running.values() if not self.is_protected(r)]",
        "for r in self._queues.running.values()]",
    ),
    Fault(
        "preemptions are not counted",
        "room",
        "        request.timings.num_preemptions += 1\n",
        "",
    ),
    Fault(
        "progress kept on preemption",
        "room",
        "        request.num_computed_tokens = request.num_written_tokens = 0\n",
        "",
    ),
    Fault(
        "lost tokens forgotten",
        "room",
        "request.num_lost_tokens = max(request.num_lost_tokens, num_lost)",
        "request.num_lost_tokens = 0",
    ),
    Fault(
        "losses of an earlier preemption forgotten",
        "room",
        "max(request.num_lost_tokens, num_lost)",
        "num_lost",
    ),
    Fault(
        "preempted request does not publish again",
        "room",
        "        request.num_published_blocks = 0\n",
        "",
    ),
    Fault(
        "newcomers take what was just lost",
        "scheduler",
        "        if not lacks_blocks:  #",
        "        if True:  #",
    ),
]

ORDER = [
    Fault(
        "admission overtakes",
        "admission",
        "                return True  # nobody",
        "                continue  # nobody",
    ),
    Fault(
        "queue kept in order of insertion",
        "queues",
        "insort(self.waiting, request, key=self.place)",
        "self.waiting.append(request)",
    ),
    Fault(
        "budget exceeded",
        "budget",
        "self._num_tokens -= count",
        "pass",
    ),
    Fault(
        "who needs most goes first",
        "scheduler",
        "ready.sort(key=_num_uncomputed)",
        "ready.sort(key=_num_uncomputed, reverse=True)",
    ),
    Fault(
        "chunks although they are off",
        "budget",
        "if wanted > self._num_tokens and not self._config.enable_chunked_prefill:",
        "if False:",
    ),
    Fault(
        "wrong sign of ageing",
        "policy",
        "request.priority + request.arrival",
        "request.priority - request.arrival",
    ),
    Fault(
        "one place too many",
        "admission",
        "len(running) == most:",
        "len(running) == most + 1:",
    ),
    Fault(
        "static batch is chosen anew while it runs",
        "policy",
        "    if num_running:\n",
        "    if False:\n",
    ),
    Fault(
        "static batch is not closed",
        "queues",
        "if chosen is None or r.request_id in chosen",
        "",
    ),
    Fault(
        "a prefix is not waited for",
        "admission",
        "        if self._next_missing_hash(request) in computing:\n            return True\n",
        "",
    ),
    Fault(
        "a prefix begun in this step is not waited for",
        "admission",
        "            computing.update(uncomputed_hashes(request, config))\n",
        "",
    ),
    Fault(
        "who waits for a prefix blocks others",
        "admission",
        "                continue  # its prefix",
        "                break  # its prefix",
    ),
]

ENDS = [
    Fault(
        "ended request keeps its blocks",
        "room",
        "        self._pool.release(request.block_table)\n",
        "",
    ),
    Fault(
        "aborted request stays in the queue",
        "queues",
        "        self.waiting.remove(request)\n",
        "",
    ),
    Fault(
        "two final updates",
        "scheduler",
        "                updates.append(update)\n",
        "                updates += [update, update]\n",
    ),
    Fault(
        "failed row is published",
        "scheduler",
        "            if result.error is not None:\n",
        "            if result.error is not None:\n"
        "                request.num_written_tokens += len(item.token_ids)\n"
        "                self._publisher.publish(request)\n",
    ),
    Fault("too little is accepted", "scheduler", "        check_whole(batch, output)\n", ""),
    Fault(
        "one token too many",
        "accept",
        "if count == num_left:",
        "if count == num_left + 1:",
    ),
    Fault(
        "stop token overlooked",
        "accept",
        "if sampled.token_id in request.stop_token_ids:",
        "if False:",
    ),
    Fault(
        "scores told again",
        "scheduler",
        "max(0, request.num_scored_tokens - item.num_computed_tokens)",
        "0",
    ),
    Fault(
        "time between steps lost",
        "scheduler",
        "            request.timings.account(Part.STALLED, now)  # between",
        "            # between",
    ),
    Fault(
        "time in the queue lost",
        "queues",
        "        self.clock.leave(request, now)\n",
        "",
    ),
    Fault(
        "recomputing is called a prompt",
        "latency",
        "    if item.num_computed_tokens < request.num_lost_tokens:\n",
        "    if False:\n",
    ),
    Fault(
        "company of prompts overlooked",
        "latency",
        "        if has_prompts and part is decode:\n",
        "        if False:\n",
    ),
    Fault(
        "preempted time is called waiting",
        "latency",
        "        if timings.num_preemptions > 0:\n",
        "        if False:\n",
    ),
    Fault(
        "want of blocks is called waiting",
        "latency",
        "        timings.account(Part.BLOCKS, min(now, timings.accounted_until + blocked_s))\n",
        "",
    ),
    Fault(
        "missing scores are accepted",
        "accept",
        "if is_whole and len(result.scores) == len(item.prompt_logprob_targets):",
        "if is_whole:",
    ),
]

BUDGET_IN_TIME = [
    Fault(
        "the price is not asked",
        "budget",
        "if self._step_time is None or not self._has_streams:",
        "if True:",
    ),
    Fault(
        "a target without streams",
        "budget",
        "if self._step_time is None or not self._has_streams:",
        "if self._step_time is None:",
    ),
    Fault("a chunk too long by one", "budget", "return fitting\n", "return too_many\n"),
    Fault(
        "half of the time is left",
        "budget",
        "middle = (fitting + too_many) // 2",
        "too_many = middle = (fitting + too_many) // 2",
    ),
    Fault(
        "a prompt beside slow streams starves",
        "budget",
        "0 if self._has_chunk else 1, count",
        "0, count",
    ),
    Fault(
        "a step goes on after a chunk that was cut",
        "budget",
        "self._is_closed = count < wanted",
        "self._is_closed = False",
    ),
    Fault(
        "streams leave chunks no share",
        "budget",
        "self._config.target_itl_steps * streams_s",
        "streams_s",
    ),
    Fault(
        "a prompt that goes on is priced with its first part only",
        "budget",
        "spent = [shape_of(*each) for each in self._spent]",
        "spent = [shape_of(*each) for each in self._spent[:1]]",
    ),
    Fault(
        "what is spent is not priced",
        "budget",
        "        self._spent.append((request, num_past, count, sources))\n",
        "",
    ),
]

FAIRNESS = [
    Fault(
        "clients do not take turns",
        "fairness",
        "if self._level is None or not _has_several([r.tenant for r in waiting]):",
        "if True:",
    ),
    Fault(
        "places given back are not counted",
        "fairness",
        "        self._num_running[request.tenant] -= 1\n",
        "",
    ),
    Fault(
        "turns are not remembered",
        "fairness",
        "        self._last_turn[request.tenant] = self._num_turns\n",
        "        self._last_turn[request.tenant] = 0\n",
    ),
    Fault(
        "a place is claimed back",
        "fairness",
        "self._num_running[request.tenant] + 1 >= self",
        "self._num_running[request.tenant] >= self",
    ),
    Fault(
        "a place is taken from who is more urgent",
        "fairness",
        "if r.tenant == richest and self._level(r) == own]",
        "if r.tenant == richest]",
    ),
    Fault(
        "nobody gives way",
        "scheduler",
        "            self._admission.even_out()\n",
        "            pass\n",
    ),
    Fault(
        "the first gives way",
        "admission",
        "self._room.preempt(max(victims",
        "self._room.preempt(min(victims",
    ),
    Fault(
        "a protected request gives way",
        "admission",
        "victims = [r for r in others if not self._room.is_protected(r)]",
        "victims = others",
    ),
    Fault(
        "only a place is a need, not blocks",
        "admission",
        "return len(self._queues.running) >= most or not has_room",
        "return len(self._queues.running) >= most",
    ),
]

EVICTION = [
    Fault(
        "head of a prefix evicted before its tail",
        "block_pool",
        "for block in reversed(blocks):",
        "for block in blocks:",
    ),
    Fault(
        "most recently freed evicted first",
        "free_blocks",
        "block, _ = self._levels[level].popitem(last=False)",
        "block, _ = self._levels[level].popitem(last=True)",
    ),
    Fault(
        "evicts although empty blocks are there",
        "block_pool",
        "self._free.add(block, EMPTY, is_next=True)",
        "self._free.add(block, DEFAULT_PRIORITY)",
    ),
]

MISSES = [
    Fault(
        "evicted is called never seen",
        "misses",
        "evicted is not None or other == block",
        "False",
    ),
    Fault(
        "dropped is called evicted",
        "misses",
        "if evicted is EvictionReason.DROPPED:",
        "if False:",
    ),
    Fault("another token is not looked for", "misses", "if other is not None:", "if False:"),
    Fault("salts are not told", "misses", "!= parent:", "is False:"),
    Fault(
        "found again, and yet evicted",
        "block_pool",
        "            self._evicted.pop(block_hash, None)\n",
        "",
    ),
]

ACCEPTED = [
    Fault(
        "tokens after a stop token are kept",
        "accept",
        "return tokens[:count], FinishReason.STOP",
        "return tokens, FinishReason.STOP",
    ),
    Fault(
        "tokens beyond the limit are kept",
        "accept",
        "return tokens[:count], FinishReason.LENGTH",
        "return tokens, FinishReason.LENGTH",
    ),
    Fault(
        "a stop token counts only at the end of a run",
        "accept",
        "if sampled.token_id in request.stop_token_ids:",
        "if count == len(tokens) and sampled.token_id in request.stop_token_ids:",
    ),
    Fault(
        "the limit counts only at the end of a run",
        "accept",
        "if count == num_left:",
        "if count == len(tokens) == num_left:",
    ),
    Fault(
        "a stop token before the limit is called the limit",
        "accept",
        "return tokens[:count], FinishReason.STOP",
        "return tokens[:count], FinishReason.LENGTH",
    ),
    Fault(
        "the stop token itself is dropped",
        "accept",
        "return tokens[:count], FinishReason.STOP",
        "return tokens[: count - 1], FinishReason.STOP",
    ),
    Fault(
        "earlier outputs do not count",
        "accept",
        "request.max_tokens - (len(request.token_ids) - len(request.prompt_token_ids))",
        "request.max_tokens",
    ),
    Fault(
        "a run that is not its drafts is believed",
        "accept",
        "    return all(t.token_id == draft",
        "    return True or all(t.token_id == draft",
    ),
    Fault(
        "rejected drafts count as computed",
        "scheduler",
        "            request.num_computed_tokens -= num_wrong\n",
        "",
    ),
    Fault(
        "rejected drafts count as written",
        "scheduler",
        "            request.num_written_tokens -= num_wrong\n",
        "",
    ),
    Fault(
        "the token after the drafts counts as one of them",
        "scheduler",
        "(len(result.tokens) - 1)",
        "len(result.tokens)",
    ),
    Fault(
        "blocks of rejected drafts are kept",
        "scheduler",
        "            self._room.trim(request)\n",
        "",
    ),
    Fault(
        "all drafts are sampled as the first",
        "plan",
        "sampling_input(request, drafts[:count])",
        "sampling_input(request)",
    ),
    Fault(
        "drafts are sampled one place late",
        "plan",
        "sampling_input(request, drafts[:count])",
        "sampling_input(request, drafts[: count - 1])",
    ),
    Fault(
        "bad words do not look at drafts",
        "plan",
        "[*request.token_ids, *drafts] if drafts else request.token_ids",
        "request.token_ids",
    ),
    Fault(
        "more drafts than outputs", "speculate", "r.num_outputs_left - 1]", "r.num_outputs_left]"
    ),
    Fault(
        "drafts for who is about to end",
        "speculate",
        "r.num_outputs_left > 1",
        "True",
    ),
    Fault("drafts beyond the budget", "speculate", "min(count, self.num_left)", "count"),
    Fault("each draft has the whole room", "speculate", "        self.num_left -= count\n", ""),
    Fault(
        "drafts without blocks",
        "speculate",
        "return min(count, len(request.block_table) * config.block_size - request.num_tokens)",
        "return count",
    ),
    Fault(
        "more blocks for drafts than are free",
        "speculate",
        "max(0, min(missing, pool.num_free))",
        "max(0, missing)",
    ),
    Fault(
        "drafts asked for that nobody can use",
        "speculate",
        "max(0, request.num_outputs_left - 2)",
        "request.num_outputs_left",
    ),
    Fault(
        "tokens are sent to the proposer again",
        "in_flight",
        "        request.num_sent_tokens = drafting.start + len(drafting.token_ids)\n",
        "        pass\n",
    ),
    Fault(
        "another proposer is taken for the last one",
        "speculate",
        "start = request.num_sent_tokens if ask.method == request.sent_to else 0",
        "start = request.num_sent_tokens",
    ),
    Fault(
        "a proposer is not told of a new beginning",
        "room",
        "        request.num_sent_tokens = 0\n",
        "",
    ),
    Fault("the policy is not told of ends", "scheduler", "policy.forget(request)", "pass"),
]

IN_FLIGHT = [
    Fault(
        "a result from before a preemption brings KV",
        "scheduler",
        "        if item.epoch == request.timings.num_preemptions:\n            if request",
        "        if True:\n            if request",
    ),
    Fault(
        "the epoch is not told",
        "plan",
        "        request.timings.num_preemptions,\n",
        "        0,\n",
    ),
    Fault(
        "a result of an ended request is an error",
        "scheduler",
        "                continue  # it ended",
        "                raise AssertionError  # it ended",
    ),
    Fault(
        "admitted while tokens of it are unknown",
        "admission",
        "            if request.num_in_flight:\n                return False  # nobody",
        "            if False:\n                return False  # nobody",
    ),
    Fault(
        "steps in flight are not counted down",
        "in_flight",
        "    request.num_in_flight -= 1\n",
        "",
    ),
    Fault(
        "placeholders are not counted",
        "in_flight",
        "        request.num_pending_tokens += 1\n",
        "        pass\n",
    ),
    Fault(
        "placeholders stay",
        "in_flight",
        "        request.num_pending_tokens -= 1\n",
        "        pass\n",
    ),
    Fault(
        "a request goes on beside its drafts",
        "plan",
        "if request.has_drafts_in_flight or not request.num_outputs_left:",
        "if not request.num_outputs_left:",
    ),
    Fault(
        "a request goes on beyond its limit",
        "plan",
        "if request.has_drafts_in_flight or not request.num_outputs_left:",
        "if request.has_drafts_in_flight:",
    ),
    Fault(
        "a request goes on without its history",
        "plan",
        "return not (depends and request.num_pending_tokens)",
        "return True",
    ),
    Fault(
        "who waits for drafts waits for ever",
        "in_flight",
        "        request.has_drafts_in_flight = False  #",
        "        pass  #",
    ),
    Fault(
        "drafts beside a placeholder",
        "speculate",
        "        and not r.num_pending_tokens\n",
        "",
    ),
    Fault(
        "drafts asked for beside two unknown tokens",
        "speculate",
        "item.rows and request.num_pending_tokens <= 1",
        "item.rows",
    ),
    Fault(
        "the stream does not count placeholders",
        "plan",
        "return num_known + request.num_pending_tokens + len(drafts)",
        "return num_known + len(drafts)",
    ),
    Fault(
        "drafts count as no outputs",
        "plan",
        "return num_known + request.num_pending_tokens + len(drafts)",
        "return num_known + request.num_pending_tokens",
    ),
    Fault(
        "bad words are forgotten",
        "plan",
        "params.min_tokens and not request.bad_word_ids and not",
        "params.min_tokens and not",
    ),
    Fault(
        "what is in flight is published",
        "prefix",
        "min(request.num_written_tokens, num_exact) //",
        "request.num_computed_tokens //",
    ),
    Fault(
        "no room for placeholders",
        "room",
        "        num_tokens = request.num_tokens + request.num_pending_tokens\n",
        "        num_tokens = request.num_tokens\n",
    ),
    Fault(
        "computed again with the placeholder of another step",
        "scheduler",
        "items.append(resolved(request, item))",
        "items.append(item)",
    ),
    Fault(
        "computed again in blocks that were given away",
        "scheduler",
        "            if item.epoch == request.timings.num_preemptions:\n                items",
        "            if True:\n                items",
    ),
    Fault(
        "who lost its blocks is in flight for ever",
        "scheduler",
        "                arrive(request, item)  # and brings nothing\n",
        "                pass\n",
    ),
    Fault(
        "time of who ended is looked for",
        "latency",
        "computed = running.get(item.request_id)",
        "computed = running[item.request_id]",
    ),
    Fault(
        "who waits for its results is overtaken",
        "admission",
        "            if request.num_in_flight:\n                return False  # nobody",
        "            if request.num_in_flight:\n                continue  # nobody",
    ),
    Fault(
        "nobody goes on beside a step in flight",
        "scheduler",
        "if not r.num_in_flight or may_go_on(r)]",
        "if not r.num_in_flight]",
    ),
    Fault(
        "a chunk waits for the one in flight",
        "plan",
        "return not (depends and request.num_pending_tokens)",
        "return not depends and request.num_pending_tokens > 0",
    ),
    Fault(
        "admitted while a chunk of it is in flight",
        "admission",
        "            if request.num_in_flight:\n                return False  # nobody",
        "            if request.num_pending_tokens:\n                return False  # nobody",
    ),
    Fault(
        "nobody is admitted beside a step in flight",
        "admission",
        "if not queues.waiting or budget.is_spent",
        "if any(r.num_in_flight for r in running.values()) or budget.is_spent",
    ),
    Fault(
        "a place is given to who cannot take it",
        "admission",
        "        if request.num_in_flight:\n            return False  # it cannot",
        "        if False:\n            return False  # it cannot",
    ),
    Fault(
        "who waits for results keeps a share of the budget",
        "scheduler",
        "        ready.sort(key=_num_uncomputed)\n",
        "        ready.sort(key=_num_uncomputed)\n"
        "        budget._num_tokens -= min(1, len(self.running) - len(ready))\n",
    ),
    Fault(
        "who waits for results keeps newcomers away",
        "scheduler",
        "        if not lacks_blocks:  #",
        "        if not lacks_blocks and len(counts) == len(self.running):  #",
    ),
]

FAST_FORWARD = [
    Fault(
        "a run goes on beyond an end", "scheduler", "for r in running) - 1\n", "for r in running)\n"
    ),
    Fault(
        "a run goes on without blocks",
        "fast_forward",
        "    if not lacks_room(most):",
        "    if True:",
    ),
    Fault(
        "a run takes a block too many",
        "fast_forward",
        "        return taken > num_free",
        "        return taken > num_free + 1",
    ),
    Fault(
        "a block is taken a step late",
        "fast_forward",
        "taken = len(request.block_table) * size + 1 - num_tokens",
        "taken = len(request.block_table) * size + 2 - num_tokens",
    ),
    Fault(
        "a block is published a step late",
        "fast_forward",
        "full = -num_tokens % size",
        "full = -num_tokens % size + 1",
    ),
    Fault(
        "only the first block of a run is published",
        "fast_forward",
        "for step in range(full, num_steps, size)",
        "for step in range(full, num_steps, num_steps)",
    ),
    Fault(
        "blocks are published before they are taken",
        "fast_forward",
        "    events.sort(key=itemgetter(0, 1, 2))\n",
        "    events.sort(key=lambda e: (e.step, not e.is_full))\n",
    ),
    Fault(
        "blocks are taken in the order of admission",
        "fast_forward",
        "BlockEvent(step, False, place, request)",
        "BlockEvent(step, False, (-index,), request)",
    ),
    Fault(
        "a run publishes nothing",
        "fast_forward",
        "        if publishes:\n",
        "        if not publishes:\n",
    ),
    Fault(
        "prompts are taken for streams",
        "fast_forward",
        "return request.num_uncomputed_tokens == 1 and request.num_output_tokens > 0",
        "return True",
    ),
    Fault(
        "a run takes no time of the queue",
        "scheduler",
        "        for time in (start_time, *end_times[:-1]):\n",
        "        for time in ():\n",
    ),
    Fault(
        "a run although somebody may be admitted",
        "scheduler",
        "or self._admission.is_blocked() is None:",
        "or False:",
    ),
    Fault(
        "a run although a client may have to give a place",
        "admission",
        "        if self._queues.is_contended():\n            return None",
        "        if False:\n            return None",
    ),
    Fault(
        "a run although a whole prompt waits",
        "admission",
        "        if not config.enable_chunked_prefill:\n            return None",
        "        if False:\n            return None",
    ),
    Fault(
        "a run beside a step in flight",
        "fast_forward",
        "    if request.num_in_flight:\n        return False\n",
        "",
    ),
    Fault(
        "what a run wrote is not written",
        "fast_forward",
        "request.num_computed_tokens = request.num_written_tokens = num_computed",
        "request.num_computed_tokens = num_computed",
    ),
    Fault(
        "the last token of a run is missing",
        "fast_forward",
        "[token_id] * (num_computed + 1 - request.num_tokens)",
        "[token_id] * (num_computed - request.num_tokens)",
    ),
    Fault(
        "a run is one gap",
        "latency",
        "timings.token_times.extend(end_times)",
        "timings.token_times.extend(end_times[-1:] * len(end_times))",
    ),
    Fault(
        "a run's time is lost",
        "latency",
        "    timings.accounted_until = end_times[-1]\n",
        "",
    ),
]

FAULTS = [*BLOCK_POOL, *PREFIX, *PLAN, *ROOM, *ORDER, *ENDS, *BUDGET_IN_TIME]
FAULTS += [*FAIRNESS, *EVICTION, *MISSES, *ACCEPTED, *IN_FLIGHT, *FAST_FORWARD, *REUSE]
