"""vLLM's --kv-events-config: where a server publishes KV events, as JSON."""

from typing import Literal

import msgspec

from duetto.cluster.address import ACCEPTED
from duetto.cluster.events.publisher import PublisherAddresses
from duetto.core.errors import ConfigError

CONFIG_FLAG = "--kv-events-config"
MAX_BUFFER_STEPS = 1_000_000


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    """With vLLM's defaults (vllm/config/kv_events.py)."""

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None  # None: zmq, if they are enabled
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000  # these two bound what waits, which is bounded here in its own way
    max_queue_size: int = 100_000
    topic: str = ""


def read_vllm_config(text: str, *, is_open: bool = False) -> PublisherAddresses | None:
    """None: they are not enabled. Hashes are numbers then, as vLLM's are by default. Raises
    ConfigError."""
    try:
        config = msgspec.json.decode(text, type=_Config)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        accepted = ", ".join(_Config.__struct_fields__)
        raise ConfigError(f"{CONFIG_FLAG}: {error!s:.200}; accepted: {accepted}") from None
    if not config.enable_kv_cache_events or config.publisher == "null":
        return None
    if not 1 <= config.buffer_steps <= MAX_BUFFER_STEPS:
        raise ConfigError(
            f"{CONFIG_FLAG}: buffer_steps {config.buffer_steps}: must be from 1 to "
            f"{MAX_BUFFER_STEPS}"
        )
    if config.endpoint.startswith("inproc:"):
        raise ConfigError(f"{CONFIG_FLAG}: endpoint {config.endpoint!r:.80}; {ACCEPTED}")
    # As vLLM decides: what names a host is where somebody listens for the events of many.
    is_bound = "*" in config.endpoint or "::" in config.endpoint or "ipc://" in config.endpoint
    return PublisherAddresses(
        config.endpoint,
        config.replay_endpoint,
        config.topic,
        connects=not is_bound,
        int_hashes=True,
        is_open=is_open,
        buffer_batches=config.buffer_steps,
    )
