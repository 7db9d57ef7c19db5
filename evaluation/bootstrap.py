"""Percentile bootstrap of every metric, over the units that were sampled."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.metrics import (
    Answers,
    Label,
    as_answers,
    entity_matches,
    minus_invalid,
    pair_matches,
    question_matches,
    same_text,
    text_f1,
)
from tasks import Task
from tasks.splits import units


def intervals(values: dict[str, np.ndarray], confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """The percentile interval of every metric's resampled values, as `bootstrap_values` gives them."""
    tail = (1 - confidence) / 2
    return {name: tuple(float(q) for q in np.quantile(v, [tail, 1 - tail])) for name, v in values.items()}


def bootstrap_values(
    task: Task,
    rows: list[dict],
    predictions: Sequence[Label],
    scores: Sequence[float] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every metric and "score" on each resample, (samples,) each.

    Units (see `tasks.splits.units`) are drawn with replacement. The draws depend on the number of units and the seed
    alone, so two models' values for the same rows are paired, and so are the metrics of one model.
    """
    answers = as_answers(task, rows, predictions, scores)
    unit = units(answers.task, answers.rows)
    number = int(unit.max()) + 1
    resampled = {name: resampler(name, answers, unit) for name in task.metrics}
    rng = np.random.default_rng(seed)
    values: dict[str, list[np.ndarray]] = {name: [] for name in task.metrics}
    chunk = max(1, 2_000_000 // number)  # bounds memory to a few arrays of 16 MB
    for begin in range(0, samples, chunk):
        size = min(chunk, samples - begin)
        drawn = rng.integers(0, number, size=(size, number)) + number * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(float)
        for name in task.metrics:
            values[name].append(resampled[name](counts))
    joined = {name: np.concatenate(parts) for name, parts in values.items()}  # (samples,) each
    joined["score"] = np.mean(list(joined.values()), axis=0)
    return joined


def resampler(metric: str, answers: Answers, unit: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from how often each unit was drawn (samples, units) to the metric's value (samples,)."""
    if metric == "spearman":
        return lambda counts: _weighted_spearman(answers, counts)
    statistics, finish = STATISTICS[metric](answers)  # statistics: (rows or units, k)
    if len(statistics) != unit.max() + 1:
        columns = [np.bincount(unit, statistics[:, j]) for j in range(statistics.shape[1])]
        statistics = np.stack(columns, axis=1)
    return lambda counts: finish(counts @ statistics)  # (samples, units) @ (units, k)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 1e-12)


def _mean_statistics(values: np.ndarray):
    return np.stack([values, np.ones(len(values))], axis=1), lambda s: _ratio(s[:, 0], s[:, 1])


def _f1_statistics(answers: Answers):
    predicted = answers.other_class
    hit = (answers.gold == 1) & (predicted == 1)
    miss = answers.gold != predicted
    return np.stack([hit, miss], axis=1).astype(float), lambda s: _ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1])


def _f1_of_classes(answers: Answers, finish: Callable[[np.ndarray, np.ndarray], np.ndarray]):
    """finish: from every class's F1 and number of gold rows, both (samples, classes), to the metric (samples,)."""
    gold = np.eye(answers.classes)[answers.gold]
    predicted = np.eye(answers.classes)[answers.predicted] * ~answers.invalid[:, None]
    k = answers.classes
    statistics = np.concatenate([2 * gold * predicted, gold + predicted, gold], axis=1)
    return statistics, lambda s: finish(_ratio(s[:, :k], s[:, k : 2 * k]), s[:, 2 * k :])


def _macro_f1_statistics(answers: Answers):
    return _f1_of_classes(answers, lambda f1, rows: f1.mean(axis=1))


def _weighted_f1_statistics(answers: Answers):
    return _f1_of_classes(answers, lambda f1, rows: _ratio((f1 * rows).sum(axis=1), rows.sum(axis=1)))


def _matthews_statistics(answers: Answers):
    k, two = answers.classes, answers.classes == 2
    predicted = answers.other_class if two else answers.held_at_gold
    costly = np.zeros(len(predicted)) if two else answers.invalid
    right = answers.gold == predicted

    def finish(sums: np.ndarray) -> np.ndarray:
        gold, guess, n = sums[:, :k], sums[:, k : 2 * k], sums[:, :k].sum(axis=1)
        covariance = sums[:, -2] * n - (gold * guess).sum(axis=1)
        spread = (n**2 - (gold**2).sum(axis=1)) * (n**2 - (guess**2).sum(axis=1))
        return minus_invalid(_ratio(covariance, np.sqrt(spread)), sums[:, -1] / n)

    columns = np.stack([right, costly], axis=1).astype(float)
    return np.concatenate([np.eye(k)[answers.gold], np.eye(k)[predicted], columns], axis=1), finish


def _pearson_statistics(answers: Answers):
    x = answers.held_at_gold - answers.gold.mean()  # the same shift for both keeps them small, and equal if equal
    y = answers.gold - answers.gold.mean()
    columns = [np.ones(len(x)), x, y, x * x, y * y, x * y, answers.invalid]

    def finish(sums: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy, invalid = sums.T
        spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
        return minus_invalid(_ratio(xy - x * y / n, spread), invalid / n)

    return np.stack(columns, axis=1).astype(float), finish


def _weighted_spearman(answers: Answers, counts: np.ndarray) -> np.ndarray:
    """(samples,) Spearman of resamples that hold row i counts[:, i] times; repeats share their rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, distinct = np.unique(values, return_inverse=True)  # (rows,) number of the value among the sorted ones
        order = np.argsort(distinct, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(distinct[order]) > 0])
        tied = np.add.reduceat(counts[:, order], starts, axis=1)  # (samples, distinct values)
        return (np.cumsum(tied, axis=1) - tied / 2)[:, distinct]  # mid-rank, up to a constant 1/2

    n = counts.sum(axis=1, keepdims=True)
    x, y = ranks(answers.held_at_gold) - n / 2, ranks(answers.gold) - n / 2  # mid-ranks have mean n / 2
    covariance, xx, yy = ((counts * product).sum(axis=1) for product in (x * y, x * x, y * y))
    return minus_invalid(_ratio(covariance, np.sqrt(xx * yy)), counts @ answers.invalid / n[:, 0])


STATISTICS: dict[str, Callable] = {
    "accuracy": lambda answers: _mean_statistics((answers.gold == answers.predicted) & ~answers.invalid),
    "f1": _f1_statistics,
    "f1a": _f1_statistics,
    "macro_f1": _macro_f1_statistics,
    "weighted_f1": _weighted_f1_statistics,
    "matthews": _matthews_statistics,
    "pearson": _pearson_statistics,
    "em": lambda answers: _mean_statistics(question_matches(answers)),
    "token_f1": lambda answers: _mean_statistics(entity_matches(answers, text_f1)),
    "exact_match": lambda answers: _mean_statistics(entity_matches(answers, same_text)),
    "gender_parity": lambda answers: _mean_statistics(pair_matches(answers)),
}
