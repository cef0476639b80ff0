"""Faults to plant in what users of the cache may count on."""

from scheduler.mutants import Fault

PIN_FAULTS = [
    Fault(
        "a lost pin",
        "block_pool",
        "        if level == PINNED:\n            self._kept[block] = None\n",
        "        if False:\n            self._kept[block] = None\n",
    ),
    Fault(
        "a pin ends all pins of its blocks",
        "retention",
        "self._pool.set_level(block_hash, self._pins.level(block_hash), is_over=is_over)",
        "self._pool.set_level(\n                block_hash,\n"
        "                hold.level if self._pins.is_live(hold) else None,\n"
        "                is_over=is_over,\n            )",
    ),
    Fault(
        "the last pin of a block counts, not the highest",
        "pins",
        "return max((hold.level for hold in self._of_hash.get(block_hash, ())), default=None)",
        "return next((h.level for h in self._of_hash.get(block_hash, ())[::-1]), None)",
    ),
    Fault("a ttl that never ends", "retention", "while self._ends and", "while False and"),
    Fault("a ttl that ends late", "retention", "self._ends[0][0] <= now", "self._ends[0][0] < now"),
    Fault(
        "a renewed pin ends when it would have",
        "retention",
        "            if hold.end == end and self._pins.is_live(hold):",
        "            if self._pins.is_live(hold):",
    ),
    Fault(
        "ended pins pile up",
        "retention",
        "            self._ends = list(live.values())\n",
        "",
    ),
    Fault(
        "what is over is evicted last",
        "block_pool",
        "self._free.add(block, OVER)",
        "self._let_go(block)",
    ),
    Fault(
        "a drop that frees a block in use",
        "block_pool",
        "        if not is_owned:\n            self._empty(block)\n",
        "        self._empty(block)\n",
    ),
    Fault(
        "what is dropped can be found",
        "block_pool",
        "        self._forget(block, EvictionReason.DROPPED)\n        return is_owned\n",
        "        return is_owned\n",
    ),
    Fault(
        "a drop of what another pin keeps",
        "retention",
        "for block_hash in reversed(hashes) if not self._pins.is_held(block_hash)]",
        "for block_hash in reversed(hashes)]",
    ),
    Fault(
        "a drop leaves its pin",
        "retention",
        "        if hold is not None:\n            self._end(hold)\n        goes",
        "        goes",
    ),
    Fault(
        "a look-up that touches what is evicted next",
        "retention",
        "        num_blocks = len(self._pool.find(text.hashes))\n",
        "        num_blocks = len(self._pool.find(text.hashes))\n"
        "        self._pool.retain(self._pool.find(text.hashes))\n"
        "        self._pool.release(self._pool.find(text.hashes))\n",
    ),
    Fault(
        "a look-up promises the last token",
        "retention",
        "(text.num_tokens - 1) // self._block_size",
        "text.num_tokens // self._block_size",
    ),
    Fault(
        "another tenant's pin by its text",
        "pins",
        "if hold.tenant == tenant and len(",
        "if len(",
    ),
    Fault(
        "another tenant's pin by its number",
        "pins",
        "            return None if holds is None else holds.get(pin)\n",
        "            return next((h[pin] for h in self._of_tenant.values() if pin in h), None)\n",
    ),
    Fault(
        "a list of everybody's pins",
        "pins",
        "        return [] if holds is None else list(holds.values())\n",
        "        return self.live\n",
    ),
    Fault(
        "a shared block counts twice",
        "pins",
        "            self._num_kept[tenant] += not self._is_held_by(tenant, block_hash)\n",
        "            self._num_kept[tenant] += 1\n",
    ),
    Fault("no quota", "pins", "if own + new > self.quota:", "if False:"),
    Fault("no bound of all", "pins", "if len(self._of_hash) + added > self.most:", "if False:"),
    Fault(
        "no room for the longest request",
        "pins",
        "min(config.num_blocks // ALL_SHARE, config.num_blocks - longest)",
        "config.num_blocks // ALL_SHARE",
    ),
    Fault(
        "a refused pin is there",
        "retention",
        "            self._pins.check_room(tenant, text)\n"
        "            hold = Hold(tenant, text, now)\n            self._pins.begin(hold)\n",
        "            hold = Hold(tenant, text, now)\n            self._pins.begin(hold)\n"
        "            self._pins.check_room(tenant, text)\n",
    ),
    Fault(
        "pins give way to whoever waits",
        "room",
        "        if not self._queues.running:\n            count",
        "        if True:\n            count",
    ),
    Fault(
        "pins never give way",
        "room",
        "            self._pool.give_way(count, {*cached",
        "            0 and self._pool.give_way(count, {*cached",
    ),
    Fault(
        "what a request reuses gives way to it",
        "block_pool",
        "[block for block in self._kept if block not in beside]",
        "list(self._kept)",
    ),
    Fault(
        "all pins give way",
        "block_pool",
        "for block in others[: max(0, count)]:",
        "for block in others:",
    ),
    Fault(
        "priorities are not heeded",
        "block_pool",
        "            self._free.add(block, level)\n",
        "            self._free.add(block, DEFAULT_PRIORITY)\n",
    ),
    Fault(
        "the next page begins anew",
        "retention",
        "if h.number > message.after]",
        "if h.number >= message.after]",
    ),
    Fault(
        "a kept block is handed out when it is reused and given back",
        "block_pool",
        "            self._kept.pop(block, None)\n            self._ref_counts[block] += 1\n",
        "            self._ref_counts[block] += 1\n",
    ),
]
