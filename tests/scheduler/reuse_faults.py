"""Faults to plant in the reuse of texts: what a hand may slip on."""

from scheduler.mutants import Fault

REUSE = [
    Fault(
        "what is approximate is published",
        "prefix",
        "num_exact = request.num_exact_tokens  #",
        "num_exact = request.num_tokens  #",
    ),
    Fault(
        "blocks behind what is reused have hashes",
        "prefix",
        "request.num_exact_tokens - size + 1, size):",
        "request.num_tokens - size + 1, size):",
    ),
    Fault(
        "a text begun is published whole",
        "prefix",
        "last = config.num_blocks_for(end) if is_whole else end // size",
        "last = len(source.blocks)",
    ),
    Fault(
        "a text's last block is never published",
        "prefix",
        "last = config.num_blocks_for(end) if is_whole else end // size",
        "last = end // size",
    ),
    Fault(
        "texts do not depend on the salt",
        "reuse",
        "root_hash(config.cache_namespace, salt)",
        'root_hash(config.cache_namespace, b"")',
    ),
    Fault("moved to another place", "reuse", "end - place, start)", "end - place, start + 1)"),
    Fault("moved from another place", "reuse", "start - place, end - place,", "0, end - start,"),
    Fault(
        "moved before it is there",
        "plan",
        "    if source is not None:\n        return plan_source(request, source, count)\n",
        "",
    ),
    Fault("moved twice", "reuse", "    if request.has_moved:\n        return ()\n", ""),
    Fault(
        "one place of a text is enough",
        "reuse",
        "        for place in source.places:\n",
        "        for place in source.places[:1]:\n",
    ),
    Fault("reused tokens are computed", "reuse", "        start = reused.end\n", ""),
    Fault(
        "what is reused counts as lacking",
        "reuse",
        "return num_left - sum(",
        "return num_left - 0 * sum(",
    ),
    Fault(
        "a text goes on where it began",
        "reuse",
        "    start = source.num_computed\n",
        "    start = 0\n",
    ),
    Fault(
        "a text that is there in part is there",
        "reuse",
        "num_there = min(len(blocks) * config.block_size, len(token_ids))",
        "num_there = len(token_ids) if blocks else 0",
    ),
    Fault(
        "texts are not retained",
        "room",
        "        for source in sources:\n            self._pool.retain(source.blocks)\n",
        "",
    ),
    Fault(
        "texts are never given back",
        "room",
        "            self._pool.release(source.blocks)\n",
        "            pass\n",
    ),
    Fault(
        "texts are given back too early",
        "scheduler",
        "    if item.moves:\n        request.has_moved = True\n",
        "    if item.moves:\n        request.has_moved = True\n        request.sources = []\n",
    ),
    Fault(
        "room for texts is not asked for",
        "room",
        "            needed += len(source.hashes) - len(source.blocks)\n",
        "",
    ),
    Fault(
        "what was moved counts as moved after a preemption",
        "room",
        "        request.has_moved = False\n",
        "",
    ),
    Fault(
        "a text that another one computes is computed again",
        "admission",
        "return any(h in computing for s in sources for h in s.hashes[len(s.blocks) :][:1])",
        "return False",
    ),
    Fault(
        "a text's tokens count as the request's own",
        "scheduler",
        "        request.sources[item.source].num_computed += len(item.token_ids)\n        return",
        "        request.num_computed_tokens += len(item.token_ids)\n        return",
    ),
]
