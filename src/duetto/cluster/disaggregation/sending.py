"""A running step whose rows are sent while it computes: which layers are there. Knows no link."""

from collections.abc import Callable
from threading import Condition

LOOK_EVERY_S = 0.001  # at how far the running step is
LayersOf = Callable[[], tuple[int, int]]  # steps that have begun, and layers of the last one done


class SentStep:
    """One step. The engine's thread begins and ends it, and those that send wait for its layers."""

    def __init__(self, layers_done: LayersOf, *, is_streaming: bool) -> None:
        """Made just before it is submitted. Unless it `is_streaming`, its rows are sent once it
        has ended."""
        self._layers_done = layers_done
        self._is_streaming = is_streaming
        self._number = layers_done()[0] + 1
        self._changed = Condition()
        self._has_ended = False
        self._has_failed = False

    def end(self, *, has_failed: bool) -> None:
        with self._changed:
            self._has_ended = True
            self._has_failed = has_failed
            self._changed.notify_all()

    def wait(self, layer: int) -> bool:
        """Until a layer's KV is there; False if the step has failed."""
        with self._changed:
            while not (self._has_ended or self._has(layer)):
                self._changed.wait(LOOK_EVERY_S if self._is_streaming else None)
            return not self._has_failed

    def _has(self, layer: int) -> bool:
        if not self._is_streaming:
            return False
        step, layers = self._layers_done()
        return step == self._number and layers > layer
