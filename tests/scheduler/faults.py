"""Faults to plant: what a hand may slip on in a scheduler, each as a change of its text."""

from scheduler.mutants import Fault

BLOCK_POOL = [
    Fault(
        "salt left out of the root hash",
        "block_pool",
        "namespace, salt)\n    ret",
        "namespace)\n    ret",
    ),
    Fault("hash without its parent", "block_pool", "sha256(parent + struct", "sha256(struct"),
    Fault("stale hash kept on allocation", "block_pool", "            self._forget(block)\n", ""),
    Fault("reused block stays free", "block_pool", "            self._free.pop(block, None)\n", ""),
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
        "                self._free[block] = None\n",
        "                return\n",
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
        "num_full = request.num_computed_tokens //",
        "num_full = request.num_tokens //",
    ),
    Fault(
        "scored prompt reused",
        "prefix",
        "if not config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:",
        "if not config.enable_prefix_caching:",
    ),
    Fault(
        "cache cannot be turned off",
        "prefix",
        "    if not config.enable_prefix_caching:\n        return\n",
        "",
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
        "request.num_output_tokens < request.sampling",
        "request.num_output_tokens <= request.sampling",
    ),
    Fault("bad words read from the prompt", "plan", "size <= num_output and ", ""),
    Fault("token scored that was given", "plan", "[start + 1 : end + 1]", "[start:end]"),
    Fault(
        "samples before the last token",
        "plan",
        "if end == request.num_tokens else",
        "if end >= request.num_tokens - 1 else",
    ),
    Fault(
        "stream not advanced",
        "plan",
        "num_output_tokens=request.num_output_tokens",
        "num_output_tokens=0",
    ),
]

ROOM = [
    Fault(
        "block table one block short",
        "scheduler",
        "return self.config.num_blocks_for(request.num_tokens)",
        "return self.config.num_blocks_for(request.num_tokens - 1)",
    ),
    Fault(
        "allocates before it retains",
        "scheduler",
        "        self.pool.retain(cached)  # first, or allocation could take what is about to be "
        "reused\n        request.block_table = cached + self.pool.allocate(needed)\n",
        """        request.block_table = cached + self.pool.allocate(needed)
        self.pool.retain(cached)
""",
    ),
    Fault(
        "victim is the oldest",
        "scheduler",
        "return max(candidates, key=self._place",
        "return min(candidates, key=self._place",
    ),
    Fault(
        "protected ones are victims",
        "scheduler",
        "for r in self.running.values() if not self._is_protected(r)]",
        "for r in self.running.values()]",
    ),
    Fault(
        "preemptions are not counted",
        "scheduler",
        "        request.timings.num_preemptions += 1\n",
        "",
    ),
    Fault(
        "progress kept on preemption", "scheduler", "        request.num_computed_tokens = 0\n", ""
    ),
    Fault(
        "lost tokens forgotten",
        "scheduler",
        "request.num_lost_tokens = max(request.num_lost_tokens, request.num_computed_tokens)",
        "request.num_lost_tokens = 0",
    ),
    Fault(
        "losses of an earlier preemption forgotten",
        "scheduler",
        "max(request.num_lost_tokens, request.num_computed_tokens)",
        "request.num_computed_tokens",
    ),
    Fault(
        "preempted request does not publish again",
        "scheduler",
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
        "scheduler",
        "                return True  # nobody",
        "                continue  # nobody",
    ),
    Fault(
        "queue kept in order of insertion",
        "scheduler",
        "insort(self.waiting, request, key=self._place)",
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
        "key=lambda r: r.num_uncomputed_tokens",
        "key=lambda r: -r.num_uncomputed_tokens",
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
        "scheduler",
        "len(self.running) == most:",
        "len(self.running) == most + 1:",
    ),
    Fault(
        "static batch is chosen anew while it runs",
        "policy",
        "    if num_running:\n",
        "    if False:\n",
    ),
    Fault(
        "static batch is not closed",
        "scheduler",
        "if chosen is None or r.request_id in chosen",
        "",
    ),
    Fault(
        "a prefix is not waited for",
        "scheduler",
        "            if self._next_missing_hash(request) in computing:",
        "            if False:",
    ),
    Fault(
        "a prefix begun in this step is not waited for",
        "scheduler",
        "            computing.update(uncomputed_hashes(request, self.config))\n",
        "",
    ),
    Fault(
        "who waits for a prefix blocks others",
        "scheduler",
        "                continue  # its prefix",
        "                break  # its prefix",
    ),
]

ENDS = [
    Fault(
        "ended request keeps its blocks",
        "scheduler",
        "        self.pool.release(request.block_table)\n",
        "",
    ),
    Fault(
        "aborted request stays in the queue",
        "scheduler",
        "            self.waiting.remove(request)\n            self._queue",
        "            self._queue",
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
        "                request.num_computed_tokens += len(item.token_ids)\n"
        "                publish_full_blocks(request, self.config, self.pool)\n",
    ),
    Fault("too little is accepted", "scheduler", "        check_whole(batch, output)\n", ""),
    Fault(
        "one token too many",
        "accept",
        "request.num_output_tokens >= request.max_tokens",
        "request.num_output_tokens > request.max_tokens",
    ),
    Fault(
        "stop token overlooked",
        "accept",
        "if tokens and tokens[-1].token_id in request.stop_token_ids:",
        "if False:",
    ),
    Fault(
        "scores told again",
        "scheduler",
        "max(0, request.num_lost_tokens - item.num_computed_tokens)",
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
        "scheduler",
        "        self._queue_clock.leave(request, now)\n        if request.timings.first",
        "        if request.timings.first",
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
        "        if part is Part.DECODE and has_prompts:\n",
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
        "        if given != asked and request_id not in failed:\n",
        "        if False:\n",
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
        "        self._spent.append((request, num_past, count))\n",
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
    Fault("nobody gives way", "scheduler", "            self._even_out()\n", "            pass\n"),
    Fault(
        "the first gives way",
        "scheduler",
        "            self._preempt(max(victims, key=self._place))",
        "            self._preempt(min(victims, key=self._place))",
    ),
    Fault(
        "a protected request gives way",
        "scheduler",
        "victims = [r for r in others if not self._is_protected(r)]",
        "victims = others",
    ),
    Fault(
        "only a place is a need, not blocks",
        "scheduler",
        "return len(self.running) >= most or not self._has_room(request, cached)",
        "return len(self.running) >= most",
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
        "block_pool",
        "popitem(last=False)[0]",
        "popitem(last=True)[0]",
    ),
    Fault(
        "evicts although empty blocks are there",
        "block_pool",
        "self._free.move_to_end(block, last=False)",
        "pass",
    ),
]

MISSES = [
    Fault("evicted is called never seen", "misses", "was_evicted or other == block", "False"),
    Fault("another token is not looked for", "misses", "if other is not None:", "if False:"),
    Fault("salts are not told", "misses", "!= parent:", "is False:"),
    Fault(
        "found again, and yet evicted",
        "block_pool",
        "            self._evicted.pop(block_hash, None)\n",
        "",
    ),
]

FAULTS = [*BLOCK_POOL, *PREFIX, *PLAN, *ROOM, *ORDER, *ENDS, *BUDGET_IN_TIME]
FAULTS += [*FAIRNESS, *EVICTION, *MISSES]
