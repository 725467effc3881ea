"""Power laws through the points of a sweep, with confidence bands, and the compute-optimal front.

Source: Kaplan et al., arXiv 2001.08361, section 3 (a loss falls as a power of size, data and compute, down to a floor);
Hoffmann et al., arXiv 2203.15556, approach 1 (the least loss at each cost).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student_t

Floats = NDArray[np.float64]

_STARTS = (0.05, 0.2, 0.5, 1.0)
"""Starting exponents of a fit; the best result is taken."""


@dataclass(frozen=True)
class PowerLaw:
    """``floor + scale * x ** -exponent``, fitted to points.

    Attributes:
        floor: Limit for large x; at least 0.
        scale: Factor of the falling part.
        exponent: Exponent of the falling part.
        errors: Standard errors of the three; infinite where the points do not determine them.
        points: Number of points.
    """

    floor: float
    scale: float
    exponent: float
    errors: tuple[float, float, float]
    points: int
    _covariance: tuple[tuple[float, ...], ...]
    _middle: float

    @property
    def determined(self) -> bool:
        """Whether the points tell that the loss falls: the 95 % interval of the exponent is above 0."""
        return bool(np.isfinite(self.errors).all() and self.exponent > self._quantile(0.95) * self.errors[2])

    def _quantile(self, confidence: float) -> float:
        freedom = self.points - 3
        return float(student_t.ppf(0.5 + confidence / 2, freedom)) if freedom > 0 else float("inf")

    def at(self, x: Sequence[float] | Floats) -> Floats:
        """Its values."""
        return self.floor + self.scale * np.asarray(x, dtype=np.float64) ** -self.exponent

    def band(self, x: Sequence[float] | Floats, confidence: float = 0.95) -> Floats:
        """Half the width of the confidence band of the curve at some x, by the linearised covariance."""
        log_x = np.log(np.asarray(x, dtype=np.float64) / self._middle)
        falling = self.at(x) - self.floor
        slopes = np.stack([np.ones_like(log_x), falling, -falling * log_x], axis=1)
        variance = np.einsum("ni,ij,nj->n", slopes, np.asarray(self._covariance), slopes)
        return np.asarray(self._quantile(confidence) * np.sqrt(np.maximum(variance, 0.0)), dtype=np.float64)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Least squares of ``floor + scale * x ** -exponent`` through points.

    Args:
        x: Positive: parameters, operations, tokens.
        y: Losses.

    Returns:
        None with fewer than four different x: three numbers leave nothing to judge the fit by.
    """
    given_x, given_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(np.unique(given_x)) < 4:
        return None
    middle = float(np.exp(np.log(given_x).mean()))
    log_x = np.log(given_x / middle)  # centred, so that scale and exponent are hardly correlated

    def residuals(values: Floats) -> Floats:
        floor, log_scale, exponent = values
        return np.asarray(floor + np.exp(log_scale - exponent * log_x) - given_y, dtype=np.float64)

    spread = max(float(np.ptp(given_y)), 1e-12)
    bounds = ([0.0, -np.inf, 0.0], [np.inf, np.inf, np.inf])
    starts = [np.array([max(0.0, given_y.min() - spread), np.log(spread), exponent]) for exponent in _STARTS]
    found = min(
        (least_squares(residuals, start, bounds=bounds, x_scale="jac") for start in starts), key=lambda f: f.cost
    )
    freedom = len(given_x) - 3
    noise = 2 * found.cost / freedom if freedom > 0 else np.inf
    information = found.jac.T @ found.jac
    if np.linalg.matrix_rank(information) == 3 and np.isfinite(noise):
        covariance = noise * np.linalg.inv(information)
    else:
        covariance = np.full((3, 3), np.inf)
    floor, log_scale, exponent = (float(value) for value in found.x)
    scale = float(np.exp(log_scale + exponent * np.log(middle)))
    deviations = np.sqrt(np.diag(covariance))
    errors = (float(deviations[0]), float(deviations[1] * scale), float(deviations[2]))
    rows = tuple(tuple(float(value) for value in row) for row in covariance)
    return PowerLaw(floor, scale, exponent, errors, len(given_x), rows, middle)


def front(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Indexes of the points that are better than all cheaper points, by rising cost."""
    order = sorted(range(len(cost)), key=lambda index: (cost[index], loss[index]))
    best, found = np.inf, []
    for index in order:
        if loss[index] < best:
            best = loss[index]
            found.append(index)
    return found


def efficiency(processes: Sequence[int], throughput: Sequence[float]) -> list[float]:
    """Throughput over that of the smallest number of processes, scaled linearly.

    Args:
        processes: Of each run.
        throughput: Samples per second of each.
    """
    least = min(range(len(processes)), key=lambda index: processes[index])
    each = throughput[least] / processes[least]
    return [rate / (count * each) for count, rate in zip(processes, throughput, strict=True)]
