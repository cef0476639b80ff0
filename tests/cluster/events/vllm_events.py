"""vLLM's structs, as its vllm/distributed/kv_events.py has them, in its three layouts: all arrays
(0.9 to 0.16), a batch that is an array of maps, and all maps."""

from typing import Any

import msgspec

Hash = bytes | int


def layout(batch_is_array: bool, event_is_array: bool) -> dict[str, Any]:
    class EventBatch(msgspec.Struct, array_like=batch_is_array, omit_defaults=True, gc=False):
        ts: float
        events: list[Any]
        data_parallel_rank: int | None = None

    class KVCacheEvent(
        msgspec.Struct, array_like=event_is_array, omit_defaults=True, gc=False, tag=True
    ):
        pass

    class BlockStored(KVCacheEvent):
        block_hashes: list[Hash]
        parent_block_hash: Hash | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple[Any, ...] | None] | None = None

    class BlockRemoved(KVCacheEvent):
        block_hashes: list[Hash]
        medium: str | None

    class AllBlocksCleared(KVCacheEvent):
        pass

    class KVEventBatch(EventBatch):
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]

    names = (EventBatch, BlockStored, BlockRemoved, AllBlocksCleared, KVEventBatch)
    return {struct.__name__: struct for struct in names}


ARRAYS = layout(batch_is_array=True, event_is_array=True)
LAYOUTS = {
    "arrays": ARRAYS,
    "array of maps": layout(batch_is_array=True, event_is_array=False),
    "maps": layout(batch_is_array=False, event_is_array=False),
}
