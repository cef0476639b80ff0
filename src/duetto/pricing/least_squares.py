"""Non-negative least squares of relative errors, step by step (Lawson and Hanson, 1974, ch. 23; by
coordinate descent). Knows nothing of what is measured.
"""

from collections.abc import Sequence

Vector = list[float]


class Equations:
    """The normal equations of a least squares: matrix · prices = right."""

    __slots__ = ("matrix", "right")

    def __init__(self, num_amounts: int) -> None:
        self.matrix: list[Vector] = [[0.0] * num_amounts for _ in range(num_amounts)]
        self.right: Vector = [0.0] * num_amounts

    def add(self, amounts: Vector, seconds: float, predicted: float, keep: float) -> None:
        """One more step, for which amounts · prices should be `seconds`; old ones fade.

        Errors are relative: to what was predicted as much as to what was measured, so that neither
        a step in which the machine slept nor an old fast one outweighs the others.
        """
        weight = 1.0 / (seconds * predicted)
        for i, amount in enumerate(amounts):
            scale, row = weight * amount, self.matrix[i]
            self.matrix[i] = [keep * m + scale * a for m, a in zip(row, amounts, strict=True)]
            self.right[i] = keep * self.right[i] + scale * seconds

    def slower(self, factor: float, weight: float) -> "Equations":
        """As if every step had taken `factor` times as long, and counted `weight` times."""
        other = Equations(len(self.right))
        other.matrix = [[weight * m / factor**2 for m in row] for row in self.matrix]
        other.right = [weight * r / factor for r in self.right]
        return other


def solve(known: Sequence[Equations], prices: Vector, sweeps: int) -> None:
    """Move `prices` towards those, of 0 or more, that minimise the squared relative errors of all
    of `known`: one price after the other, `sweeps` times."""
    matrix = [_total(rows) for rows in zip(*[each.matrix for each in known], strict=True)]
    right = _total([each.right for each in known])
    for _ in range(sweeps):
        for i, row in enumerate(matrix):
            if row[i] > 0:
                rest = right[i] - sum(map(float.__mul__, row, prices)) + row[i] * prices[i]
                prices[i] = max(0.0, rest / row[i])


def _total(rows: Sequence[Vector]) -> Vector:
    return [sum(column) for column in zip(*rows, strict=True)]
