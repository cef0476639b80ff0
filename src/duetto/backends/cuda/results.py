"""What a step gives on its way back: copied to pinned memory behind the step, and waited for.

There are as many places as steps may be on their way. Knows no program.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duetto.backends.backend import FloatArray, IntArray
from duetto.backends.cuda.loss import telling_of_loss


@dataclass(slots=True)
class StartedOnDevice:
    """A step on its way (backends/device.Started). What it gives is read before as many more steps
    have been started as there are places."""

    _device: torch.device
    _event: "torch.cuda.Event | None"
    _tokens: Tensor | None
    _logits: Tensor | None

    def tokens(self) -> IntArray:
        """[L]: what was sampled; waits."""
        assert self._tokens is not None, "the step was started without sampling"
        self.wait()
        return np.array(self._tokens.numpy())

    def logits(self) -> FloatArray:
        """[L, vocabulary]; waits."""
        assert self._logits is not None, "the step was started without wanting logits"
        self.wait()
        found: FloatArray = self._logits.numpy()
        return found

    def wait(self) -> None:
        """Until it has run, and what it gives is here."""
        if self._event is not None:
            with telling_of_loss(self._device):
                self._event.synchronize()


@dataclass(slots=True)
class Finished:
    """A step that was waited for when it was started."""

    _tokens: IntArray | None
    _logits: FloatArray | None

    def tokens(self) -> IntArray:
        """[L]: what was sampled."""
        assert self._tokens is not None, "the step was started without sampling"
        return self._tokens

    def logits(self) -> FloatArray:
        """[L, vocabulary]."""
        assert self._logits is not None, "the step was started without wanting logits"
        return self._logits

    def wait(self) -> None:
        """It has run."""


class ResultPlaces:
    def __init__(self, num_rows: int, width: int, device: torch.device, num_in_flight: int) -> None:
        self._device, is_cuda = device, device.type == "cuda"
        self._tokens = [
            torch.empty(num_rows, dtype=torch.int32, device="cpu", pin_memory=is_cuda)
            for _ in range(num_in_flight)
        ]
        self._width = width
        self._logits = [self._make_room(0) for _ in range(num_in_flight)]
        self._events = [torch.cuda.Event() if is_cuda else None for _ in range(num_in_flight)]
        self._next = 0

    def _make_room(self, num_rows: int) -> Tensor:
        """For logits: many bytes, and few ask for them, so there is room once somebody does."""
        is_cuda = self._device.type == "cuda"
        shape = num_rows, self._width
        return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=is_cuda)

    def fetch(self, sampled: Tensor | None, logits: Tensor | None) -> StartedOnDevice:
        """Begin to copy what the step started last leaves in these."""
        place = self._next
        self._next = (place + 1) % len(self._events)
        tokens, rows = None, None
        if sampled is not None:
            tokens = self._tokens[place][: len(sampled)]
            tokens.copy_(sampled, non_blocking=True)
        if logits is not None:
            if len(logits) > len(self._logits[place]):
                self._logits[place] = self._make_room(len(logits))
            rows = self._logits[place][: len(logits)]
            rows.copy_(logits, non_blocking=True)
        event = self._events[place]
        if event is not None:
            event.record()
        return StartedOnDevice(self._device, event, tokens, rows)
