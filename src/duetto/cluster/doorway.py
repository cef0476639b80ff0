"""Where workers come to a door: it listens for those that join, and calls those that listen."""

import logging
from collections.abc import Callable

from duetto.cluster.address import WireAddress
from duetto.cluster.connection import Connection, ConnectionUser
from duetto.cluster.remote import Dispatcher, RemoteEngine
from duetto.cluster.sockets import BoundSocket
from duetto.cluster.wire import Wire

logger = logging.getLogger(__name__)

FIRST_CALL_S, LAST_CALL_S = 0.2, 5.0  # until a worker that does not answer is called again


def log_unanswered(address: WireAddress, reason: str, is_refused: bool) -> None:
    said = "does not serve here" if is_refused else "does not answer"
    logger.warning("the worker at %s %s: %s", address, said, reason)


class Doorway:
    """Makes a RemoteEngine of each worker that comes, and lets the dispatcher know.

    Any thread may call. The wire and the workers' handles are others' to stop.
    """

    def __init__(
        self,
        wire: Wire,
        dispatcher: Dispatcher,
        version: str,
        name: str = "",
        on_unanswered: Callable[[WireAddress, str, bool], None] = log_unanswered,
    ) -> None:
        """`version` is Duetto's; `name` is this door's, in the logs of workers. `on_unanswered` is
        told of an address that was called why no worker of it is here, and whether one was
        refused, by us or by itself; it is called again all the same."""
        self._wire = wire
        self._dispatcher = dispatcher
        self._version = version
        self._name = name
        self._on_unanswered = on_unanswered
        self._is_stopping = False

    def listen(self, bound: BoundSocket) -> None:
        """Let workers join; `bound` is of `wire.bind`."""
        self._wire.listen(bound, self._remote)

    def call(self, address: WireAddress) -> None:
        """Have the worker that listens there, and whoever listens there once that one is lost."""
        self._call(address, FIRST_CALL_S)

    def stop(self) -> None:
        """Call nobody any more."""
        self._is_stopping = True

    def _remote(self, connection: Connection) -> RemoteEngine:
        return RemoteEngine(connection, self._dispatcher, self._version, self._wire.clock)

    def _call(self, address: WireAddress, delay_s: float) -> None:
        def use(connection: Connection) -> ConnectionUser:
            worker = self._remote(connection)

            def call_again(reason: str, is_refused: bool) -> None:
                if not worker.has_joined:
                    self._on_unanswered(address, reason, is_refused)
                next_s = FIRST_CALL_S if worker.has_joined else min(2 * delay_s, LAST_CALL_S)
                self._wire.call_later(delay_s, lambda: self._call(address, next_s))

            worker.on_over = call_again
            worker.knock(self._name)
            return worker

        if not self._is_stopping:
            self._wire.connect(address, use)
