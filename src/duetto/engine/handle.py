"""What a door holds of an engine, wherever that engine is: in this process, in another one on this
machine, on another machine, or several of them behind a router. Standard library only.

A door adds requests and gets reports; it never sees a scheduler, an executor or a socket.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from duetto.core.cache_control import CacheMessage, CacheReply
from duetto.core.request import Request
from duetto.engine.compute import Computing
from duetto.engine.engine import StepReport

STOPPED = "the engine is stopping"
HUNG = "the engine hangs, and the server ends; the log of the server says why"

Deliver = Callable[[StepReport], None]


class EngineHandle(Protocol):
    """An engine that runs. Every request added gets exactly one final update, whatever fails.

    Any thread may call any method, and none of them raises because of the engine, nor blocks on it
    (but `stop`). Reports come on a thread of the handle's own, or on a caller's.
    """

    def start(self) -> None: ...

    def add(self, request: Request) -> None:
        """Send a request. A refusal is its final update, with an error. Raises ValueError for an id
        that is in use."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request in any state; one that is unknown or has ended is left alone."""
        ...

    def control(self, message: CacheMessage) -> "Future[CacheReply]":
        """Send what a user asks of the KV cache; an EngineError if nobody can answer."""
        ...

    def stop(self, timeout: float) -> bool:
        """End live requests as aborted, then the engine; False if it outlasts `timeout` seconds."""
        ...

    def give_up(self) -> None:
        """End live requests with an error and accept none, though the engine may hang."""
        ...

    @property
    def computing(self) -> Computing | None:
        """What is computed now, if this handle can see it."""
        ...

    @property
    def has_failed(self) -> bool: ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def last_progress_time(self) -> float:
        """When something was last computed or ended, or when work began after idleness."""
        ...


# Makes the engine's handle, which gives its reports to whoever asks for it: one door, once.
EngineOpener = Callable[[Deliver], EngineHandle]
