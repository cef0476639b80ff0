"""Faults to plant in the tiers: what a hand may slip on. Those in the module "mover" are the
executor's, the others the scheduler's."""

from scheduler.mutants import Fault

TIERS = [
    Fault(
        "found before it is there",
        "tiers",
        "        self._arriving[key] = self._now + WAIT_S\n",
        "        self._arriving[key] = self._now\n        self._ram.put(key, slot, tenant)\n",
    ),
    Fault(
        "what failed counts as there",
        "tiers",
        "if index < done and is_valid and",
        "if is_valid and",
    ),
    Fault(
        "what is loaded may fall out meanwhile",
        "admission",
        "            self._tiers.hold(request, load.keys)",
        "            pass",
    ),
    Fault(
        "loaded into other blocks",
        "admission",
        "table[load.first : load.first + len(load.keys)]",
        "table[load.first + 1 :][: len(load.keys)] or table[:1]",
    ),
    Fault(
        "loaded in another order",
        "tiers",
        "slots = tuple([self._ram.slot(key) for key in keys])",
        "slots = tuple([self._ram.slot(key) for key in reversed(keys)])",
    ),
    Fault(
        "a text's blocks come for the request",
        "admission",
        "table = request.block_table if load.source is None else load.source.blocks",
        "table = request.block_table",
    ),
    Fault(
        "what is loaded counts as written",
        "admission",
        "request.num_written_tokens = self._num_past(request, cached)\n",
        "request.num_written_tokens = self._num_past(request, cached, loads)\n",
    ),
    Fault(
        "what is loaded is never written",
        "admission",
        "request.num_loaded_tokens = request.num_computed_tokens if loads else 0",
        "request.num_loaded_tokens = 0",
    ),
    Fault(
        "a text that is loaded is computed",
        "admission",
        "source.num_computed = min((first + count) * size, len(source.token_ids))",
        "pass",
    ),
    Fault(
        "a text's last block is full",
        "admission",
        "min((first + count) * size, len(source.token_ids))",
        "(first + count) * size",
    ),
    Fault(
        "a text that was loaded is not published",
        "scheduler",
        "                self._publisher.publish_text(request, source, source.num_computed)\n",
        "                pass\n",
    ),
    Fault(
        "more of RAM is held than half",
        "tiers",
        "self._ram.num_slots // 2 - self._ram.num_held",
        "self._ram.num_slots - self._ram.num_held",
    ),
    Fault(
        "what is held may fall out",
        "ram_slots",
        "        if key not in self._holds:\n            self._idle",
        "        if True:\n            self._idle",
    ),
    Fault(
        "what is held is never let go",
        "tiers",
        "            self._ram.let_go(keys)\n",
        "            pass\n",
    ),
    Fault(
        "who has ended holds slots",
        "scheduler",
        "        self.tiers.release(request.request_id)\n",
        "",
    ),
    Fault(
        "waits for a disk that never answers",
        "tiers",
        "self._arriving.get(first, self._now) > self._now",
        "first in self._arriving",
    ),
    Fault("a slot is lost", "ram_slots", "        self._free.append(slot)\n\n", "        pass\n\n"),
    Fault(
        "what falls out of RAM is not written",
        "tiers",
        '            self._move("ram", "disk", (victim,), (place,), (), tenant)\n',
        "            pass\n",
    ),
    Fault(
        "what is published is not written",
        "tiers",
        "            self._to_write.append((",
        "            [].append((",
    ),
    Fault(
        "what is to be written is read too late",
        "tiers",
        "        moves, self._moves = self._moves, []\n",
        "        first = [m for m in self._moves if m.source != 'arena' or m.target != 'disk']\n"
        "        moves = first + [m for m in self._moves if m not in first]\n"
        "        self._moves = []\n",
    ),
    Fault(
        "forgotten, and found when it arrives",
        "tiers",
        "        self._first_valid_id = self._next_id\n",
        "",
    ),
    Fault(
        "what fell off the disk is asked for",
        "tiers",
        "            self._on_disk.difference_update(result.dropped)\n",
        "",
    ),
    Fault(
        "what cannot be read is asked for again",
        "tiers",
        "self._on_disk.difference_update(move.keys[result.num_done :][:1])",
        "pass",
    ),
    Fault(
        "a result counts twice",
        "tiers",
        "move = self._open.pop(result.move_id, None)",
        "move, self.num_taken = self._open.pop(result.move_id, None), self.num_taken + 1",
    ),
    Fault(
        "loads whatever it costs",
        "tier_prices",
        "if self.load_s(num_ram, num_disk) < compute_s:",
        "if True:",
    ),
    Fault(
        "nothing waits for what is on its way",
        "admission",
        "        if any(self._tiers.is_on_its_way(keys) for keys, _ in lacking):\n"
        "            return True\n",
        "",
    ),
    Fault(
        "the moves of a failed step are lost",
        "scheduler",
        "return replace(batch, requests=tuple(items), awaits=())",
        "return ScheduledBatch(tuple(items))",
    ),
    Fault("moved again", "mover", "if move.move_id >= self._next_id:", "if True:"),
    Fault(
        "a step that never came has no result",
        "mover",
        "            self._results.append(MoveResult(each, 0, error=NOT_SUBMITTED))\n",
        "",
    ),
    Fault(
        "results are told once",
        "mover",
        "        return tuple(self._results)\n",
        "        results, self._results = tuple(self._results), []\n        return results\n",
    ),
    Fault(
        "written while it changes",
        "mover",
        "            data = self._ram[list(move.source_blocks)]\n        else:",
        "            data = self._ram[move.source_blocks[0] :][:1]\n        else:",
    ),
    Fault(
        "no room is no reason",
        "mover",
        "        if not self._disk.has_room_for(num_blocks * block_bytes):\n",
        "        if False:\n",
    ),
]
