"""Blocks whose KV comes from another engine, and blocks that are being sent to one.

Between the steps of a scheduler a transfer owns its blocks like a request does. What has come is a
published prefix, and the ordinary admission finds it. Knows no link, no bytes and no protocol
(docs/design/cluster.md).
"""

from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass

from duetto.core.config import SchedulerConfig
from duetto.core.request import Request
from duetto.scheduler.block_pool import BlockHash, BlockPool
from duetto.scheduler.prefix import reusable_hashes
from duetto.scheduler.publishing import Publisher
from duetto.scheduler.queues import Queues

MAX_SHARE = 2  # one part in so many of the pool, for all imports together
RESERVE_SHARE = 16  # one part in so many stays free, beside a block for each running request


@dataclass(frozen=True, slots=True, eq=False)
class TakenBlocks:
    """Blocks for all of a prompt that may be reused: the first `num_here` hold it already."""

    request: Request
    hashes: tuple[BlockHash, ...]
    blocks: tuple[int, ...]
    num_here: int

    @property
    def missing(self) -> tuple[int, ...]:
        """The blocks to write, in the prompt's order."""
        return self.blocks[self.num_here :]


class Imports:
    """The writer of who holds blocks for a transfer. On the engine's thread."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, queues: Queues, publisher: Publisher
    ) -> None:
        self._config = config
        self._pool = pool
        self._queues = queues
        self._publisher = publisher
        self._taken: dict[TakenBlocks, None] = {}  # perhaps being written
        self._kept: dict[str, list[int]] = {}  # by request: published, until it is admitted
        self._sent: dict[Hashable, list[int]] = {}  # by transfer: perhaps being read

    # --- what comes --------------------------------------------------------------------------

    def take(self, request: Request) -> TakenBlocks | None:
        """Blocks for what a prompt lacks; None if it lacks nothing, or there is no room for it
        beside those that run or wait. The request is not added before `publish`, nor before it is
        certain that there will be no `publish`."""
        hashes = tuple(reusable_hashes(request, self._config))
        here = self._pool.find(hashes)
        num_missing = len(hashes) - len(here)
        if not num_missing or not self._has_room(here, num_missing):
            return None
        self._pool.retain(here)  # first, or allocation could take them
        blocks = (*here, *self._pool.allocate(num_missing))
        taken = TakenBlocks(request, hashes, blocks, len(here))
        self._taken[taken] = None
        return taken

    def publish(self, taken: TakenBlocks) -> None:
        """All has come, and nobody writes any more. The blocks stay until the request is admitted
        or has ended, or a request that could not run otherwise needs the room."""
        del self._taken[taken]
        self._publisher.publish_imported(taken.request, taken.hashes, taken.blocks, taken.num_here)
        found = self._pool.find(taken.hashes)  # others may have computed some of it meanwhile
        self._pool.retain(found)
        self._pool.release(taken.blocks)
        self._kept[taken.request.request_id] = found

    def drop(self, taken: TakenBlocks) -> None:
        """Not all has come, and nobody writes any more. Its request may have been added, or have
        ended, long before."""
        del self._taken[taken]
        self._pool.release(taken.blocks)

    def settle(self, running: Container[str]) -> None:
        """Requests that run hold what they found by themselves."""
        for request_id in [one for one in self._kept if one in running]:
            self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """A request has been admitted, or has ended."""
        blocks = self._kept.pop(request_id, None)
        if blocks is not None:
            self._pool.release(blocks)

    def give_way(self) -> None:
        """Nobody runs, and the first in line lacks blocks: what was published may be evicted."""
        for request_id in [*self._kept]:
            self.forget(request_id)

    # --- what is sent ------------------------------------------------------------------------

    def retain(self, transfer: Hashable, blocks: Sequence[int]) -> None:
        """Computed blocks are to be read, whatever becomes of their request."""
        self._pool.retain(blocks)
        self._sent.setdefault(transfer, []).extend(blocks)

    def release(self, transfer: Hashable) -> None:
        """Nobody reads a transfer's blocks any more. Safe to call twice."""
        self._pool.release(self._sent.pop(transfer, []))

    # --- what is held ------------------------------------------------------------------------

    @property
    def tables(self) -> list[Sequence[int]]:
        """What each transfer holds."""
        taken = [one.blocks for one in self._taken]
        return [*taken, *self._kept.values(), *self._sent.values()]

    @property
    def num_open(self) -> int:
        """Transfers that hold blocks: 0 once all are over and their requests were admitted."""
        return len(self._taken) + len(self._kept) + len(self._sent)

    def check(self) -> None:
        """Assert what is held for whom. The counts of owners are the pool's to check."""
        assert not self._kept.keys() & self._queues.running.keys(), "it holds blocks twice"

    def _has_room(self, here: Sequence[int], num_missing: int) -> bool:
        """Whether so many more blocks leave enough for all others."""
        config = self._config
        held = {block for one in self._taken for block in one.blocks}
        held.update(*self._kept.values(), here)
        if len(held) + num_missing > config.num_blocks // MAX_SHARE:
            return False
        reserve = config.num_blocks // RESERVE_SHARE + len(self._queues.running)
        first = self._queues.waiting[0] if self._queues.waiting else None
        if first is not None:  # whoever waits was there before
            reserve += config.num_blocks_for(first.num_tokens)
        return num_missing + reserve <= self._pool.num_free_beside(here)
