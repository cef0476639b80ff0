"""Prefill and decode on different replicas: which prompts go away, and what it costs to bring their
KV back. Knows links and lengths; no scheduler.

The first token comes from the prefill replica. The KV of each layer is sent as soon as a chunk has
computed it, while the next layers compute (Splitwise, Patel et al., ISCA 2024; DistServe, Zhong et
al., OSDI 2024), so that mostly only the last layer's transfer is seen. It is seen in the gap
between the first token and the second.
"""

from dataclasses import dataclass

from duetto.core.errors import ConfigError
from duetto.simulation.replica import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLink:
    """What carries KV from one prefill replica; one transfer after the other."""

    num_layers: int
    bytes_per_token: float  # of KV, all layers together
    bytes_per_s: float
    latency_s: float = 0.0  # of a transfer, once

    def __post_init__(self) -> None:
        if self.num_layers < 1 or not self.bytes_per_token > 0:
            raise ValueError("a link carries the KV of at least one layer")
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise ConfigError("--kv-bandwidth: must be above 0, and its latency 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """Replicas that compute prompts only, in front of those that compute the rest."""

    prefill: ReplicaSpec
    num_replicas: int
    link: KVLink
    max_local_prefill: int = 0
    """Prompts of up to this many tokens are computed where they are decoded: conditional
    disaggregation, as in NVIDIA Dynamo."""

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"--prefill-replicas {self.num_replicas}: must be 1 or more")
        if self.max_local_prefill < 0:
            raise ConfigError(f"--max-local-prefill {self.max_local_prefill}: must be 0 or more")

    def is_remote(self, num_prompt_tokens: int) -> bool:
        return num_prompt_tokens > self.max_local_prefill


class LinkClock:
    """When what is sent over one link has arrived."""

    def __init__(self, link: KVLink) -> None:
        self._link = link
        self._free_at = 0.0
        self._sent_at: dict[str, float] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether some of a request's KV has been sent."""
        return request_id in self._sent_at

    def send_chunk(self, request_id: str, num_tokens: int, start: float, end: float) -> None:
        """Send the KV that a step from `start` to `end` computes, layer by layer.

        Layer l of L is there at start + (l+1)·c and takes x to send, one after the other. The last
        one has arrived after max over l of start + (l+1)·c + (L-l)·x, which is largest at one of
        the two ends; or L·x after the link was free.
        """
        layers = self._link.num_layers
        compute = (end - start) / layers
        send = num_tokens * self._link.bytes_per_token / layers / self._link.bytes_per_s
        self._free_at = max(
            self._free_at + layers * send, start + compute + layers * send, end + send
        )
        self._sent_at[request_id] = self._free_at

    def send_cached(self, request_id: str, num_tokens: int, start: float) -> None:
        """Send KV that a prefix cache had at `start`."""
        send = num_tokens * self._link.bytes_per_token / self._link.bytes_per_s
        self._free_at = max(self._free_at, start) + send
        self._sent_at[request_id] = self._free_at

    def arrival(self, request_id: str) -> float:
        """When all of a request's KV is there; forgets the request."""
        return self._sent_at.pop(request_id) + self._link.latency_s
