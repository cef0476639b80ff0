"""What one call of an operation costs, as numbers to multiply the sums of a batch with.

Taken from the operations' own prices (`Op.cost`), which are affine in the batch's rows, attended
pairs and KV tokens read; so there is no second copy of any formula here. Knows no operation, no
hardware and no time.
"""

from dataclasses import dataclass

from duetto.program.op import Op
from duetto.program.shape import BatchShape, Precision, RequestShape, Rows

_FINE = 2**20  # operations count whole bytes; at this many per number nothing is rounded away
_FRESH = RequestShape(1, 0)
_ONE = BatchShape((_FRESH,))
_TWO = BatchShape((_FRESH, _FRESH))
_PAST = BatchShape((RequestShape(1, 1),))


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs and bytes of a call: so many fixed, and for each row, attended pair and token read."""

    rows: Rows
    flops_row: float
    flops_pair: float
    bytes_fixed: float
    bytes_row: float
    bytes_read: float

    def flops(self, rows: float, pairs: float) -> float:
        return self.flops_row * rows + self.flops_pair * pairs

    def bytes_moved(self, rows: float, read: float) -> float:
        return self.bytes_fixed + self.bytes_row * rows + self.bytes_read * read


def work_of(op: Op, precision: Precision) -> Work:
    """Of a collective the bytes are those that each rank sends, over the link.

    A second request like the first adds a row, a pair and a read; one token before the request
    adds a pair and a read. What is left is fixed. (With a window of one token nothing is before
    the request, and its pairs and reads count as its rows, which they are as many as.)
    """
    fine = Precision(
        precision.weight_bytes * _FINE,
        precision.activation_bytes * _FINE,
        precision.kv_bytes * _FINE,
    )
    one, two, past = op.cost(_ONE, fine), op.cost(_TWO, fine), op.cost(_PAST, fine)
    flops_pair = past.flops - one.flops
    bytes_read = past.bytes_moved - one.bytes_moved
    bytes_all = two.bytes_moved - one.bytes_moved  # of a row, a pair and a read
    return Work(
        rows=op.rows,
        flops_row=two.flops - one.flops - flops_pair,
        flops_pair=flops_pair,
        bytes_fixed=(one.bytes_moved - bytes_all) / _FINE,
        bytes_row=(bytes_all - bytes_read) / _FINE,
        bytes_read=bytes_read / _FINE,
    )
