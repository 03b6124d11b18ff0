"""What a number of seeds and rows can show, said before anything is measured."""

from __future__ import annotations

import math

from scipy import optimize
from scipy import stats as scipy_stats


def seeds_needed(mean_difference: float, sd: float, *, confidence: float = 0.95, power: float = 0.8) -> int:
    """Seeds per arm with which a two-sided two-sample t test finds a difference of two means with this power.

    sd: standard deviation over seeds within an arm. For n seeds per arm the t value is noncentral t with 2n - 2 degrees
    of freedom around `mean_difference / (sd sqrt(2 / n))` (Cohen, Statistical Power Analysis, 1988, 2.3). At least 2.
    """
    if sd < 0 or not mean_difference or not math.isfinite(mean_difference) or not math.isfinite(sd):
        raise ValueError(f"no number of seeds separates means that differ by {mean_difference} with sd {sd}")
    if sd == 0:
        return 2

    def suffices(seeds: int) -> bool:
        shift = abs(mean_difference) / (sd * math.sqrt(2 / seeds))
        return _power(shift, 2 * seeds - 2, confidence) >= power

    high = 2
    while not suffices(high):
        high *= 2
    low = high // 2  # does not suffice, or is 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def detectable(
    sd_rows: float, n_rows: int, sd_seeds: float, n_seeds: int, *, confidence: float = 0.95, power: float = 0.8
) -> float:
    """The smallest mean effect that a two-sided t test against 0 finds with this power, in the unit of the sds.

        se^2 = sd_rows^2 / n_rows + sd_seeds^2 / n_seeds

    sd_rows: of the effect over rows (clusters), averaged over seeds; sd_seeds: of the mean effect over seeds. All seeds
    are asked the same rows, so more seeds do not shrink the first term, nor more rows the second. Degrees of freedom by
    Satterthwaite (1946). Infinite if a source of variance has one member only: its size cannot be seen.
    """
    if min(n_rows, n_seeds) < 1 or min(sd_rows, sd_seeds) < 0:
        raise ValueError(
            f"{n_rows} rows with sd {sd_rows} and {n_seeds} seeds with sd {sd_seeds} have no standard error"
        )
    parts = [(sd**2 / n, n - 1) for sd, n in ((sd_rows, n_rows), (sd_seeds, n_seeds)) if sd > 0]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    if any(freedom == 0 for _, freedom in parts):
        return math.inf
    freedom = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    high = 1.0
    while _power(high, freedom, confidence) < power:
        high *= 2
    shift = optimize.brentq(lambda shift: _power(shift, freedom, confidence) - power, 0.0, high)
    return float(shift) * math.sqrt(variance)


def _power(shift: float, freedom: float, confidence: float) -> float:
    """The probability that |t| exceeds its critical value, for a noncentral t around `shift`."""
    critical = scipy_stats.t.ppf(0.5 + confidence / 2, freedom)
    # the lower tail as an upper one, because the lower one is NaN far from `shift` (scipy 1.17)
    return float(scipy_stats.nct.sf(critical, freedom, [shift, -shift]).sum())
