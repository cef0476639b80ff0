"""What a backend on a device is, beside a Backend: it starts steps, and is asked for results later.

Knows tokens, positions, slots and random streams as numbers; no request and no torch.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from duetto.backends.backend import Backend, FloatArray, IntArray, StepArrays

NOT_FINITE = -1  # in place of a token: the row's logits are NaN, or infinite, or -inf everywhere


class SampleArrays(NamedTuple):
    """How each row of logits is sampled on the device, by steps 6 to 9 of runner/sampler.py."""

    temperatures: NDArray[np.float64]  # [L]; 0: the largest, the first of equals
    keys: NDArray[np.uint64]  # [L]: runner/gumbel.key_of(seed, position)
    top_ks: IntArray  # [L]; 0: all
    top_ps: NDArray[np.float64]  # [L]; 1: all
    # [L]: what a kept logit may be below the largest, as a number <= 0: temperature * ln(min_p);
    # -inf: anything. A logit is kept if it is >= largest + this, in fp64.
    min_gaps: NDArray[np.float64]


class Started(Protocol):
    """A step on its way. Steps run in the order in which they were started. Each of its methods
    may be asked any number of times, and raises what went wrong: DeviceLost, if nothing can be
    computed any more; anything else concerns this step. What a step gives is read before a third
    one is started after it: until then it keeps its place on the host."""

    def tokens(self) -> IntArray:
        """[L]: what each row's logits gave, NOT_FINITE where they give none; waits. Only of a step
        that was started with `sampling`."""
        ...

    def logits(self) -> FloatArray:
        """[L, vocabulary], in fp32; waits. Only of a step that was started with `wants_logits`."""
        ...

    def wait(self) -> None:
        """Until it has run."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """All methods of Backend stand in the same queue: each sees what the steps that were started
    before it have written, and those after it see what it has."""

    def start(
        self,
        step: StepArrays,
        kv: Any,
        sampling: SampleArrays | None,
        feedback: IntArray | None = None,
        *,
        wants_logits: bool = False,
    ) -> Started:
        """Put a step on the device's queue, and return before it has run. The arrays given may be
        changed afterwards.

        feedback [T]: for each token, -1, or the row of the sampled step started last whose sample
        it is, in place of its token id; None: all ids are known. A sample may be NOT_FINITE: what
        is computed of it is nobody's, but it must not harm other rows. sampling: None samples
        nothing, and leaves the samples of the step before as they are. Raises, having done
        nothing, for a slot or a block outside the arena."""
        ...
