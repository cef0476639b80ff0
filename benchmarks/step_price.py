"""The price of a step as a sum of amounts of its shape, fitted to steps that were measured.

For benchmarks that compare the simulator with a run. Knows no model and no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duetto.core.shape import BatchShape


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of a step as a sum of amounts, each times a price that is not negative."""

    terms: tuple[float, ...]

    def __call__(self, shape: BatchShape) -> float:
        return sum(a * b for a, b in zip(self.terms, amounts(shape), strict=True))


# A few tokens take as long as one, while the weights are read; then each costs arithmetic. A line
# through both is a third off in between, which is where the steps of a light load are.
TOKEN_KNEES = (2, 4, 8, 16, 32)
ROW_KNEE = 4


def amounts(shape: BatchShape) -> tuple[float, ...]:
    requests = shape.requests
    tokens, rows = shape.num_tokens, shape.num_logit_rows
    return (
        1.0,
        tokens,
        *(max(0, tokens - knee) for knee in TOKEN_KNEES),
        min(rows, 1),
        rows,
        max(0, rows - ROW_KNEE),
        sum(r.attended_pairs(None) for r in requests),
        sum(r.read_tokens(None) for r in requests),
        len(requests),
    )


def fit_price(shapes: Sequence[BatchShape], seconds: Sequence[float]) -> Price:
    """Non-negative least squares (Lawson and Hanson, 1974, ch. 23) of errors relative to the price:
    relative to what was measured, it would be too low, as slow steps would count less. A step that
    took more than twice its price was made long by something else, and is left out."""
    rows, times = np.array([amounts(shape) for shape in shapes]), np.array(seconds)
    prices = times
    for limit in (10, 5, 3, 2, 2):
        usual = times <= limit * prices
        scaled = rows[usual] / prices[usual, None]
        terms = non_negative(scaled, times[usual] / prices[usual])
        prices = rows @ terms
    return Price(tuple(terms.tolist()))


def non_negative(rows: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x of 0 or more that brings rows @ x nearest to `right`, by coordinate descent."""
    largest = np.maximum(rows.max(axis=0), 1e-300)
    unit = rows / largest
    matrix, product = unit.T @ unit, unit.T @ right
    found = np.zeros(unit.shape[1])
    for _ in range(2_000):
        for i in np.flatnonzero(matrix.diagonal()):
            rest = product[i] - matrix[i] @ found + matrix[i, i] * found[i]
            found[i] = max(0.0, rest / matrix[i, i])
    prices: NDArray[np.float64] = found / largest
    return prices
