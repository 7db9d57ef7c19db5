"""From resampled values to statements: seeds as a source of chance beside the rows, p, and Holm's correction."""

from collections.abc import Sequence

import numpy as np

TINY = 1e-12  # rounding errors: no difference


def over_seeds(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(samples,) hierarchical bootstrap of the mean over seeds: resample b draws seeds with replacement, and its rows.

    values: (seeds, samples), a metric of every seed's run on resample b of the rows, the same rows for all seeds
    (`bootstrap_values` with one seed). They answer the same rows, so a draw of rows belongs to the resample and not to
    a run: rows drawn for each run apart would count as so many more rows. With one seed it is the plain bootstrap.
    """
    seeds, samples = values.shape
    drawn = rng.integers(0, seeds, size=(seeds, samples))
    return np.take_along_axis(values, drawn, axis=0).mean(axis=0)


def two_sided_p(differences: np.ndarray) -> float:
    """Twice the smaller share of resamples in which the difference has the other sign or is 0, at most 1.

    Efron and Tibshirani (1993), chapter 16, with one added to both counts.
    """
    samples = len(differences)
    shares = [(np.sum(sign * differences <= TINY) + 1) / (samples + 1) for sign in (1, -1)]
    return min(1.0, 2 * float(min(shares)))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by Holm's method (1979), in the order given.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than one before it, or larger than 1.
    """
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p, dtype=float)[order] * factors))
    return adjusted.tolist()
