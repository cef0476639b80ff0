"""Holds numpy's BLAS to one thread. Knows nothing of what is multiplied.

BLAS cuts long products by thread and adds up the parts in another order, so the same product has
other last bits on another number of threads. The number is the whole process's: it is changed
while a step runs only, and by one step at a time. Accelerate (macOS) has no such setting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np  # noqa: F401  loads the library that is to be found
from threadpoolctl import ThreadpoolController

_BLAS = ThreadpoolController().select(user_api="blas")
_TURN = Lock()  # else who ends first would give back the threads while another still multiplies


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS has one thread in this block, and then again as many as before. Takes under 20 µs."""
    with _TURN, _BLAS.limit(limits=1):
        yield
